"""Tokenizers and chat templates of every kind, by what they put around a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from factory import TOKENIZERS, make_config, make_model, make_source
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BEGIN, END, TURN = "<|begin|>", "<|end|>", "<|start|>"


def _wrapped(single: str) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        tokenizer = TOKENIZERS["llama"]()
        names = [name for name in (BEGIN, END, TURN) if name in single]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=f"{single} $B",
            special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
        )
        tokenizer.chat_template = None
        return tokenizer

    return make


WRAPPED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "begin and end": _wrapped(f"{BEGIN} $A {END}"),
    "end only": _wrapped(f"$A {END}"),
    "nothing": _wrapped("$A"),
    "two at both ends": _wrapped(f"{BEGIN} {TURN} $A {TURN} {END}"),
    "begin": _wrapped(f"{BEGIN} $A"),
    **{f"as {family}": TOKENIZERS[family] for family in ("bert", "roberta", "qwen2", "mistral")},
}
"""Name to a tokenizer that puts that around every text."""

CHATML = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|start|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
TEMPLATES: dict[str, tuple[str, str | None]] = {
    "chatml": (CHATML, TURN),
    "generation": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|end|>{% endgeneration %}{% else %}[{{ m.content | trim }}]{% endif %}"
        "{% endfor %}",
        END,
    ),
    "eos by name": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
        END,
    ),
    "must alternate": (
        "{% if (messages | length) % 2 == 1 %}{{ raise_exception('in pairs') }}{% endif %}"
        "{% for m in messages %}{% if loop.index0 > 99 %}{% break %}{% endif %}"
        "{{ m | tojson }}{{ m.content }}\n<|start|>{% endfor %}{{ strftime_now('%Y') }}",
        TURN,
    ),
    "next header": ("{% for m in messages %}<|start|>{{ m.content }}\n{% endfor %}", TURN),
    "no mark": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "broken": ("{% for m in messages %}{{ m.content", None),
    "needs what is not there": ("{{ messages[7].content.nothing.at.all }}", None),
    "escape": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", None),
}
"""Name to a template and the token it ends the assistant's turn with."""


def wrapped_source(folder: Path, name: str, template: str | None = None, **config: Any) -> Path:
    """Write a tiny Llama, or BERT or RoBERTa, with one of these tokenizers."""
    family = name.removeprefix("as ") if name.startswith("as ") else "llama"
    make_source(folder, family)
    tokenizer = WRAPPED[name]()
    if template:
        tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    model = make_model(make_config(family, tokenizer, **config))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    return folder
