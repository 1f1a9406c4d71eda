"""Tensors of a file that its class does not load: which may be left out, and which may not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_BUFFER = re.compile(
    r"(?:.*\.)?(?:"
    r"\w*(?:rotary|rope)\w*\.(?:(?:original_)?inv_freq|(?:cos|sin)(?:_cached)?|freqs(?:_cis)?)"
    r"|(?:attn|self_attn|attention)\.(?:bias|masked_bias|causal_mask|scale_attn|embed_positions)"
    r"|masked_bias|embed_positions\.weights"
    r"|position_ids|token_type_ids|num_batches_tracked|_extra_state|_float_tensor"
    r")"
)
"""Buffers that a class computes, and files of older versions hold, in layers and outside."""
_HEAD = re.compile(
    r"(?:.*\.)?(?:v_head|score|classifier|qa_outputs|pooler|seq_relationship)(?:\..+)?"
)
"""Other heads on the same body."""
_NUMBERED = re.compile(r"(.*?\.|)(\d+)\.")


def _list_of(name: str) -> str | None:
    """Return what stands before the first number of a name, None if it has none."""
    found = _NUMBERED.match(name)
    return found[1] if found else None


def is_known_leftover(name: str) -> bool:
    """Whether a tensor is one that files of older versions or other trainings hold besides."""
    return bool(_BUFFER.fullmatch(name) or (_list_of(name) is None and _HEAD.fullmatch(name)))


def computed_with(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the tensors that belong to what body or head compute, though the class has them not.

    That is whatever lies inside a layer or belongs to a module the class has, such as the bias of a
    projection: to leave it out would be to convert another model. A further head or a tower is a
    module of its own.

    Args:
        names: Names of tensors that the class does not know.
        known: Names of the class's tensors.
    """
    lists = {_list_of(name) for name in known} - {None}
    modules = {name.rpartition(".")[0] for name in known}
    return [
        name
        for name in names
        if not is_known_leftover(name)
        and (_list_of(name) in lists or name.rpartition(".")[0] in modules)
    ]
