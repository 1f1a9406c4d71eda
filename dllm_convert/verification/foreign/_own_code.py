"""Run a checkpoint's own modelling code on given texts: by path, in a process without secrets.

Arguments: folder, auto class, form of the block mask (none, 3d, 4d), file of inputs and file of
outputs (both safetensors). Prints one JSON object. Imported by nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

sys.modules["dllm_convert"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

TOKENS_AT_ONCE = 512


def _arguments(mask: torch.Tensor, form: str, rows: int) -> dict[str, torch.Tensor]:
    if form == "none":
        return {}
    mask = mask.expand(rows, *mask.shape)
    return {"attention_mask": mask if form == "3d" else mask[:, None]}


@torch.no_grad()
def _influence(
    model: Any, texts: torch.Tensor, mask: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far each changed text moves each position, (length, changed), and the logits."""
    length = texts.shape[1]
    per_chunk = max(1, TOKENS_AT_ONCE // length - 1)
    moved: list[torch.Tensor] = []
    for chunk in torch.split(texts[1:], per_chunk):
        # The unchanged text rides along: inside one batch, equal rows are equal to the bit.
        rows = torch.cat([texts[:1], chunk])
        logits = model(input_ids=rows, **_arguments(mask, form, len(rows))).logits.float()
        moved.append((logits[1:] - logits[0]).abs().amax(-1).T)
    return torch.cat(moved, dim=1), logits[0]


def main(folder: str, auto_class: str, form: str, input_file: str, output_file: str) -> None:
    """Load with the checkpoint's own code, run it, write movements, logits and facts."""
    inputs = load_file(input_file)
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder,
            trust_remote_code=True,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) or "not found in your environ" in str(error)
        if not absent:
            raise
        sys.stdout.write(json.dumps({"absent": str(error).splitlines()[0]}) + "\n")
        return
    moved, logits = _influence(model.eval(), inputs["texts"], inputs["mask"], form)
    save_file({"moved": moved.contiguous(), "logits": logits.contiguous()}, output_file)
    facts = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "transformers": transformers.__version__,
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
