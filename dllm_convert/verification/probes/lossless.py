"""Lossless decoding: is what it writes what the clean stream alone would write?"""

from __future__ import annotations

from typing import Any

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


@torch.no_grad()
def check_near(subject: Subject, rounding: float) -> list[Probe]:
    """Return the probe `lossless` where types round: every token is the likeliest, or as good as.

    A forward of several tokens rounds otherwise than one of the whole text: a token whose logit
    both may have moved by `rounding` is another one only by more than twice that.

    Args:
        subject: The checkpoint, where it is looked at.
        rounding: By how much two passes over the same text may differ in a logit.
    """
    new = min(NEW_TOKENS, subject.context - 2)
    if new < 2:
        return [skipped("lossless", "0", f"a context of {subject.context} tokens has no room")]
    prompts, mask = ragged_prompts(subject, min(13, subject.context - new))
    output = _written(subject, prompts, mask, new)
    short = []
    for row, written in enumerate(output.sequences[:, prompts.shape[1] :]):
        text = torch.cat([prompts[row][mask[row].bool()], written])[None]
        logits = _causal_logits(subject, text)[-new - 1 : -1].float()
        short.append(logits.amax(-1) - logits.gather(1, written[:, None]).squeeze(1))
    gaps = torch.stack(short)  # (rows, new)
    # Not-a-number is wrong everywhere.
    wrong, count = int((~(gaps <= 2 * rounding)).sum()), gaps.numel()
    equal = int((gaps == 0).sum())
    return [
        Probe(
            "lossless",
            none_wrong(wrong, count),
            f"{wrong} of {count} tokens are others, {equal} are the likeliest, "
            f"{new / output.forwards:.2f} per forward",
            f"0 further than {2 * rounding:.2g} from the likeliest of one forward over the text",
        )
    ]


def _written(subject: Subject, prompts: torch.Tensor, mask: torch.Tensor, new: int) -> Any:
    """Decode losslessly and greedily, without an end."""
    return subject.model.generate(
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


def _wrong(
    subject: Subject, prompts: torch.Tensor, mask: torch.Tensor, new: int
) -> tuple[int, int]:
    """Count tokens that differ, and the forwards that wrote them."""
    output, wrong = _written(subject, prompts, mask, new), 0
    for row, written in enumerate(output.sequences[:, prompts.shape[1] :]):
        text = prompts[row][mask[row].bool()][None]
        for token in written.tolist():
            wrong += int(_next(subject, text)) != token
            text = torch.cat([text, text.new_tensor([[token]])], 1)
    return wrong, output.forwards


@torch.no_grad()
def _next(subject: Subject, text: torch.Tensor) -> torch.Tensor:
    """The likeliest token behind a text (1, length), read causally, the mask ruled out."""
    return _causal_logits(subject, text)[-1].argmax()


def _causal_logits(subject: Subject, text: torch.Tensor) -> torch.Tensor:
    """Logits of a text (1, length), read causally without a cache, the mask ruled out.

    Shape (length, vocab).
    """
    length, causal = text.shape[1], None
    if subject.claim.behind == "mask":
        causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=text.device).tril()
    logits: torch.Tensor = subject.model(text, attention_mask=causal, use_cache=False).logits[0]
    mask = subject.claim.mask_token_id
    logits[:, mask : mask + 1] = -torch.inf
    return logits
