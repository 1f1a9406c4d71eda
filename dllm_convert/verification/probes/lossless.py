"""Lossless decoding: is what it writes what the clean stream alone would write?"""

from __future__ import annotations

import torch

from dllm_convert.verification.probes.decoding import ragged_prompts
from dllm_convert.verification.report import Probe, none_wrong, skipped
from dllm_convert.verification.subject import SEED, Subject

NEW_TOKENS = 24


def has_verifier(subject: Subject) -> bool:
    """Whether clean tokens are read strictly causally, so that something can verify."""
    return subject.claim.is_gated or subject.claim.context == "causal"


def check_lossless(subject: Subject) -> list[Probe]:
    """Return the probe `lossless`: a batch of two prompts against one forward for each token.

    The reference is written out here, without a cache: verification must not trust the model's.
    Rounding may turn a tie of two tokens: what differs in float32 is decoded again in float64.
    """
    new = min(NEW_TOKENS, subject.context - 2)
    if new < 2:
        return [skipped("lossless", "0", f"a context of {subject.context} tokens has no room")]
    prompts, mask = ragged_prompts(subject, min(13, subject.context - new))
    wrong, forwards = _wrong(subject, prompts, mask, new)
    detail = ""
    if wrong:
        with subject.float64():
            detail = f"in float64; rounding included, {wrong} in float32"
            wrong, forwards = _wrong(subject, prompts, mask, new)
    count = len(prompts) * new
    return [
        Probe(
            "lossless",
            none_wrong(wrong, count),
            f"{wrong} of {count} tokens differ, {new / forwards:.2f} per forward",
            "0 from one forward for each token",
            detail,
        )
    ]


def _wrong(
    subject: Subject, prompts: torch.Tensor, mask: torch.Tensor, new: int
) -> tuple[int, int]:
    """Count tokens that differ, and the forwards that wrote them."""
    output = subject.model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=new,
        verify_with="base" if subject.claim.is_gated else "self",
        max_denoising_steps=None,
        confidence_threshold=None,
        temperature=0.0,
        seed=SEED,
        eos_token_id=[],
        suppress_tokens=[],
        return_dict_in_generate=True,
    )
    wrong = 0
    for row, written in enumerate(output.sequences[:, prompts.shape[1] :]):
        text = prompts[row][mask[row].bool()][None]
        for token in written.tolist():
            wrong += int(_next(subject, text)) != token
            text = torch.cat([text, text.new_tensor([[token]])], 1)
    return wrong, output.forwards


@torch.no_grad()
def _next(subject: Subject, text: torch.Tensor) -> torch.Tensor:
    """The likeliest token behind a text (1, length), read causally, the mask ruled out."""
    length = text.shape[1]
    causal = None
    if subject.claim.behind == "mask":
        causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    logits = subject.model(text, attention_mask=causal, use_cache=False).logits[0, -1]
    logits[subject.claim.mask_token_id :][:1] = -torch.inf
    likeliest: torch.Tensor = logits.argmax()
    return likeliest
