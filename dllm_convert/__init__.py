"""Turn pretrained Transformer checkpoints into diffusion language models."""

__version__ = "0.1.0"
