"""How a text is named in one line: a part of it, and with what weight it is mixed with others.

    NAME                      pydoc; a file, folder or pattern; a Hub dataset id
    NAME:SPLIT                one split of it
    NAME:SUBSET/SPLIT         of a subset
    NAME:SPLIT[:10%]          a slice, as `datasets` spells it; NAME:[:500] of the split train
    NAME:WEIGHT,NAME:WEIGHT   a mixture, each name with or without a part: NAME:SPLIT:WEIGHT

A Hub id has no colon. A path may have one, and is a path where it is there and nothing else could
be meant; what could be read in two ways is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dllm_convert.recipe.contradiction import Contradiction, UnsoundError
from dllm_convert.recipe.splits import NamedText, mixture_line

_WEIGHT = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_SLICED = re.compile(r"(?P<name>.*[^:/])(?P<slice>\[[\d%-]*:[\d%-]*\])", re.DOTALL)
"""A name with a slice and no colon; as a file's pattern it would be one of odd signs."""
_WHERE = re.compile(r"(?:(?P<subset>[\w.-]+)/)?(?P<split>[\w.-]+(?:\[[^\[\]]*\])?|\[[^\[\]]*\])")


def fields_of_text(line: str) -> dict[str, Any]:
    """Return the fields of `data` that a line stands for, by name.

    Args:
        line: What `--data` was given.

    Returns:
        `source`; `subset` and `split` where the line names them; `mixture` where it is one, with
        the line, as it is spelt by itself, for its source.

    Raises:
        UnsoundError: It can be read in two ways, or in none.
    """
    if _is_there(line):
        alone = _named(line)
        if alone.name != line and _is_there(alone.name):
            raise _two_ways(line, alone)
        return {"source": line}
    texts = [_text(part) for part in _parts(line)]
    weighed = [text for text in texts if text.weight is not None]
    if len(texts) == 1:
        (text,) = texts
        if text.weight is not None:
            raise _unsound(
                f"--data {line} weighs one text, and a weight says how it is mixed with others",
                f"--data {NamedText(text.name, text.subset, text.split)}, or for a split "
                f"called {text.weight:.15g}: --set data.split={text.weight:.15g}",
            )
        named = {"subset": text.subset, "split": text.split}
        return {"source": text.name, **{key: value for key, value in named.items() if value}}
    if not weighed:
        if all(text.split is None for text in texts):
            return {"source": line}  # Files, one after another.
        raise _unsound(
            f"--data {line} names parts of several texts, and no weights to mix them with",
            f"--data {','.join(f'{text}:{1 / len(texts):.2g}' for text in texts)}",
        )
    if len(weighed) < len(texts):
        without = next(text for text in texts if text.weight is None)
        raise _unsound(
            f"--data {line} says no weight for {without}",
            f"Say one for each, as in {without}:0.5; several files of one text are a folder "
            "or a pattern: 'texts/*.txt:0.5'",
        )
    mixture = [
        {"source": text.name, "weight": text.weight}
        | ({"subset": text.subset} if text.subset else {})
        | ({"split": text.split} if text.split else {})
        for text in texts
    ]
    return {"source": mixture_line(mixture), "mixture": mixture}


def _parts(line: str) -> list[str]:
    """Cut at the commas that stand in no brackets."""
    parts, depth, begun = [], 0, 0
    for at, sign in enumerate(line):
        depth = max(0, depth + (sign in "[{") - (sign in "]}"))
        if sign == "," and not depth:
            parts.append(line[begun:at])
            begun = at + 1
    return [part.strip() for part in (*parts, line[begun:]) if part.strip()]


def _text(part: str) -> NamedText:
    """Read one text; a path with a colon in it is one where it is there.

    Raises:
        UnsoundError: It can be read in two ways.
    """
    name, found, last = _cut(part)
    whole = part if not (found and _WEIGHT.fullmatch(last)) else name
    text = _named(part)
    for path in {part, whole}:
        if ":" in path and _is_there(path):
            if text.name != path and _is_there(text.name):
                raise _two_ways(path, text)
            weight = None if path == part else text.weight
            return NamedText(path, weight=weight)
    if sliced := _SLICED.fullmatch(text.name):
        whole, cut = sliced["name"], sliced["slice"]
        raise _unsound(
            f"--data {part} is no text; a slice stands behind a colon, as in NAME:SPLIT{cut}",
            f"--data '{whole}:{cut}', or of a split: '{whole}:train{cut}'",
        )
    return text


def _named(part: str) -> NamedText:
    """Read one text by its signs alone."""
    name, found, last = _cut(part)
    weight = None
    if found and name and _WEIGHT.fullmatch(last):
        weight, rest = float(last), name
        name, found, last = _cut(rest)
        part = rest
    where = _WHERE.fullmatch(last) if found and name else None
    if where is None or ":" in name.replace("[:]", ""):
        return NamedText(part, weight=weight)
    return NamedText(name, where["subset"], where["split"], weight)


def _cut(text: str) -> tuple[str, bool, str]:
    """Cut at the last colon that stands in no brackets."""
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth = max(0, depth + (text[at] == "]") - (text[at] == "["))
        if text[at] == ":" and not depth:
            return text[:at], True, text[at + 1 :]
    return text, False, ""


def _is_there(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False  # Too long, or no path at all.


def _two_ways(path: str, text: NamedText) -> UnsoundError:
    said = f"weight {text.weight:.15g}" if text.split is None else f"split {text.split!r}"
    return _unsound(
        f"--data {path} can be read in two ways: there is a file or folder of that name, and one "
        f"called {text.name}, of which {said} could be meant",
        f"For the first: --data '{path.replace(':', '[:]')}'; for the second: --data "
        f"./{text.name} with --set data.split=NAME, or rename one of them",
    )


def _unsound(message: str, hint: str) -> UnsoundError:
    return UnsoundError(Contradiction(message, hint, ("data.source",)))
