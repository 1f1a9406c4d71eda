"""Tasks that need no download: lm-eval's YAML files beside this one, and the items they ask for."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What lm-eval's `--include_path` takes."""
