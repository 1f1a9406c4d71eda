"""README.md of a GGUF export: what it is, how it is run, what was checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_convert.common.version import __version__
from dllm_convert.planning.layouts.gguf import GgufLayout, Stored
from dllm_convert.planning.layouts.target import Converted
from dllm_convert.serving.guide import table
from dllm_convert.source.gguf_header import tensor_bytes


@dataclass(frozen=True)
class GgufFile:
    """What a file is made of.

    Attributes:
        name: Its name.
        architecture: Graph of llama.cpp.
        keys: All metadata.
        tensors: All tensors in order.
        kinds: Type of each.
        type_name: Type of most matrices, as people of llama.cpp write it.
    """

    name: str
    architecture: str
    keys: Mapping[str, Any]
    tensors: tuple[Stored, ...]
    kinds: Mapping[str, str]
    type_name: str

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(self.kinds[stored.name], stored.shape) for stored in self.tensors)


def gguf_guide(
    layout: GgufLayout,
    converted: Converted,
    file: GgufFile,
    checked: Mapping[str, str],
    source: str,
    launch: Sequence[str],
) -> str:
    """Return the README.

    Args:
        layout: The layout.
        converted: What was exported.
        file: What was written.
        checked: What was checked, and what came of it.
        source: Name of the conversion.
        launch: How to run it.
    """
    section = converted.section
    block = section.block_size
    facts = {
        "family": f"{converted.adapter.model_type}, a {file.architecture} graph of llama.cpp",
        "objective": section.objective + (f", blocks of {block}" if block else ""),
        "token shift": "kept" if section.token_shift else "dropped",
        "mask": f"id {section.mask_token_id}",
        "matrices": file.type_name,
    }
    parts = [
        f"# {source} for llama.cpp",
        f"{layout.summary}. Written by dllm-convert {__version__} (`export --to {layout.name}`).",
        table(("of the conversion", ""), facts),
        "## Start",
        *(f"```sh\n{line}\n```" for line in launch),
        "## Checked",
        table(("what", "found"), checked),
        "## Limits",
        *(f"- {line}" for line in layout.limits(converted)),
    ]
    return "\n\n".join(parts) + "\n"
