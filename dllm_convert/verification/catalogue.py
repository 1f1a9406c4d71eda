"""Every probe there is: what it asks, and where the number it requires comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dllm_convert.verification.report import Probe


@dataclass(frozen=True)
class Entry:
    """A probe as it is documented.

    Attributes:
        asks: The question.
        origin: Where the tolerance comes from.
    """

    asks: str
    origin: str


_FORMAT = "the safetensors format and what its loaders accept; nothing is rounded"
_CLAIM = "the diffusion section of config.json; ids and flags are exact"
_ROUNDING = (
    "the family's adapter: float32 logits of equivalent passes; a larger difference is measured "
    "again in float64, where rounding vanishes and a fault does not"
)
_BYTES = "the conversion copies bytes; equal is equal"
_BYTES_MOVE = "under one mask a difference is the adapter's; 0 is none"
_ZERO = "a closed pair has weight exactly 0 in the softmax, so its derivative is exactly 0"
_STILL = (
    "1e-5 of the largest logit, about 80 float32 roundings; text and changed text run in one batch"
)
_BITS = "a closed pair has weight exactly 0: no more than equal rows of one batch differ, 0 bits"
_TYPE = (
    "4 times the largest difference that the type alone makes on the CPU, measured on these "
    "weights; at least the family's tolerance, at most half the largest logit"
)
_EXACT = "a token is exact"

CATALOGUE: Mapping[str, Entry] = {
    "config": Entry("do the fields other programs act on say what the claim says?", _CLAIM),
    "weights": Entry("is every tensor there, well shaped, ties kept, none foreign?", _FORMAT),
    "index": Entry("is the index complete and exact, and no other weight file there?", _FORMAT),
    "dtypes": Entry("are the matrices of the declared type?", "config.json; a type is exact"),
    "finite": Entry("is every value a finite number?", "no trained model needs NaN or infinity"),
    "hashes": Entry("is every file as the manifest recorded it?", "SHA-256; one bit is enough"),
    "mask-id": Entry("do claim, config, generation config and tokenizer name one mask?", _CLAIM),
    "mask-row": Entry(
        "does the mask's embedding row have a norm like other rows?",
        "the mean of n random rows has 1/sqrt(n) of their norm, 0.003 for 128,000; a row that was "
        "never written has nearly none (LLaDA2); 10 as at the start of training",
    ),
    "tokenizer": Entry("does the mask survive text to id to text, within the rows?", _CLAIM),
    "mask-text": Entry(
        "does any text produce the mask?",
        "a mask that text produces is both noise and data; no text may",
    ),
    "generation-config": Entry("does it denoise this checkpoint, and stop as the base?", _CLAIM),
    "text-end": Entry(
        "do training, template and prompts end a text where decoding does?",
        "a token is exact; nobody may end a text with another one",
    ),
    "special-tokens": Entry("is every token of the base what it was?", _BYTES),
    "chat-template": Entry("is the chat template the base's?", _BYTES),
    "portable": Entry("alone, with its own code, is it the same model?", _ROUNDING),
    "portable-stock": Entry("alone, without remote code and given the mask, too?", _ROUNDING),
    "portable-version": Entry(
        "does the code refuse a transformers that would run it causal?",
        "the adapter: the first release that honours is_causal",
    ),
    "attention-sdpa": Entry("which tokens move which positions, by perturbation?", _STILL),
    "attention-eager": Entry("the same with eager attention", _STILL),
    "attention-layers": Entry(
        "is every layer's pattern the claimed one?",
        "a closed pair has weight exactly 0 in the softmax",
    ),
    "attention-flex": Entry("the same with flex attention", _STILL),
    "gradient": Entry("which tokens do logits depend on, by differentiation?", _ZERO),
    "gradient-layers": Entry("the same for every attention module alone", _ZERO),
    "training-mask": Entry("does training's mask show noise only its past?", "a mask is exact"),
    "training-influence": Entry("does the model obey it, by perturbation?", _STILL),
    "packed": Entry("does training predict what decoding predicts, text by text?", _ROUNDING),
    "base-config": Entry("is every field the conversion does not mean to change kept?", _BYTES),
    "base-tensors": Entry("are the base's tensors there, byte for byte if untrained?", _BYTES),
    "base-logits": Entry(
        "under one causal mask, does every module of both put out the same bits?",
        "same weights, same operations, same bits; where the head has grown, a matrix product of "
        "another shape may add in another order: 1e-6 of the largest logit",
    ),
    "cache": Entry("block by block against all at once, the same logits?", _ROUNDING),
    "cache-clean": Entry("does denoising leave the cache alone?", "states are compared by bits"),
    "padding-left": Entry("does padding on the left change nothing?", _ROUNDING),
    "padding-right": Entry("does padding on the right change nothing?", _ROUNDING),
    "batch": Entry("do neighbours in the batch and their order change nothing?", _ROUNDING),
    "implementations": Entry(
        "given the same input, does every layer agree in sdpa, eager and flex attention?",
        "1e-5 of the largest output, about 80 float32 roundings; by layer, because deep models "
        "magnify the rounding of the first layers",
    ),
    "generate": Entry("is everything written, and the prompt unchanged?", _EXACT),
    "generate-end": Entry("does a row stop at its end of text?", _EXACT),
    "generate-batch": Entry(
        "does a batch of different lengths equal one by one?",
        "greedy tokens are exact; a tie that rounding turns is decoded again in float64",
    ),
    "quality": Entry(
        "is the held-out bound below what it was before training?",
        "the run's own measurement, same text and same noise before and after",
    ),
    "block-one": Entry(
        "is block diffusion with blocks of one the autoregressive likelihood?",
        "they are one number (BD3LM, section 3); 1e-5 nats is about ten float32 roundings",
    ),
    "token-shift": Entry(
        "are predictions read at the position that was trained?",
        "the recipe; without one, three standard errors of the difference",
    ),
}
"""In the order in which they run."""

VERIFIED: Mapping[str, Entry] = {
    "lossless": Entry(
        "does lossless decoding write what one causal forward for each token writes?",
        "greedy tokens are exact; a tie that rounding turns is decoded again in float64",
    ),
    "device-lossless": Entry(
        "there, is every token of it the likeliest of one causal forward, or as good as?",
        "twice what two passes may differ by: each of the two logits may have moved by that",
    ),
}
"""Of a model that holds a verifier: a gated adapter's base, or weights trained to go on."""

