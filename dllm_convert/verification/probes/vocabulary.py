"""The vocabulary: no text produces the mask, and all the rest is the base's."""

from __future__ import annotations

from typing import Any

from dllm_convert.source.tokenizer_files import KEPT_ROLES
from dllm_convert.source.tokenizer_loading import load_tokenizer
from dllm_convert.verification.report import Probe, first_items, none_wrong, skipped
from dllm_convert.verification.subject import Subject
from dllm_convert.weights.tokenizer import SAMPLES


def check_text(subject: Subject, tokenizer: Any) -> Probe:
    """Return the probe `mask-text`: which texts are encoded with the mask's id?

    Tried are the text of every other token, some prose and code, and the mask's own text read as
    plain text: an ordinary token that was made the mask would show.
    """
    mask, text = subject.claim.mask_token_id, tokenizer.mask_token or ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return skipped("mask-text", "0", "not a tokenizer of the tokenizers library")
    pieces = backend.decode_batch([[token] for token in range(len(tokenizer)) if token != mask])
    texts = [*SAMPLES, *{piece for piece in pieces if piece and piece != text}]
    encoded = backend.encode_batch(texts, add_special_tokens=False)
    wrong = [repr(t) for t, found in zip(texts, encoded, strict=True) if mask in found.ids]
    spelled = {text, text.strip(), f" {text.strip()}"} - {""}
    for spelling in sorted(spelled):
        ids = tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if mask in ids:
            wrong.append(f"{spelling!r}, read as plain text,")
    return Probe(
        "mask-text",
        not wrong,
        f"{len(wrong)} of {len(texts) + len(spelled)} texts hold the mask",
        "0",
        first_items(wrong),
    )


def check_vocabulary(subject: Subject, tokenizer: Any) -> list[Probe]:
    """Return the probes `special-tokens` and `chat-template`, which need the base."""
    names = ("special-tokens", "chat-template")
    if subject.against is None:
        reason = "no base to compare with: verify with --against SOURCE"
        return [skipped(name, "0 changed", reason) for name in names]
    base = load_tokenizer(subject.against)
    return [_special_tokens(tokenizer, base), _chat_template(tokenizer, base)]


def _special_tokens(tokenizer: Any, base: Any) -> Probe:
    wrong: dict[str, str] = {}
    for role in KEPT_ROLES:
        ours, theirs = (getattr(t, f"{role}_token_id", None) for t in (tokenizer, base))
        # A base without a padding token is given one of its own vocabulary: batches need it.
        named = role == "pad" and theirs is None and ours in base.get_vocab().values()
        if ours != theirs and not named:
            wrong[f"{role}_token"] = f"has id {ours}, the base's {theirs}"
    vocabulary = tokenizer.get_vocab()
    known = base.get_vocab()
    for token, number in known.items():
        if vocabulary.get(token) != number:
            wrong[repr(token)] = f"has id {vocabulary.get(token)}, the base's {number}"
    for token in set(base.all_special_tokens) - set(tokenizer.all_special_tokens):
        wrong[repr(token)] = "is special in the base only"
    for text in SAMPLES:
        if tokenizer(text)["input_ids"] != base(text)["input_ids"]:
            wrong[repr(text)] = "is encoded otherwise"
    return Probe(
        "special-tokens",
        none_wrong(len(wrong), len(known)),
        f"{len(wrong)} of {len(known)} tokens, {len(KEPT_ROLES)} roles and {len(SAMPLES)} texts "
        "changed",
        "0",
        first_items(wrong),
    )


def _chat_template(tokenizer: Any, base: Any) -> Probe:
    ours, theirs = tokenizer.chat_template, base.chat_template
    if not theirs:
        return skipped("chat-template", "the base's", "the base has none")
    return Probe(
        "chat-template",
        ours == theirs,
        "none" if not ours else "the same" if ours == theirs else "another",
        "the base's",
        "" if ours == theirs else "prompts would be laid out as the base never saw them",
    )
