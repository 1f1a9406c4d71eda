"""Publishing: what goes up, how it goes up, and the proof that it arrived."""

from dllm_convert.publishing.options import PushOptions, PushResult
from dllm_convert.publishing.run import push_checkpoint

__all__ = ["PushOptions", "PushResult", "push_checkpoint"]
