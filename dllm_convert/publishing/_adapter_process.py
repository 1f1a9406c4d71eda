"""Put base and adapter together as a stranger would, in a process that knows no dllm_convert.

Arguments: adapter folder, base folder, merged checkpoint, name of the diffusion class. Prints the
largest difference of the logits. Imported by nothing.
"""

from __future__ import annotations

import sys
from typing import Any

sys.modules["dllm_convert"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoConfig, AutoTokenizer  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402

LENGTH = 48


@torch.no_grad()
def main(adapter: str, base: str, merged: str, class_name: str) -> None:
    """Load both, compare their logits on the same tokens."""
    model_class: Any = get_class_from_dynamic_module(f"modeling_dllm.{class_name}", adapter)
    config = AutoConfig.from_pretrained(adapter, trust_remote_code=False)
    if getattr(config, "diffusion", {}).get("acts_on") == "noisy":
        sys.stdout.write(f"{_gated(model_class, config, adapter, base, merged)}\n")
        return
    rows, tied = config.vocab_size, config.tie_word_embeddings
    config.vocab_size = AutoConfig.from_pretrained(base, trust_remote_code=False).vocab_size
    model, info = model_class.from_pretrained(
        base, config=config, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        sys.exit(f"the base would load at random: it has no {min(info['missing_keys'])}")
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(tokenizer), (1, LENGTH), generator=generator)
    tokens[:, 1::3] = tokenizer.mask_token_id
    whole = model_class.from_pretrained(merged, dtype=torch.float32).eval()
    difference = (model(tokens).logits - whole(tokens).logits).abs().max()
    sys.stdout.write(f"{float(difference)}\n")


def _gated(model_class: Any, config: Any, adapter: str, base: str, whole: str) -> float:
    """Compare a gated adapter on its base with the folder of both, half of a text noisy."""
    models = [
        model_class.from_pretrained(base, config=config, adapter=adapter, dtype=torch.float32),
        model_class.from_pretrained(whole, dtype=torch.float32),
    ]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, LENGTH), generator=generator)
    noisy = (torch.arange(LENGTH) >= LENGTH // 2)[None]
    tokens[:, LENGTH // 2 :: 3] = config.mask_token_id
    one, other = (model.eval()(tokens, noisy=noisy).logits for model in models)
    return float((one - other).abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])
