"""Proof by the engine's own code: its logits are ours, and it writes the tokens that we write."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_convert.errors import RequestError, VerificationError

TOLERANCE = 1e-4
"""Largest difference of float32 logits."""
THRESHOLDS = (1.0, 0.9, 0.5)
"""Of confidence: no token is above the first, so that one is written in every step."""
_NEW_TOKENS = 21
_LENGTHS = (8, 11, 3)
"""Prompts that end with a block, in its middle, and before the first has ended, for blocks of 4."""


@dataclass(frozen=True)
class Proof:
    """What an engine's own code made of an export.

    Attributes:
        engine: Its name and version.
        difference: Largest difference of logits at a prompt, in float32.
        decoded: Tokens that were decoded.
        equal: How many of them are ours.
        bound: Largest difference that passes.
    """

    engine: str
    difference: float
    decoded: int
    equal: int
    bound: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether it is the same model to the engine."""
        return self.difference <= self.bound and self.equal == self.decoded

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self) | {"passed": self.passed}

    def in_words(self) -> str:
        """Return the result in a line."""
        return (
            f"logits differ by at most {self.difference:.1e} (bound {self.bound:.2g}), "
            f"{self.equal} of {self.decoded} decoded tokens equal"
        )


Engine = Callable[[Path, Sequence[Sequence[int]], Sequence[float]], "Answers"]


@dataclass(frozen=True)
class Answers:
    """What an engine said of some prompts.

    Attributes:
        logits: Of each prompt, at every position, rows of the conversion's vocabulary.
        tokens: New tokens behind each prompt, for each threshold.
    """

    logits: Sequence[Any]
    tokens: Sequence[Sequence[Sequence[int]]]


def mlx_vlm(out: Path, prompts: Sequence[Sequence[int]], thresholds: Sequence[float]) -> Answers:
    """Ask mlx-vlm, on the CPU."""
    import numpy as np

    mx: Any = importlib.import_module("mlx.core")
    mx.set_default_device(mx.cpu)
    config_home: Any = importlib.import_module("mlx_vlm.models.llada2_moe.config")
    home: Any = importlib.import_module("mlx_vlm.models.llada2_moe.llada2_moe")
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config = config_home.ModelConfig.from_dict(raw)
    model = home.Model(config)
    weights: dict[str, Any] = {}
    for file in sorted(out.glob("*.safetensors")):
        weights |= mx.load(str(file))
    weights = {name: weight.astype(mx.float32) for name, weight in weights.items()}
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    language, block = model.language_model, raw["block_size"]
    logits = []
    for prompt in prompts:
        number = np.arange(len(prompt)) // block
        mask = mx.array((number[:, None] >= number[None])[None, None])
        logits.append(np.array(language(mx.array([list(prompt)]), mask=mask).logits[0]))

    def write(prompt: Sequence[int], threshold: float) -> list[int]:
        written = language.generate(
            mx.array([list(prompt)]),
            block_length=block,
            steps=block,
            gen_length=_NEW_TOKENS,
            threshold=threshold,
            temperature=0.0,
            eos_id=-1,
        )
        return list(np.array(written).reshape(-1).tolist())

    tokens = [[write(prompt, threshold) for prompt in prompts] for threshold in thresholds]
    return Answers(logits, tokens)


ENGINES: Mapping[str, tuple[str, str, Engine]] = {
    "llada2": ("mlx_vlm", "serve-mlx", mlx_vlm),
}
"""Layout to the package whose code proves it, the extra that installs it, and how it is asked."""


def require_engine(target: str) -> None:
    """Refuse a proof that cannot be made here.

    Raises:
        RequestError: The layout's engine has no code that runs here, or is not installed.
    """
    if target not in ENGINES:
        raise RequestError(
            f"no engine of {target} runs its code without a GPU and a server; the bytes are "
            "compared all the same",
            hint="Leave `prove` out",
            argument="prove",
        )
    package, extra, _ = ENGINES[target]
    if importlib.util.find_spec(package) is None:
        raise RequestError(
            f"{package}, whose code proves this layout, is not installed",
            hint=f"pip install 'dllm-convert[{extra}]'",
            argument="prove",
        )


def prove_by_engine(folder: Path, out: Path, target: str, *, mask: int, tokens: int) -> Proof:
    """Compare an engine's logits and text with ours.

    Args:
        folder: The conversion.
        out: The export.
        target: Its layout.
        mask: Row of the mask in the export.
        tokens: Ids that the tokenizer has; prompts are made of them.

    Raises:
        VerificationError: The engine reads another model.
    """
    import numpy as np
    import torch

    from dllm_convert.modeling.loading import load_checkpoint

    package, _, ask = ENGINES[target]
    loaded = load_checkpoint(folder, device="cpu", dtype="float32")
    model, own = loaded.model, int(loaded.config["mask_token_id"])
    draw = torch.Generator().manual_seed(0)
    usable = [row for row in range(tokens) if row not in (own, mask)]
    prompts = [
        [usable[i] for i in torch.randint(len(usable), (length,), generator=draw).tolist()]
        for length in _LENGTHS
    ]
    answers = ask(out, prompts, THRESHOLDS)
    difference, equal, decoded = 0.0, 0, 0
    for prompt, logits in zip(prompts, answers.logits, strict=True):
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].numpy()
        difference = max(difference, float(np.abs(logits[:, usable] - ours[:, usable]).max()))
    for threshold, texts in zip(THRESHOLDS, answers.tokens, strict=True):
        for prompt, written in zip(prompts, texts, strict=True):
            text = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=_NEW_TOKENS,
                max_denoising_steps=model.config.block_size,
                confidence_threshold=threshold,
                eos_token_id=None,
            )
            mine = text[0, len(prompt) :].tolist()
            decoded += len(mine)
            equal += sum(one == other for one, other in zip(mine, written, strict=False))
    version = importlib.import_module("importlib.metadata").version(package.replace("_", "-"))
    proof = Proof(f"{package} {version}", difference, decoded, equal)
    if not proof.passed:
        raise VerificationError(
            f"{proof.engine} reads another model: {proof.in_words()}",
            hint="Nothing was written. Report it, with the versions of both",
        )
    return proof
