"""README.md of an export: what it is, how an engine is started on it, what was checked."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_convert.common.version import __version__
from dllm_convert.planning.layouts.target import Converted, Target

_REQUEST = """curl http://localhost:30000/v1/completions -H 'Content-Type: application/json' \\
  -d '{"model": "default", "prompt": "A list is", "max_tokens": 64}'"""


def guide(
    target: Target, converted: Converted, checked: Mapping[str, str], source: str, mask: int
) -> str:
    """Return the README.

    Args:
        target: The layout.
        converted: What was exported.
        checked: What was checked, and what came of it.
        source: Name of the conversion.
        mask: Row of the mask in the export.
    """
    section = converted.section
    block = section.block_size
    facts = {
        "family": converted.adapter.model_type,
        "objective": section.objective + (f", blocks of {block}" if block else ""),
        "token shift": "kept" if section.token_shift else "dropped",
        "mask": f"id {mask}" + (f", {section.mask_token_id} in the conversion"
                                if mask != section.mask_token_id else ""),
    }  # fmt: skip
    served = "SGLang" in target.engines
    parts = [
        f"# {source} for {' and '.join(target.engines)}",
        f"{target.summary}. Written by dllm-convert {__version__} (`export --to {target.name}`); "
        "the weights are those of the conversion, byte for byte.",
        table(("of the conversion", ""), facts),
        "## Start",
        *(f"```sh\n{line}\n```" for line in target.started(converted, ".")),
        *(("A request to SGLang:", f"```sh\n{_REQUEST}\n```") if served else ()),
        "## Checked",
        table(("what", "found"), checked),
        "## Limits",
        *(f"- {line}" for line in _limits(target, converted)),
    ]
    return "\n\n".join(parts) + "\n"


def _limits(target: Target, converted: Converted) -> list[str]:
    lines = [
        "The engine decodes with its own sampler: settings of this package's `generate` mean "
        "nothing to it.",
        "Nothing here says how good the model is; its own card does.",
    ]
    if target.mask_row is not None:
        lines.append(
            f"The mask is row {target.mask_row}, as the engine has it built in; the tokenizer need "
            "not know it."
        )
    if converted.section.block_size:
        lines.append(
            f"Blocks have {converted.section.block_size} tokens: the engine is told so when it "
            "starts, and other sizes are not what the model was trained on."
        )
    return lines


def table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    """Return a table of two columns in Markdown."""
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows.items())])
