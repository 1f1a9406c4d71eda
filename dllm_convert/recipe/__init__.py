"""What to do: recipes, presets and flags as one validated, frozen value."""
