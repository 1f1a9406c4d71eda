"""Measure every decoder family that this transformers builds, and write the table of the docs.

    .venv/bin/python benchmarks/families.py --out families.jsonl
    .venv/bin/python benchmarks/families.py --out families.jsonl --write docs/any-architecture.md

The first line measures and goes on where it stopped, the second writes the table. Each family is
measured in a fork of its own, from the default config of its class, which for most is that of a
published checkpoint, with the fields below where the default alone cannot be built. What
`check --probe` measures is the config of the checkpoint itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

LIMIT_S = 90
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "moe_topk": 1, "num_experts": 16},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "jamba": {"use_mamba_kernels": False},
}
"""Fields of published checkpoints that a default config lacks."""


def measure(model_type: str) -> dict[str, Any]:
    """Measure one family."""
    from transformers import CONFIG_MAPPING

    from dllm_convert.adapters import has_adapter
    from dllm_convert.modeling.loading import BROKEN
    from dllm_convert.probing.family import measure_family

    try:
        config = CONFIG_MAPPING[model_type](**FIELDS.get(model_type, {}))
        # Of a model that holds a text model inside, that one is converted.
        text = config.get_text_config()
        values = json.loads(json.dumps(text.to_dict(), default=str))
    except BROKEN as error:
        reason = f"its default config cannot be built ({type(error).__name__})"
        return {"model_type": model_type, "reason": reason, "findings": [], "written": False}
    inside = None if text is config else text.model_type
    report = measure_family({**values, "model_type": inside or model_type}, ()).as_dict()
    known = {"written": has_adapter(inside or model_type), "inside": inside}
    return {**report, **known, "model_type": model_type}


def in_a_fork(model_type: str, out: Path) -> None:
    """Measure in a child, so that neither a crash nor a minute too long ends the others."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        line = json.dumps(measure(model_type), default=str)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        reason = f"it took longer than {LIMIT_S} s" if late else f"it ended with status {status}"
        line = json.dumps(
            {"model_type": model_type, "reason": reason, "findings": [], "written": False}
        )
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def measure_all(out: Path, seconds: float) -> None:
    """Measure what `out` has not, for at most so many seconds."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Imported before the forks, so that each begins where the others did.
    import dllm_convert.probing.family  # noqa: F401

    torch.set_num_threads(1)
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    done = {entry["model_type"] for entry in read(out)}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type not in done and time.monotonic() - began < seconds:
            in_a_fork(model_type, out)
    print(f"{len(read(out))} of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} measured")


def read(out: Path) -> list[dict[str, Any]]:
    """Read what was measured."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    return sorted((json.loads(line) for line in lines), key=lambda entry: entry["model_type"])


def table(entries: list[dict[str, Any]]) -> str:
    """Return the tables in Markdown: what converts, and what does not and why."""
    versions = next(entry["versions"] for entry in entries if entry.get("versions"))
    yes = [entry for entry in entries if entry.get("adapter")]
    no = [entry for entry in entries if not entry.get("adapter")]
    open_ones = sum(bool(entry["adapter"].get("targets", True)) for entry in yes)
    kept = sum(_beside(entry) != "no" for entry in yes)
    lines = [
        f"transformers {versions['transformers']}, torch {versions['torch']}, CPU, one thread: of "
        f"{len(entries)} families {len(yes)} can be converted: {open_ones} opened, {kept} beside a "
        "base that stays.",
        "",
        "| model_type | opened to | beside its base | attention | layers | windows opened |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in yes:
        adapter = entry["adapter"]
        kinds = "; ".join(dict.fromkeys(entry["layers"])).replace("decoder", "one kind")
        opened = ", ".join((adapter.get("window") or {}).get("overrides") or {}) or ""
        targets = ", ".join(adapter.get("targets", ("mdlm", "bd3lm"))) or "no"
        ways = ", ".join(adapter.get("implementations", ("sdpa", "eager")))
        row: list[str] = [_name(entry), targets, _beside(entry), ways, kinds, opened]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "Not converted:", "", "| model_type | measured |", "| --- | --- |"]
    for entry in no:
        reason = " ".join(str(entry["reason"]).replace("|", "/").split())
        lines.append(f"| {_name(entry)} | {reason[:240]} |")
    return "\n".join(lines)


def _name(entry: dict[str, Any]) -> str:
    """The family, and whose text model or adapter is taken."""
    said = [f"its {entry['inside']}"] if entry.get("inside") else []
    said += ["has an adapter"] if entry["written"] else []
    name = str(entry["model_type"])
    return f"{name} ({', '.join(said)})" if said else name


def _beside(entry: dict[str, Any]) -> str:
    """How noisy tokens stand beside a base that stays; what rolls back says what it costs."""
    if entry["adapter"].get("behind", "mask") is None:
        return "no"
    rolls = [f for f in entry["findings"] if f["name"] == "rolls-back"]
    state = any("recurrent" in finding["measured"] for finding in rolls)
    causal = "causal, recurrent state" if state else "causal"
    return f"open blocks, {causal}" if entry["written"] else causal


def main() -> None:
    """Measure, or write the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="what was measured, a line each")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    if given.write is None:
        measure_all(given.out, given.seconds)
        return
    page = given.write.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n\n{table(read(given.out))}\n\n{END}{after}"
    given.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
