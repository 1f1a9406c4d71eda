"""Where a text ends: do training, template, prompts and decoding mean the same tokens?"""

from __future__ import annotations

from typing import Any

from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.modeling.text_bounds import bounds_of, end_token, open_ids, stated_ids
from dllm_convert.source.chat_turns import read_template, turn_end
from dllm_convert.verification.probes.generation_config import read_generation_config
from dllm_convert.verification.report import Probe, first_items, skipped
from dllm_convert.verification.subject import Subject
from dllm_convert.weights.tokenizer import SAMPLES

NAME, REQUIRED = "text-end", "0"


def check_text_end(subject: Subject, tokenizer: Any) -> Probe:
    """Return the probe `text-end`.

    A model that was taught to end its texts with a token decoding does not know goes on for ever;
    a prompt that is closed is one that decoding writes behind the end of.
    """
    if subject.foreign is not None:
        return skipped(NAME, REQUIRED, "how another project ended its texts is not recorded")
    generation = read_generation_config(subject.folder)
    try:
        ends = read_ids(generation.get("eos_token_id"))
        closing = read_ids(generation.get("closing_token_ids"), "closing_token_ids")
    except ValueError as error:
        return Probe(NAME, False, "not readable", REQUIRED, str(error))
    wrong = _ends(subject, tokenizer, ends) | _bounds(tokenizer, ends, closing)
    named = ", ".join(map(str, ends)) or "no token"
    measured = f"{len(wrong)} places disagree, {named} {'end' if len(ends) > 1 else 'ends'} a text"
    return Probe(NAME, not wrong, measured, REQUIRED, first_items(wrong))


def _ends(subject: Subject, tokenizer: Any, ends: tuple[int, ...]) -> dict[str, str]:
    """Return who ends a text with a token at which decoding does not end."""
    template = read_template(subject.folder)
    turn = None
    if template is not None:
        named = {role: text for role, text in tokenizer.special_tokens_map.items() if text}
        added = tokenizer.added_tokens_decoder.values()
        text = turn_end(template, named, [token.content for token in added if token.special])
        turn = None if text is None else int(tokenizer.convert_tokens_to_ids(text))
    means = {"training": end_token(tokenizer), "the chat template": turn}
    if subject.against is not None:
        base = read_generation_config(subject.against)
        stated = stated_ids("eos", {}, base)
        means |= {f"the base's generation config ({token})": token for token in stated}
    return {
        who: f"ends with {token}, at which decoding goes on"
        for who, token in means.items()
        if token is not None and token not in ends
    }


def _bounds(tokenizer: Any, ends: tuple[int, ...], closing: tuple[int, ...]) -> dict[str, str]:
    """Return what is wrong with the beginning and the end of a text and of a prompt."""
    bounds = bounds_of(tokenizer)
    wrong = {}
    if bounds.closing != closing:
        wrong["closing_token_ids"] = (
            f"is {list(closing)}, texts are closed by {list(bounds.closing)}"
        )
    ids = open_ids(tokenizer, SAMPLES[0])
    plain = list(tokenizer(SAMPLES[0], add_special_tokens=False)["input_ids"])
    if ids != [*bounds.begin, *plain]:
        wrong["a prompt"] = "is not begun once and left open"
    if set(plain) & set(ends):
        wrong["prose"] = "holds a token that ends a text"
    return wrong
