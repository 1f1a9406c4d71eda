"""What is trained is held in float32."""

from __future__ import annotations

from typing import Any


def keep_masters(model: Any) -> Any:
    """Hold all that is trained in float32, whatever the frozen weights are held in.

    A step of AdamW moves a weight by about the learning rate, and bfloat16 has no number between a
    weight and its 1/256th more: at 1e-4 all norms of a model and half its embeddings stay as they
    are, step after step. PEFT casts the matrices that it adds, not the layers it copies to train.
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.is_floating_point():
            weight.data = weight.data.float()
    return model
