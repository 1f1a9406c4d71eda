"""Load a checkpoint as a stranger would: run by path in a process that knows no dllm_convert.

Arguments: folder, auto class, file of inputs, file of outputs (both safetensors), `own-code` or
`stock`: whether the folder's code may run. Prints one JSON object. Imported by nothing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

# Whatever is installed beside this Python, the checkpoint has to do without the package.
sys.modules["dllm_convert"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@torch.no_grad()
def _load_and_run(
    folder: str, auto_class: str, inputs: dict[str, torch.Tensor], *, remote_code: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    model, info = getattr(transformers, auto_class).from_pretrained(
        folder,
        trust_remote_code=remote_code,
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
    )
    # The diffusion class makes block masks itself; the stock class is told by its caller.
    given = inputs if not remote_code else {"input_ids": inputs["input_ids"]}
    logits = model.eval()(**given).logits
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }
    if remote_code:
        facts |= _refusal(sys.modules[type(model).__module__])
    return facts, logits


def _refusal(code: Any) -> dict[str, Any]:
    """Run the checkpoint's code once more, under the transformers before the one it asks for.

    A transformers that ignores `is_causal` loads the model causal without a word, so the code has
    to refuse it when it is imported.
    """
    minimum = getattr(code, "MIN_TRANSFORMERS", None)
    older = _older(str(minimum))
    # In the same package: it imports the files beside it.
    name = f"{code.__package__}.under_older_transformers"
    spec = importlib.util.spec_from_file_location(name, str(code.__file__))
    if spec is None or spec.loader is None:
        return {"minimum": minimum, "older": older, "refusal": ""}
    # What `import transformers` finds; importing a part of it may have put another object there.
    found: Any = sys.modules["transformers"]
    present = found.__version__
    found.__version__ = older
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        return {"minimum": minimum, "older": older, "refusal": str(error)}
    finally:
        found.__version__ = present
    return {"minimum": minimum, "older": older, "refusal": ""}


def _older(version: str) -> str:
    """Return a release before `version`; 5.1.9 for anything that is no version."""
    parts = [int(part) for part in version.split(".") if part.isdecimal()][:2]
    if len(parts) < 2 or parts == [0, 0]:
        return "5.1.9"
    major, minor = parts
    return f"{major}.{minor - 1}.9" if minor else f"{major - 1}.99.9"


def main(folder: str, auto_class: str, input_file: str, output_file: str, code: str) -> None:
    """Load with (if it may run) and without the checkpoint's own code, write logits and facts."""
    inputs = load_file(input_file)
    outputs: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {"transformers": transformers.__version__}
    loads = (("remote", True), ("stock", False)) if code == "own-code" else (("stock", False),)
    for name, remote_code in loads:
        facts[name], logits = _load_and_run(folder, auto_class, inputs, remote_code=remote_code)
        outputs[name] = logits.contiguous()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    facts["mask_token_id"] = tokenizer.mask_token_id
    save_file(outputs, output_file)
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
