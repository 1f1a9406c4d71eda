"""Proof by llama.cpp: it computes our logits, writes our tokens and cuts text as we do."""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dllm_convert.diffusion.attention import CLEAN, StreamMask
from dllm_convert.errors import DataError, VerificationError
from dllm_convert.modeling.denoising import denoised
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.serving.gguf_model import LlamaCppModel, load_gguf
from dllm_convert.serving.llama_cpp import PACKAGE, LlamaCpp
from dllm_convert.serving.proof import THRESHOLDS, TOLERANCE, Proof
from dllm_convert.weights.tokenizer import SAMPLES

KL_BOUNDS = {
    **{"F16": 0.02, "BF16": 0.05, "Q8_0": 0.2},
    **{"Q6_K": 0.5, "Q5_K_M": 0.7, "Q4_K_M": 1.0, "Q4_0": 1.5},
}
"""Largest mean divergence, in nats, of matrices in fewer bits: above it, something else differs. Of
SmolLM2 that nobody trained, which is worse than trained, it was 0.002, 0.011 and 0.073."""
_LAST_BIT = 2.0**-23
"""What a float32 is rounded by, relative to it."""
_ROUNDINGS = 10
"""How often as much as one rounding of the embeddings moves the logits, all others may. Of SmolLM2
that nobody trained it was 3 at the most."""
_NEW_TOKENS = 21
_SHARE = 0.5
"""Of the tokens that are masked where logits are compared."""
_TEXT_TOKENS = 256
_THREADS = 1


@dataclass(frozen=True)
class Closeness:
    """How near a file with fewer bits is to the conversion, at masked tokens of held-out text.

    Attributes:
        engine: Name and version of who ran it.
        divergence: Mean of KL(ours || the file's), nats.
        agreement: Share of tokens whose likeliest token is ours.
        positions: Tokens that were masked.
        bound: Largest divergence that passes.
    """

    engine: str
    divergence: float
    agreement: float
    positions: int
    bound: float

    @property
    def passed(self) -> bool:
        """Whether what differs can be rounding."""
        return self.divergence <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self) | {"passed": self.passed}

    def in_words(self) -> str:
        """Return the result in a line."""
        return (
            f"KL {self.divergence:.2g} nats from the conversion in float32 (bound {self.bound:g}), "
            f"the likeliest token is the same at {self.agreement:.1%} of {self.positions} masked "
            "tokens of held-out text"
        )


def prove_by_llama_cpp(
    folder: Path, path: Path, kind: str, texts: Sequence[str]
) -> Proof | Closeness:
    """Compare llama.cpp's logits and text with ours.

    Args:
        folder: The conversion.
        path: The file.
        kind: Type of its matrices.
        texts: Held-out text.

    Returns:
        A proof of float32 matrices, of others how near they are.

    Raises:
        DataError: There is no text.
        VerificationError: llama.cpp reads another model, or another text.
    """
    loaded = load_checkpoint(folder, device="cpu", dtype="float32")
    theirs = load_gguf(path, _THREADS).model
    version = importlib.metadata.version(PACKAGE)
    engine = f"llama.cpp ({PACKAGE} {version})"
    _same_tokens(loaded.tokenizer, theirs.engine, (*SAMPLES, *texts))
    encoded = [loaded.tokenizer(text)["input_ids"][:_TEXT_TOKENS] for text in texts]
    encoded = [ids for ids in encoded if len(ids) > 1]
    if not encoded:
        raise DataError("there is no text to compare on", hint="Give some with --data FILE")
    found: Proof | Closeness
    if kind == "F32":
        found = exact = _exact(loaded.model, theirs, engine, encoded)
        passed = exact.difference <= exact.tolerance and exact.equal == exact.decoded > 0
    else:
        found = near = _near(loaded.model, theirs, engine, KL_BOUNDS[kind], encoded)
        passed = near.passed
    if not passed:
        raise VerificationError(
            f"{engine} reads another model: {found.in_words()}",
            hint="Nothing was written. Report it, with the versions of both",
        )
    return found


def _same_tokens(tokenizer: Any, engine: LlamaCpp, texts: Sequence[str]) -> None:
    """Compare how text is cut.

    Raises:
        VerificationError: llama.cpp makes other tokens of a text.
    """
    for text in texts:
        # llama.cpp takes characters as they come, and tokenizers that compose them do it first;
        # what it makes of spaces before a text is another thing, see `gguf_tokens.py`.
        composed = unicodedata.normalize("NFC", text).lstrip()
        ours, theirs = tokenizer(composed)["input_ids"], engine.tokenize(composed)
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            shared = min(len(ours), len(theirs))
            place = next((number for number, (one, two) in pairs if one != two), shared)
            said = tokenizer.decode(ours[max(0, place - 5) : place + 5])
            raise VerificationError(
                f"llama.cpp cuts text otherwise: from token {place} on, at {said!r}",
                hint="Nothing was written. Report it, with the tokenizer's name",
            )


