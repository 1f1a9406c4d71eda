"""The card's metadata: what is known of a run, with the keys and words the Hub reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from dllm_convert.card.base import Data
from dllm_convert.card.facts import Facts
from dllm_convert.common.shown_text import printable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
}
_TASK_NAMES = {"text-generation": "Text generation", "fill-mask": "Masked language modelling"}


def front_matter(facts: Facts, title: str) -> dict[str, Any]:
    """Return the card's metadata; keys of which nothing is known are left out.

    Args:
        facts: Facts of the run.
        title: Name of the model.
    """
    base, licence, data = facts.base, facts.base.licence, facts.data
    # A folder that has the base's weights as they are adds an adapter to them.
    relation = "adapter" if facts.adapter_only or facts.keeps_base else "finetune"
    values = {
        "language": list(base.languages),
        "license": licence.id,
        "license_name": licence.name,
        "license_link": licence.link if licence.id == "other" else None,
        "base_model": base.hub_id,
        "base_model_relation": relation if base.hub_id else None,
        "datasets": list(dict.fromkeys(data.text.dataset_ids)) if data else [],
        # PEFT alone would let a gated adapter act on every token.
        "library_name": "peft" if facts.adapter_only and not facts.keeps_base else "transformers",
        "pipeline_tag": _PIPELINE_TAGS[facts.adapter.auto_class],
        "tags": _tags(facts),
        "model-index": model_index(facts, title),
    }
    return {key: value for key, value in values.items() if value}


def dump_front_matter(values: Mapping[str, Any]) -> str:
    """Write metadata as YAML between its two lines."""
    body = yaml.safe_dump(_shown(values), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{body}---\n"


def _shown(value: Any) -> Any:
    """Take what acts on a reader out of every text: YAML escapes some of it, not all."""
    if isinstance(value, Mapping):
        return {key: _shown(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _tags(facts: Facts) -> list[str]:
    block = facts.objective == "bd3lm"
    return [
        *("dllm-convert", "diffusion", "block-diffusion" if block else "masked-diffusion"),
        facts.objective,
        *(["lora"] if facts.adapter_only or facts.keeps_base else []),
        *(["custom_code"] if facts.code_files else []),
    ]


def model_index(facts: Facts, title: str) -> list[dict[str, Any]]:
    """Return the measured values in the form the Hub reads; empty if there are none to compare.

    Metrics of text are bounds and are called so. Text that only the author has is left out: nobody
    else could measure on it.

    Args:
        facts: Facts of the run.
        title: Name of the model.
    """
    results = [*_results(facts), *_scores(facts)]
    if not results:
        return []
    from huggingface_hub.repocard_data import eval_results_to_model_index

    return list(eval_results_to_model_index(title, results))


def _results(facts: Facts) -> list[EvalResult]:
    measure = facts.measure("nelbo_after")
    if measure is None or facts.data is None or not math.isfinite(measure.nats):
        return []
    if facts.data.measured.kind in ("files", "mixture"):
        return []
    from huggingface_hub import EvalResult

    task = _PIPELINE_TAGS[facts.adapter.auto_class]
    text = {
        **_dataset(facts, facts.data, measure.tokens),
        "task_type": task,
        "task_name": _TASK_NAMES[task],
    }
    nelbo = EvalResult(
        **text,
        metric_type="nelbo",
        metric_name="NELBO, upper bound of the NLL, nats per token",
        metric_value=round(measure.nats, 4),
    )
    if measure.perplexity is None:
        return [nelbo]
    perplexity = EvalResult(
        **text,
        metric_type="perplexity",
        metric_name="Perplexity per token, upper bound: exp(NELBO)",
        metric_value=float(f"{measure.perplexity:.4g}"),
    )
    return [nelbo, perplexity]


def _scores(facts: Facts) -> list[EvalResult]:
    """Return the scores of an evaluation; a task's name and items stand for its text."""
    if facts.evaluation is None:
        return []
    from huggingface_hub import EvalResult

    task = _PIPELINE_TAGS[facts.adapter.auto_class]
    return [
        EvalResult(
            task_type=task,
            task_name=_TASK_NAMES[task],
            dataset_type=score.task,
            dataset_name=f"{score.task}, {score.items:,} items",
            metric_type=score.hub_metric,
            metric_name=f"{score.metric} (lm-eval)",
            metric_value=round(score.value, 4),
        )
        for score in facts.evaluation.scores
        if math.isfinite(score.value)
    ]


def _dataset(facts: Facts, data: Data, tokens: int) -> dict[str, Any]:
    """Return what EvalResult wants to know of the text."""
    text = data.measured
    part = f"{tokens:,} tokens" if data.held_out else f"held-out documents, {tokens:,} tokens"
    if text.kind == "pydoc":
        python = (facts.manifest.get("versions") or {}).get("python")
        return {
            "dataset_type": "pydoc_data.topics",
            "dataset_name": f"Python language reference, {part}",
            "dataset_revision": f"CPython {python}" if python else None,
        }
    (name,) = text.names
    return {
        "dataset_type": name,
        "dataset_name": f"{name}, {part}",
        "dataset_config": text.subset,
        "dataset_split": text.split,
        "dataset_revision": text.revision,
    }
