"""An OpenAI-compatible endpoint of a converted checkpoint, on transformers' own server."""
