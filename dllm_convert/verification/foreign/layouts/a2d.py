"""dLLM's AR-to-diffusion checkpoints: stock weights and config under a model_type of its own.

Source: github.com/ZHZisZZ/dllm, `dllm/pipelines/a2d` and `dllm/utils/models.py` (commit ca17675).
The classes attend bidirectionally unless the caller gives a 4-D mask, so block diffusion leaves no
trace in the files: the block size is an argument of its trainer and its sampler. The mask token is
added to the tokenizer when it is loaded, and the embedding does not grow with it.
"""

from __future__ import annotations

from dllm_convert.verification.foreign.layout import ForeignLayout

LAYOUTS = tuple(
    ForeignLayout(
        name=f"a2d-{family}",
        model_types=(f"a2d-{family}",),
        family=family,
        mask_text="<|mask|>",
        blocks="unrecorded",
        block_mask="4d",
    )
    for family in ("llama", "qwen2", "qwen3")
)
