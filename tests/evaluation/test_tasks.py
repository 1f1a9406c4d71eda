"""The tasks that need no download: their items."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import yaml

from dllm_convert.evaluation.tasks import FOLDER, items


@pytest.mark.parametrize("make", [items.next_sentence, items.last_word])
def test_choices_are_four_different_ones_with_one_right(make: Any) -> None:
    found = make()["test"]
    assert len(found) >= 100
    for item in found:
        assert len(set(item["choices"])) == items.CHOICES
        assert not item["question"].endswith(item["choices"][item["answer"]])
    places = [item["answer"] for item in found]
    assert all(places.count(place) > len(found) / 8 for place in range(items.CHOICES))
    assert found.to_list() == make()["test"].to_list()
    assert found.to_list() != make(item_seed=1)["test"].to_list()


@pytest.mark.parametrize("make", [items.copy, items.next_number])
def test_worked_examples_follow_the_rule_of_the_question(make: Any) -> None:
    found = make(item_count=50)["test"]
    assert len(found) == 50
    for item in found:
        *shots, question = item["question"].split("\n\n")
        assert len(shots) == items.SHOTS
        if make is items.copy:
            pairs = [*shots, f"{question} {item['answer']}"]
            for pair in pairs:
                first, again = pair.removeprefix("Words: ").split("\nAgain: ")
                assert first == again
        else:
            for line in [*shots, f"{question} {item['answer']}"]:
                numbers = [int(number) for number in line.split(", ")]
                assert len({b - a for a, b in pairwise(numbers)}) == 1


def test_every_task_file_names_itself_and_functions_that_exist() -> None:
    import importlib

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: ("function", node.value))
    files = sorted(FOLDER.glob("*.yaml"))
    assert len(files) > 4
    for path in files:
        task = yaml.load(path.read_text(), Loader)
        assert task["task"] == path.stem
        for value in task.values():
            if isinstance(value, tuple):
                module, _, name = value[1].rpartition(".")
                assert callable(getattr(importlib.import_module(module), name))


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    found = items.reasoning("chain_sum", item_count=2)["test"]
    assert items.score_reasoning(found[0], [f" {found[0]['answer']}"]) == {"score": 1.0}
    assert items.score_reasoning(found[0], ["no number"])["score"] < 1
