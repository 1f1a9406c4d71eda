"""A decoded text, and who wrote it, for people; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm_convert.common.shown_text import one_line


def sample_facts(sample: Mapping[str, Any]) -> str:
    """Return how fast a sample was decoded, in words."""
    said = f"{sample['tokens_per_forward']:.2f} tokens per forward, {sample['seconds']:.1f} s"
    if sample.get("close") is None:
        return said
    near = f", {sample['close']} of them close calls" if sample["close"] else ""
    if sample.get("verifier_forwards") is not None:
        near += f"; {sample['verifier_forwards']} of {sample['forwards']} forwards were its own"
    return f"{said}; lossless: every token is the verifier's{near}"


def sample_text(sample: Mapping[str, Any], what: str = "text") -> str:
    """Return what was given and, behind it or below a question, what was written.

    Args:
        sample: A sample of a manifest.
        what: `text`, or `base` for what the base wrote.
    """
    return f"{sample['prompt']}{chr(10) * 2 if sample.get('chat') else ''}{sample[what]}"


def banner(name: str, manifest: Mapping[str, Any]) -> list[str]:
    """Say what a checkpoint is, and what was measured of it; nothing that was not.

    Args:
        name: What it is called.
        manifest: Its dllm_convert.json; empty where it has none.
    """
    measures = manifest.get("measurements") or {}
    recipe = manifest.get("recipe") or {}
    trained = (measures.get("train") or {}).get("tokens")
    blocks = f" in blocks of {recipe['block_size']}" if recipe.get("block_size") else ""
    made = f"{name}: {recipe.get('target') or 'a diffusion model'}{blocks}"
    if recipe.get("source"):
        made += f", made of {one_line(str(recipe['source']))}"
    lines = [f"{made}; {_trained(trained, known=bool(manifest))}"]
    after, base = (_nats(measures, key) for key in ("nelbo_after", "ar_nll"))
    if after is not None and base is not None:
        gap = after - base
        than = f"{abs(gap):.2f} {'above' if gap > 0 else 'below'}"
        lines.append(f"NELBO {after:.2f} nats per token, {than} the base's own NLL, {base:.2f}")
    elif after is not None:
        lines.append(f"NELBO {after:.2f} nats per token")
    return lines


def _trained(tokens: int | None, *, known: bool) -> str:
    if tokens is not None:
        return f"trained on {tokens:,} tokens"
    return "not trained: what it writes is noise" if known else "nothing is recorded of it"


def _nats(measures: Mapping[str, Any], key: str) -> float | None:
    value = (measures.get(key) or {}).get("nats_per_token")
    return None if value is None else float(value)