def _exact(
    model: Any, theirs: LlamaCppModel, engine: str, encoded: Sequence[Sequence[int]]
) -> Proof:
    """Compare logits and decoded tokens of three prompts, aligned with blocks and not."""
    size, draw = getattr(model.config, "block_size", None) or 4, torch.Generator().manual_seed(0)
    lengths = (2 * size, 2 * size + max(1, size * 3 // 4), max(1, size - 1))
    prompts = [
        torch.tensor(list(islice(cycle(ids), length)))
        for ids, length in zip(cycle(encoded), lengths, strict=False)
    ]
    difference, rounding, equal, decoded, texts = 0.0, 0.0, 0, 0, 0
    for ids in prompts:
        noisy, places = _masked(ids, model.config.mask_token_id, draw), torch.arange(len(ids))
        one, other = _logits_of(model, ids, noisy), _logits_by(theirs, ids, noisy, places)
        difference = max(difference, float((one - other).abs().max()))
        with _rounded_once_more(model, draw):
            rounding = max(rounding, float((one - _logits_of(model, ids, noisy)).abs().max()))
    bound = max(TOLERANCE, _ROUNDINGS * rounding)
    # Of another model the text says nothing more.
    for threshold in THRESHOLDS if difference <= bound else ():
        mine, written = (_texts(one, prompts, threshold) for one in (model, theirs))
        decoded += mine.numel()
        equal += int((mine == written).sum())
        texts += len(prompts)
    planned = len(prompts) * len(THRESHOLDS)
    return Proof(engine, difference, bound, texts, planned, decoded, equal)


@contextmanager
def _rounded_once_more(model: Any, draw: torch.Generator) -> Iterator[None]:
    """Have a model's embeddings rounded up or down while the block runs: what that moves is noise.

    A model that is not trained yet makes much of it.
    """

    def rounded(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + _LAST_BIT * torch.randn(output.shape, generator=draw))

    hook = model.get_input_embeddings().register_forward_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


def _texts(model: Any, prompts: Sequence[torch.Tensor], threshold: float) -> torch.Tensor:
    """Return the tokens that a model writes behind prompts, (prompts, new), all in one batch."""
    width = max(map(len, prompts))
    ids, seen = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], seen[row, : len(prompt)] = prompt, 1
    written: torch.Tensor = model.generate(
        ids,
        attention_mask=seen,
        max_new_tokens=_NEW_TOKENS,
        confidence_threshold=threshold,
        eos_token_id=None,
        **denoised(model),
    )
    return written[:, width:]


def _near(
    model: Any, theirs: LlamaCppModel, engine: str, bound: float, encoded: Sequence[Sequence[int]]
) -> Closeness:
    """Compare distributions at masked tokens of texts."""
    mask, draw = model.config.mask_token_id, torch.Generator().manual_seed(0)
    shift = int(bool(model.config.diffusion["token_shift"]))
    total, same, count = 0.0, 0, 0
    for text in encoded:
        ids = torch.tensor(text)
        noisy = _masked(ids, mask, draw)
        at = (noisy == mask).nonzero().squeeze(-1) - shift
        parts = []
        for logits in (_logits_of(model, ids, noisy)[at], _logits_by(theirs, ids, noisy, at)):
            logits[:, mask] = -torch.inf  # it is never written
            parts.append(logits.log_softmax(-1))
        one, other = parts
        each = (one.exp() * (one - other)).nan_to_num(nan=0.0)  # 0 * inf at the mask
        total += float(each.sum())
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        count += len(at)
    return Closeness(engine, total / count, same / count, count, bound)


def _masked(ids: torch.Tensor, mask: int, draw: torch.Generator) -> torch.Tensor:
    """Return tokens (length,) of which some are masked; the first has nothing before it."""
    hit = torch.rand(ids.shape, generator=draw) < _SHARE
    hit[0] = False
    return ids.masked_fill(hit, mask)


@torch.no_grad()
def _logits_of(model: Any, ids: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Return our logits at every place of a noisy text (length,), each block behind clean ones."""
    size = getattr(model.config, "block_size", None)
    if not size:
        whole: torch.Tensor = model(noisy[None], use_cache=False).logits[0]
        return whole.float()
    places = torch.arange(len(ids))
    # The noisy text, then the clean one: (1, 2 * length).
    both = torch.cat([places, places])[None]
    sees = StreamMask(
        streams=torch.cat([torch.ones_like(places), torch.full_like(places, CLEAN)])[None],
        blocks=both // size,
        segments=torch.zeros_like(both),
        positions=both,
        causal_clean=model.config.diffusion.get("context") == "causal",
    )
    logits: torch.Tensor = model(
        torch.cat([noisy, ids])[None],
        attention_mask=sees.dense(),
        position_ids=both,
        use_cache=False,
    ).logits[0, : len(ids)]
    return logits.float()


def _logits_by(
    theirs: LlamaCppModel, ids: torch.Tensor, noisy: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Return llama.cpp's logits at places (n,) of a noisy text (length,), rising."""
    size = getattr(theirs.config, "block_size", None) or len(ids)
    causal = theirs.config.diffusion.get("context") == "causal"
    cache, parts = theirs.engine.cache(len(ids), size), []
    for first in range(0, len(ids), size):
        part, here = noisy[first : first + size], at[at // size == first // size] - first
        parts.append(torch.from_numpy(cache.run(0, part.tolist(), first, here.tolist())))
        cache.forget(0, first)
        cache.run(0, ids[first : first + size].tolist(), first, causal=causal)
    return torch.cat(parts)
