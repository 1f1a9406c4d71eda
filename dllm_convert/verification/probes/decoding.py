"""Decoding: it ends, it leaves no mask, it repeats the prompt, and neighbours change nothing."""

from __future__ import annotations

from typing import Any

import torch

from dllm_convert.modeling.denoising import denoised
from dllm_convert.verification.report import Probe, first_items, none_wrong, skipped
from dllm_convert.verification.subject import SEED, Subject

STEPS = 2
"""Denoising steps per block: enough to commit in turns, few enough to be quick."""


def check_generate(subject: Subject, *, others: bool = True) -> list[Probe]:
    """Return the probes `generate`, `generate-end` and `generate-batch`.

    A left-padded batch of two prompts of different lengths, which end inside a block; written is
    from inside one block, over its end, to inside the next.

    Args:
        subject: The checkpoint.
        others: Whether a row is held to what it is in other batches, too. Those are other matrix
            products, whose rounding may turn a tie of two tokens; float64 tells that from a fault.
    """
    size = subject.claim.block_size or 8
    new = min(size, 48)
    width = min(size + max(size // 4, 2), 96, subject.context - new)
    if width < 2:
        reason = f"a context of {subject.context} tokens has no room for a prompt and a block"
        names = ("generate", "generate-end", *(["generate-batch"] if others else []))
        return [skipped(name, "0 wrong", reason) for name in names]
    prompts, mask = ragged_prompts(subject, width)
    output = _generate(subject, prompts, mask, new)
    return [
        _whole(subject, prompts, output, new),
        _end(subject, prompts, mask, output, others=others),
        *([_one_by_one(subject, prompts, mask, output)] if others else []),
    ]


def ragged_prompts(subject: Subject, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two prompts (2, width), the second half as long and padded on the left; the mask."""
    prompts = subject.tokens(2, width)
    mask = torch.ones_like(prompts)
    mask[1, : width // 2] = 0
    return prompts, mask


def _generate(
    subject: Subject, prompts: torch.Tensor, mask: torch.Tensor, new: int, **settings: Any
) -> torch.Tensor:
    """Denoise greedily; without an end unless one is given."""
    output: torch.Tensor = subject.model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=new,
        max_denoising_steps=STEPS,
        confidence_threshold=None,
        temperature=0.0,
        **{"seed": SEED, "eos_token_id": [], **denoised(subject.model), **settings},
    )
    return output


def _whole(subject: Subject, prompts: torch.Tensor, output: torch.Tensor, new: int) -> Probe:
    width = prompts.shape[1]
    wrong: list[str] = []
    if tuple(output.shape) != (len(prompts), width + new):
        wrong.append(f"the output has shape {tuple(output.shape)}")
    if not torch.equal(output[:, :width], prompts):
        wrong.append("the prompt came back changed")
    left = int((output[:, width:] == subject.claim.mask_token_id).sum())
    if left:
        wrong.append(f"{left} positions are still masked")
    return Probe(
        "generate",
        not wrong,
        f"{output.shape[1] - width} new tokens, {left} masked",
        f"{new}, 0, prompt unchanged",
        first_items(wrong),
    )


def _end(
    subject: Subject,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    output: torch.Tensor,
    *,
    others: bool,
) -> Probe:
    """Call a token that was written the end of the text: the row has to stop right there.

    Where it stops the batch becomes smaller, so the other row is only held to what it was where
    `others` says so.
    """
    width = prompts.shape[1]
    written = output[:, width:]
    end = int(written[0, written.shape[1] // 2])
    pad = int(subject.other_tokens(torch.tensor([end]))[0])
    found = _generate(
        subject, prompts, mask, written.shape[1], eos_token_id=[end], pad_token_id=pad
    )[:, width:]
    expected = written.clone()
    for row in expected:
        places = (row == end).nonzero().flatten()
        if len(places):
            row[int(places[0]) + 1 :] = pad
    same = found.shape == expected.shape
    wrong = (found != expected).sum(-1).tolist() if same else ["all"]
    passed = same and not any(wrong if others else wrong[:1])
    return Probe(
        "generate-end",
        passed,
        f"{wrong[0]} tokens of the row that ends differ, {wrong[-1]} of the other",
        "0, 0" if others else "0 of the row that ends",
        "" if passed else f"token {end} should end a row, padding follow",
    )


def _one_by_one(
    subject: Subject, prompts: torch.Tensor, mask: torch.Tensor, output: torch.Tensor
) -> Probe:
    """Decode each prompt alone and unpadded.

    Rounding may turn a tie of two tokens: what differs in float32 is decoded again in float64.
    """
    differ = _differing(subject, prompts, mask, output)
    detail = ""
    if differ:
        with subject.float64():
            again = _generate(subject, prompts, mask, output.shape[1] - prompts.shape[1])
            detail = f"in float64; rounding included, {differ} in float32"
            differ = _differing(subject, prompts, mask, again)
    count = output[:, prompts.shape[1] :].numel()
    return Probe(
        "generate-batch",
        none_wrong(differ, count),
        f"{differ} of {count} tokens differ",
        "0",
        detail,
    )


def _differing(
    subject: Subject, prompts: torch.Tensor, mask: torch.Tensor, output: torch.Tensor
) -> int:
    width = prompts.shape[1]
    new = output.shape[1] - width
    differ = 0
    for row, prompt in enumerate(prompts):
        text = prompt[mask[row].bool()][None]
        alone = _generate(subject, text, torch.ones_like(text), new, seed=SEED + row)
        differ += int((alone[0, text.shape[1] :] != output[row, width:]).sum())
    return differ
