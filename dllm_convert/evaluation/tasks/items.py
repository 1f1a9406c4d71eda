"""Items of the tasks that are made here, from CPython's language reference and from a seed.

Every function is a `custom_dataset` of lm-eval: it takes what `--metadata` holds, such as
`{"item_seed": 1}`, and returns splits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

CHOICES = 4
SHOTS = 3
"""Worked examples inside each prompt of the tasks that write."""

_WORDS = """
    apple bread chair cloud coffee door eagle field fire fish flower forest garden glass gold
    green hand horse house island king lake lamp leaf lemon light milk moon mountain mouse music
    night ocean paper pencil queen rain river road rose salt school ship silver snow spring star
    stone storm summer sun table tea train tree water wind window winter wolf wood
""".split()  # noqa: SIM905 - a list of one word a line is no easier to read
_SENTENCE = re.compile(r"(?<=[a-z)]\.) +(?=[A-Z])")


def next_sentence(item_count: int = 400, item_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Which of four sentences of the language reference follows two others.

    Args:
        item_count: Items.
        item_seed: Of the choice and order of items and of their wrong answers.
        **_: What else lm-eval passes.
    """
    draw = random.Random(item_seed)  # noqa: S311 - no secret
    paragraphs = [part for part in _paragraphs() if len(part) > 2]
    draw.shuffle(paragraphs)
    items = []
    every = sorted({text for sentences in paragraphs for text in sentences})
    for sentences in paragraphs[:item_count]:
        at = draw.randrange(1, len(sentences) - 1)
        wrong = draw.sample([text for text in every if text not in sentences], CHOICES - 1)
        question = " ".join(sentences[at - 1 : at + 1])
        items.append(_choice(draw, question, sentences[at + 1], wrong))
    return {"test": Dataset.from_list(items)}


def last_word(item_count: int = 400, item_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Which of four words ends a sentence of the language reference.

    Args:
        item_count: Items.
        item_seed: Of the choice and order of items and of their wrong answers.
        **_: What else lm-eval passes.
    """
    draw = random.Random(item_seed)  # noqa: S311 - no secret
    sentences = sorted({text for part in _paragraphs() for text in part})
    split = [match.groups() for text in sentences if (match := re.match(r"(.+) (\w+)\.$", text))]
    draw.shuffle(split)
    words = sorted({word for _, word in split})
    items = []
    for given, word in split[:item_count]:
        wrong = draw.sample([other for other in words if other != word], CHOICES - 1)
        items.append(_choice(draw, given, word, wrong))
    return {"test": Dataset.from_list(items)}


def copy(item_count: int = 200, item_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Write a list of five words again.

    Args:
        item_count: Items.
        item_seed: Of the words.
        **_: What else lm-eval passes.
    """
    draw = random.Random(item_seed)  # noqa: S311 - no secret
    lists = [", ".join(draw.sample(_WORDS, 5)) for _ in range(item_count * (SHOTS + 1))]
    return _worked([(f"Words: {text}\nAgain:", text) for text in lists])


def next_number(item_count: int = 200, item_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Write the number that goes on with an arithmetic sequence.

    Args:
        item_count: Items.
        item_seed: Of the sequences.
        **_: What else lm-eval passes.
    """
    draw = random.Random(item_seed)  # noqa: S311 - no secret
    pairs = []
    for _number in range(item_count * (SHOTS + 1)):
        first, step = draw.randrange(1, 40), draw.randrange(1, 10)
        *given, answer = [str(first + step * place) for place in range(6)]
        pairs.append((", ".join(given) + ",", answer))
    return _worked(pairs)


def reasoning(
    dataset: str, item_count: int = 100, item_seed: int = 0, **given: Any
) -> dict[str, Dataset]:
    """Items of one generator of reasoning-gym, as JSON beside their question.

    Args:
        dataset: Its name there.
        item_count: Items.
        item_seed: Of the items.
        **given: What else lm-eval passes.

    Raises:
        DllmConvertError: reasoning-gym is not installed.
    """
    import json

    generator = _generator(dataset, item_count, item_seed)
    items = [
        {"question": item["question"], "answer": item["answer"], "entry": json.dumps(item)}
        for item in generator
    ]
    return {"test": Dataset.from_list([{**item, "dataset": dataset} for item in items])}


def score_reasoning(item: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer as reasoning-gym does, from 0 to 1."""
    import json

    generator = _generator(item["dataset"], 1, 0)
    answer = results[0].strip()
    return {"score": float(generator.score_answer(answer, json.loads(item["entry"])))}


def _generator(dataset: str, count: int, seed: int) -> Any:
    from importlib.util import find_spec

    from dllm_convert.errors import DllmConvertError

    if find_spec("reasoning_gym") is None:
        raise DllmConvertError(
            "this task needs reasoning-gym, which is not installed",
            hint="pip install 'dllm-convert[tasks]'",
        )
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, size=count, seed=seed)


def _paragraphs() -> list[list[str]]:
    """Sentences of the language reference's running text, by paragraph."""
    from pydoc_data.topics import topics

    found: dict[tuple[str, ...], None] = {}
    for name in sorted(topics):
        for part in str(topics[name]).split("\n\n"):
            # Indented parts are grammar and code.
            if not part.startswith(" "):
                sentences = _SENTENCE.split(" ".join(part.split()))
                # Some topics share paragraphs.
                found[tuple(text for text in sentences if 40 < len(text) < 300)] = None
    return [list(sentences) for sentences in found]


def _choice(draw: random.Random, question: str, right: str, wrong: list[str]) -> dict[str, Any]:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def _worked(pairs: list[tuple[str, str]]) -> dict[str, Dataset]:
    """Put worked examples before each question, all of them different ones."""
    size = SHOTS + 1
    items = []
    for first in range(0, len(pairs), size):
        *shots, (question, answer) = pairs[first : first + size]
        shown = "".join(f"{asked} {told}\n\n" for asked, told in shots)
        items.append({"question": shown + question, "answer": answer})
    return {"test": Dataset.from_list(items)}
