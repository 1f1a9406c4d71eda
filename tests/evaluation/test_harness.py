"""The released lm-eval runs our model: tasks over local files, in batches of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

pytest.importorskip("lm_eval")

CHOICE = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITE = """\
task: writing
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
ROLLING = """\
task: reading
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
DOCS = [
    {"question": "The value of a name is", "choices": [" an object", " a", " it"], "answer": 0},
    {"question": "A list", "choices": [" holds", " of items in their order"], "answer": 1},
    {"question": "Text " * 40, "choices": [" ends", " goes on"], "answer": 0},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.json"
    data.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module", params=["mdlm", "bd3lm"])
def checkpoint(
    request: pytest.FixtureRequest, source_cache: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("converted") / request.param
    convert(source_cache("llama"), folder, request.param, block=4)
    return folder


def evaluate(checkpoint: Path, tasks: Path, batch_size: int, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import dllm_convert.evaluation.harness  # noqa: F401

    found: dict[str, Any] = simple_evaluate(
        model="dllm-convert",
        model_args={"pretrained": str(checkpoint), "rounds": 2, "draws": 4, **options},
        tasks=["capitals", "writing", "reading"],
        batch_size=batch_size,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    return found


def test_batch_size_changes_no_score(checkpoint: Path, tasks: Path) -> None:
    found = [evaluate(checkpoint, tasks, size) for size in (1, 3, 8)]
    for other in found[1:]:
        for task in ("capitals", "writing", "reading"):
            for mine, theirs in zip(found[0]["samples"][task], other["samples"][task], strict=True):
                assert str(mine["filtered_resps"])[:40] == str(theirs["filtered_resps"])[:40] or (
                    flat(mine) == pytest.approx(flat(theirs), abs=1e-3)
                )


def flat(sample: dict[str, Any]) -> list[float]:
    """Every number in a sample's answers."""
    found: list[float] = []
    for answer in sample["filtered_resps"]:
        found += [float(v) for v in (answer if isinstance(answer, list | tuple) else [answer])]
    return found
