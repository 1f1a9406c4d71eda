"""Turn pretrained Transformer checkpoints into diffusion language models."""

from dllm_convert.common.version import __version__ as __version__
