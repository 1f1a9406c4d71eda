"""A plan for people, from the document that `check --json` prints."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dllm_convert.common.quantities import (
    bytes_text,
    ranges_text,
)
from dllm_convert.common.shown_text import one_line
from dllm_convert.common.tables import Block, Table
from dllm_convert.planning.launch_text import launch_line, launch_sentences, together
from dllm_convert.planning.needs_text import (
    devices_table,
    memory_table,
    stages_table,
    strategies,
)

WIDTH = 100
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PARTS = ("embedding", "layers", "head", "other")


def _section(title: str, blocks: Iterable[Block]) -> list[Block]:
    body = [
        replace(block, indent=2)
        if isinstance(block, Table)
        else f"  {one_line(block)}"
        if block
        else ""
        for block in blocks
    ]
    return ["", title, *body] if body else []


def _wrapped(sentences: Iterable[str]) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, WIDTH - 4, initial_indent="- ", subsequent_indent="  ")
    ]


def _source(source: Mapping[str, Any]) -> list[str]:
    commit = f" at commit {source['revision'][:12]}" if source["revision"] else ""
    lines = [f"{source['family']}, a {source['kind']}{commit}"]
    parts = source["parts"]
    if parts is not None:
        counts = ", ".join(
            f"{name} {'tied' if name == 'head' and parts['tied'] else f'{parts[name]:,}'}"
            for name in _PARTS
        )
        lines.append(f"{parts['total']:,} parameters after the conversion: {counts}")
        files = len(source["weight_files"])
        lines.append(f"{source['dtype']} in {files} file{'s' if files != 1 else ''}")
    else:
        lines.append("parameters not known: the headers tell no shapes")
    lines.append(f"context {source['context']}, tokenizer of {source['tokenizer_size']:,} ids")
    gated = {None: "", "no": ", not gated", "auto": ", gated (granted automatically)"}
    access = gated.get(source["gated"], ", gated (its owner decides on each request)")
    name = f" ({source['license_name']})" if source["license_name"] else ""
    return [*lines, f"licence {source['license'] or 'unknown'}{name}{access}"]


def _conversion(plan: Mapping[str, Any]) -> list[str]:
    target = plan["target"]
    blocks = f" in blocks of {plan['block_size']}" if plan["block_size"] else ""
    shift = "token shift kept" if plan["token_shift"] else "no token shift"
    return [
        f"{target}{blocks}, {shift}",
        f"loads with transformers {plan['min_transformers']} or later",
        f"written to {plan['out']}",
    ]


def _keeps_base(plan: Mapping[str, Any]) -> bool:
    training = plan["training"]
    return bool(training["method"] == "lora" and training["lora"]["acts_on"] == "noisy")


def _mask(plan: Mapping[str, Any]) -> list[str]:
    mask = plan["mask"]
    named = f"{mask['token']}, id {mask['id']}, by the rule {mask['rule']}"
    if _keeps_base(plan):
        vector = "a vector beside the base stands for it; the embedding stays as it is"
        return [named, *_wrapped([mask["reason"], vector])]
    row = (
        f"its row becomes the mean of the {mask['used_rows']:,} used ones"
        if mask["write_row"]
        else "its row stays as it was trained"
    )
    kept = "" if mask["rows_after"] != mask["rows_before"] else "; the embedding keeps its rows"
    return [named, *_wrapped([mask["reason"], row + kept])]


def _attention(plan: Mapping[str, Any]) -> list[Block]:
    rows = [
        (group["type"], ranges_text(group["layers"]), group["before"], group["after"])
        for group in plan["attention_layers"]
    ]
    table = Table(("type", "layers", "before", "after"), rows)
    return [table, *_wrapped(plan["notes"])]


def probe_blocks(report: Mapping[str, Any] | None) -> list[Block]:
    """Return what a probe measured, a line per finding; none of no probe.

    Args:
        report: A `ProbeReport` as a mapping, perhaps with the `ways` that it has.
    """
    if report is None:
        return []
    verdicts = {True: "ok", False: "no"}
    rows = [
        (verdicts[finding["passed"]], finding["name"], finding["measured"], finding["detail"])
        for finding in report["findings"]
    ]
    return [*_wrapped(report.get("ways", ())), Table(("", "question", "measured", ""), rows)]


def _writes(plan: Mapping[str, Any]) -> list[str]:
    writes = plan["writes"]
    if writes is None:
        return ["not known: the headers tell no shapes"]
    changed = [
        f"{name} changes ({bytes_text(size)})" for name, size in writes["changed_tensors"].items()
    ]
    kinds = Counter(_NUMBER.sub("*", name) for name in plan["tensors_dropped"])
    dropped = [
        f"{kind} is left out" + (f" ({count} tensors)" if count > 1 else "")
        for kind, count in kinds.items()
    ]
    total, unchanged = writes["weights_bytes"], writes["unchanged_bytes"]
    if _keeps_base(plan):
        return [
            f"{bytes_text(total)} of weights, equal to the source's; training writes adapter/",
            *dropped,
        ]
    return [
        f"{bytes_text(total)} of weights, {bytes_text(unchanged)} of them equal to the source's"
        " until training",
        *(changed or ["no tensor changes"]),
        *dropped,
    ]


DRAFTS_MEASURED = ((50_400, 1.46, 1.30), (151_000, 1.64, 1.45))
"""Tokens that SmolLM2-135M learnt to draft from, and tokens that a forward then wrote of a text and
of a chat's answer: first of the manual as it is, then of the base's own text at twice the rate."""


def _noise(noise: Mapping[str, Any]) -> list[str]:
    """Say what noise does where it does not just mask."""
    steps = noise["discrete_steps"]
    if noise["draw"] == "draft":
        bought = ", ".join(
            f"{text:.2f} tokens per forward ({chat:.2f} in chats) after {tokens:,}"
            for tokens, text, chat in DRAFTS_MEASURED
        )
        return _wrapped([f"drafts: SmolLM2-135M wrote {bought}; docs/lossless.md"])
    if noise["kernel"] == "neighbours":
        return [
            f"noise: a word becomes one of the {noise['neighbours']} whose embedding is nearest, "
            f"{noise['jumps']:g} times until t = 1, and then any other; in {steps:,} steps. Which "
            "those are is found before the training, and lies beside the weights"
        ]
    if noise["kernel"] == "uniform":
        return [f"noise: a word becomes any other; in {steps:,} steps"]
    if noise["schedule"] == "learned":
        return [
            f"noise: when a word is masked is learnt for {noise['classes']} classes of words, at "
            f"rate {noise['exponent_rate']:g}"
        ]
    return []


def _training(plan: Mapping[str, Any]) -> list[Block]:
    estimate, training = plan["estimate"], plan["training"]
    if training["method"] == "none":
        return ["none"]
    acts_on = " on noisy tokens, the base is kept" if _keeps_base(plan) else ""
    own = training["lora"]["learning_rate"] if training["method"] == "lora" else None
    rate = f"rate {own or training['learning_rate']:g}"
    steps = f"{training['steps']:,} steps, {plan['training_tokens']:,} tokens"
    limit = f", at most {training['max_minutes']:g} minutes" if training["max_minutes"] else ""
    lines = [
        f"{training['method']}{acts_on}, {rate}, {steps}{limit}, data {plan['data']['source']}"
    ]
    lines += _noise(plan["noise"])
    if sizes := plan["growing_sizes"]:
        grown = training["block_growth"]["steps"]
        lines.append(
            f"blocks of {', '.join(map(str, sizes))} tokens for {grown:,} steps, then of "
            f"{plan['block_size']}"
        )
    if own := plan["on_policy"]:
        lines.append(
            f"in {own['steps']:,} of them the model writes its text: {own['new_tokens']} tokens "
            f"behind {own['prompt_tokens']} (of a chat, what stands before its answer), in at "
            f"most {own['forwards']} forwards"
        )
    if estimate is None:
        return [*lines, "no estimate: the headers tell no shapes"]
    flops, several = estimate["flops_per_token"], together(plan)
    whose = f" of each of {several}" if several else ""
    return [
        *lines,
        f"{estimate['trainable_parameters']:,} trainable parameters, "
        f"{flops['gpu'] / 1e9:.3g} GFLOP per token on a GPU, {flops['cpu'] / 1e9:.3g} on a CPU",
        "",
        f"Peak memory{whose} at {estimate['sequences_per_forward']} sequences of "
        f"{estimate['sequence_length']} tokens per forward",
        memory_table(estimate["memory"]),
        *strategies(estimate["strategies"], training["method"]),
        "",
        "Peak memory of every stage, one model at a time",
        stages_table(estimate["stages"]),
        "",
        f"The budget of {estimate['tokens']:,} tokens on {several or 'one device'}",
        devices_table(estimate["devices"], limited=bool(training["max_minutes"])),
        *_wrapped(["Assumed: " + "; ".join(estimate["assumptions"]) + "."]),
    ]


def _serving(plan: Mapping[str, Any]) -> list[str]:
    """Return what the engine that was asked for needed; a line per layout of `export`."""
    layouts, asked, lines = plan.get("serving", {}), plan.get("serve"), []
    if asked is not None:
        said = f"for {asked['engine']} with export --to {asked['layout']}:"
        chosen = [
            f"{name}={found['value']} (it {found['reason']})"
            for name, found in asked["because"].items()
        ]
        lines += _wrapped([f"{said} {', '.join(chosen)}, mask in row {asked['mask_row']:,}"])
    for name, found in layouts.items():
        engines = " and ".join(found["engines"])
        if not found["refused"]:
            lines += _wrapped([f"{engines}: yes, export --to {name}"])
        else:
            lines += _wrapped([f"{engines}: no, {found['refused'][0]}. {found['way_out']}"])
    return lines


def _text(text: Mapping[str, Any] | None) -> list[str]:
    """Say what is trained on, if it was looked at."""
    if text is None:
        return []
    if "unread" in text:
        return _wrapped([f"not looked at: {text['unread']}"])
    if "texts" in text:
        return [line for one in text["texts"] for line in _text(one)]
    long = []
    if text["beyond"]:
        some = f"{text['beyond']:,} of {text['documents']:,} documents"
        what = f"{some} are longer than a sequence, the longest has"
        if text["documents"] == 1:
            what = "it is longer than a sequence, with"
        long = [f"{what} about {text['longest']:,} tokens"]
    return _wrapped([text["said"], *long])


def _launch(plan: Mapping[str, Any]) -> list[str]:
    if "launch" not in plan:
        return []
    launch = plan["launch"]
    return [launch_line(launch), *_wrapped(launch_sentences(plan)), *_host(launch)]


def _more(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    if "publication" in plan:
        to = plan["publication"]
        lines.append(f"published as {to['repository']} ({to['visibility']}) on {to['revision']}")
    return lines


def _host(launch: Mapping[str, Any]) -> list[str]:
    """Say what host memory a launch takes beside GPUs, and under other strategies would."""
    names = {launch.get("strategy"): launch.get("name"), "ddp": "DDP", "fsdp2": "FSDP2"}
    return _wrapped(
        [
            f"host memory beside GPUs under {names[strategy]}: at most "
            f"{bytes_text(found['process'])} of a process, {bytes_text(found['machine'])} a machine"
            for strategy, found in launch.get("host_memory", {}).items()
        ]
    )


def plan_blocks(plan: Mapping[str, Any]) -> list[Block]:
    """Return what `check` shows, from the document it would print with `--json`."""
    warnings = [*plan["warnings"], *plan.get("publication", {}).get("warnings", ())]
    return [
        plan["source"]["given"],
        *(f"  {line}" for line in _source(plan["source"])),
        *_section("Becomes", _conversion(plan)),
        *_section("Mask token", _mask(plan)),
        *_section("Attention", _attention(plan)),
        *_section("Measured in small", probe_blocks(plan.get("probe"))),
        *_section("Weights", _writes(plan)),
        *_section("Text", _text(plan.get("text"))),
        *_section("Launch", _launch(plan)),
        *_section("Training", _training(plan)),
        *_section("Engines that can serve it", _serving(plan)),
        *_section("Then", _more(plan)),
        *_section("Warnings", _wrapped(warnings)),
    ]
