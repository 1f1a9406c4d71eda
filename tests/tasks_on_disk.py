"""Local tasks of lm-eval over a JSON file, and running them with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
"""
_BODIES = {
    "capitals": (
        "multiple_choice",
        """\
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    ),
    "writing": (
        "generate_until",
        """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
""",
    ),
    "reading": (
        "loglikelihood_rolling",
        """\
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    ),
}
NAMES = tuple(_BODIES)
DOCS = [
    {"question": "The value of a name is", "choices": [" an object", " a", " it"], "answer": 0},
    {"question": "A list", "choices": [" holds", " of items in their order"], "answer": 1},
    {"question": "Text " * 20, "choices": [" ends", " goes on"], "answer": 0},
]


def write_tasks(folder: Path) -> Path:
    """Write the YAML files and their data."""
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    for name, (kind, body) in _BODIES.items():
        head = _HEAD.format(name=name, data=data, kind=kind)
        (folder / f"{name}.yaml").write_text(head + body)
    return folder


def evaluate(
    model: Any, folder: Path, names: tuple[str, ...] = NAMES, **options: Any
) -> dict[str, Any]:
    """Run tasks in this process."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return found


def answers(samples: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, int], Any]:
    """What the model answered to each item, by task and number."""
    return {
        (task, sample["doc_id"]): sample["filtered_resps"]
        for task, found in samples.items()
        for sample in found
    }