GATED: Mapping[str, Entry] = {
    "gated-base": Entry(
        "where nothing is noisy, does it put out the bits of the stock class?",
        "the same weights and operations: same bits",
    ),
    "gated-adapter": Entry("does the adapter move every noisy position?", _BYTES_MOVE),
    "gated-clean": Entry(
        "is every clean position what it is without the noise behind it?",
        "rows of one batch with other noise: same bits; alone, the family's rounding",
    ),
    "gated-attention": Entry("who sees whom with a block noisy, by perturbation?", _STILL),
}
"""Run besides, before those of the base, where a model is gated."""

BEHIND: Mapping[str, Entry] = {
    "behind-cache": Entry(
        "behind its cache and copies of it, are clean tokens and noisy ones those of the whole "
        "text?",
        _ROUNDING,
    ),
    "behind-copy": Entry("do noisy rows leave the base's cache alone?", "states compared by bits"),
    "behind-training": Entry(
        "does training predict what decoding predicts, text by text?", _ROUNDING
    ),
}
"""Instead of probes of masks, where noisy tokens stand behind a copy of the base's cache."""

DEVICE: Mapping[str, Entry] = {
    "device-logits": Entry("does the device compute the same model?", _TYPE),
    "device-attention": Entry("which closed pairs move there, by perturbation?", _BITS),
    "device-gradient": Entry("which tokens do logits depend on there?", _ZERO),
    "device-training": Entry(
        "which closed pairs move in the forward and the attention that train there?", _BITS
    ),
    "device-training-gradient": Entry("which tokens does that forward depend on?", _ZERO),
    "device-cache": Entry("there, block by block against all at once, the same logits?", _TYPE),
    "device-cache-clean": Entry(
        "there, does denoising leave the cache alone?", "states are compared by bits"
    ),
    "device-padding-left": Entry("there, does padding on the left change nothing?", _TYPE),
    "device-padding-right": Entry("there, does padding on the right change nothing?", _TYPE),
    "device-batch": Entry("there, do neighbours in the batch change nothing?", _TYPE),
    "device-generate": Entry("there, is everything written, the prompt unchanged?", _EXACT),
    "device-generate-end": Entry("there, does a row stop at its end of text?", _EXACT),
}
"""Run besides, where a checkpoint will be used on another device than the CPU or in another type
than float32; in the order in which they run, after all others."""

THIRD_PARTY: Mapping[str, Entry] = {
    "claim": Entry("what does the checkpoint say it is, and do all places agree?", _CLAIM),
    "own-code-attention": Entry("which tokens move which positions in its own code?", _STILL),
    "own-code-logits": Entry("does its own code compute what our class does?", _ROUNDING),
}
"""Probes of checkpoints that another project wrote; see docs/third-party.md."""


def with_origin(probe: Probe) -> Probe:
    """Return the probe with the origin of its tolerance."""
    every = {**CATALOGUE, **VERIFIED, **GATED, **BEHIND, **DEVICE, **THIRD_PARTY}
    entry = every.get(probe.name)
    return replace(probe, origin=entry.origin) if entry else probe
