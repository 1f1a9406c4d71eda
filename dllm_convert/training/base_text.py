"""Text that the base writes before a training, from prompts: answers and continuations.

A conversion that learns from what its base would say itself has less to unlearn than one that
learns from others (FLARE, arXiv 2606.01774, which finds it to matter more than loss or mask).

Prompts are written down first, then answered in batches whose order and seeds depend on nothing but
their number: on how many processes they are spread and how often writing was interrupted changes
nothing. Each batch is a file that appears when it is whole; at the end they become one text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common import strict_json
from dllm_convert.common.disk import write_whole
from dllm_convert.common.json_files import write_json
from dllm_convert.common.ranks import Rank
from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.content import FROM, OPEN
from dllm_convert.training.data.prompts import find_prompts

PROMPTS, ABOUT, TEXT, FACTS, BATCHES = (
    *("prompts.jsonl", "prompts.json", "text.jsonl", "facts.json"),
    "batches",
)


@dataclass(frozen=True)
class Writing:
    """How a base writes.

    Attributes:
        max_new_tokens: Tokens of an answer or a continuation at most.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Share of the likeliest tokens that are drawn from.
        batch_size: Prompts per forward.
        seed: Seed of the sampling.
        ends: Tokens that end a text.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    seed: int
    ends: tuple[int, ...]


def prepare_prompts(data: Data, tokenizer: Any, folder: Path) -> int:
    """Write down what the base is asked, or find what an earlier session wrote down.

    Args:
        data: Where prompts come from.
        tokenizer: The conversion's, whose other tokens are the base's.
        folder: Where they and what the base writes are kept.

    Returns:
        How many prompts there are.

    Raises:
        DataError: There is none.
        HubError: A Hub dataset cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        prompts, facts = find_prompts(data, tokenizer)
        lines = (strict_json.dumps(prompt.as_dict(), default=str) + "\n" for prompt in prompts)
        write_whole(folder / PROMPTS, "".join(lines))
        write_json(folder / ABOUT, facts)
    return int(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["prompts"])


def write_share(
    load: Callable[[], Any],
    tokenizer: Any,
    folder: Path,
    how: Writing,
    place: Rank,
    advance: Callable[[int], None],
) -> None:
    """Have the base answer this process's share of the prompts that nobody answered yet.

    Args:
        load: Loads the base, as transformers has it, where there is something to do.
        tokenizer: The conversion's.
        folder: As in `prepare_prompts`.
        how: How it writes.
        place: This process among those that write.
        advance: Told how many prompts were answered.
    """
    if (folder / FACTS).exists():
        return  # All of it is put together; only the journal does not say so yet.
    (folder / BATCHES).mkdir(exist_ok=True)
    base = None
    for number, prompts in enumerate(_batches(folder, how.batch_size)):
        if number % place.world != place.rank:
            continue
        file = _batch_file(folder, number)
        if not file.exists():
            base = base or load()
            write_json(file, {"rows": write(base, tokenizer, prompts, how, number)})
        advance(len(prompts))


def write(
    base: Any, tokenizer: Any, prompts: Sequence[dict[str, Any]], how: Writing, number: int
) -> list[dict[str, Any]]:
    """Have a base answer some prompts in one batch.

    Args:
        base: A causal model of transformers.
        tokenizer: Its tokenizer.
        prompts: As `Prompt.as_dict` returns them.
        how: How it writes.
        number: Number of the batch, which its seed depends on.

    Returns:
        For each prompt `row`, what is learnt from, or None; `tokens`, how many were written; and
        `ended`, whether the text came to an end by itself.
    """
    from transformers import GenerationConfig

    width = max(len(prompt["ids"]) for prompt in prompts)
    # Filled on the left, (prompts, width): what is written begins at one column.
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt["ids"]) :] = torch.tensor(prompt["ids"])
        seen[row, width - len(prompt["ids"]) :] = 1
    sampled = how.temperature > 0
    # Nothing of the base's own settings: what it writes is to be drawn as it was asked for.
    base.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=how.max_new_tokens,
        do_sample=sampled,
        temperature=how.temperature if sampled else None,
        top_p=how.top_p if sampled else None,
        top_k=0 if sampled else None,
        eos_token_id=list(how.ends) or None,
        pad_token_id=0,
        # Rows of the embedding that no text has.
        suppress_tokens=list(range(len(tokenizer), base.config.get_text_config().vocab_size))
        or None,
    )
    device = base.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(how.seed, number))
        out = base.generate(ids.to(device), attention_mask=seen.to(device))
    written = out[:, width:].tolist()
    return [
        _row(tokenizer, prompt, tokens, how)
        for prompt, tokens in zip(prompts, written, strict=True)
    ]


def _row(tokenizer: Any, prompt: dict[str, Any], tokens: list[int], how: Writing) -> dict[str, Any]:
    at = next((number for number, token in enumerate(tokens) if token in how.ends), None)
    ended, said = at is not None, tokens[:at]
    row: dict[str, Any] | None
    if prompt["messages"] is None:
        text = str(tokenizer.decode([*prompt["ids"], *said], skip_special_tokens=True))
        # A text that was cut off is not to be learnt with an end.
        row = {"text": text} | ({} if ended else {OPEN: True}) if text.strip() else None
    else:
        answer = str(tokenizer.decode(said, skip_special_tokens=True))
        turn = {"role": "assistant", "content": answer}
        # Nor is an answer, and a template ends every turn.
        row = {"messages": [*prompt["messages"], turn]} if ended and answer.strip() else None
        if row is not None and prompt["tools"]:
            row["tools"] = prompt["tools"]
    if row is not None:
        row[FROM] = prompt["key"]
    return {"row": row, "tokens": len(said), "ended": ended}


def gather(folder: Path, how: Writing) -> dict[str, Any]:
    """Put together what was written; what only it needs goes.

    Args:
        folder: As in `prepare_prompts`.
        how: How it was written.

    Returns:
        Counts and settings for the manifest.

    Raises:
        DataError: Nothing of it can be learnt from.
    """
    if not (folder / FACTS).exists():
        count = sum(1 for _ in _batches(folder, how.batch_size))
        found = [row for number in range(count) for row in _rows(_batch_file(folder, number))]
        rows = [one["row"] for one in found if one["row"] is not None]
        ended = sum(one["ended"] for one in found)
        if not rows:
            raise DataError(
                f"of {len(found)} answers of the base none can be learnt from: {ended} came to an "
                f"end within {how.max_new_tokens} tokens, and those say nothing",
                hint="--set data.write_with_base.max_new_tokens=1024, or a base that was trained "
                "to answer",
            )
        text = "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / TEXT, text)
        facts = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        facts |= {
            "rows": len(rows),
            "tokens": sum(one["tokens"] for one in found if one["row"] is not None),
            "ended": ended,
            "fingerprint": blake2b(text.encode(), digest_size=8).hexdigest(),
            **{name: value for name, value in asdict(how).items() if name != "ends"},
        }
        write_json(folder / FACTS, facts)
    shutil.rmtree(folder / BATCHES, ignore_errors=True)
    (folder / PROMPTS).unlink(missing_ok=True)
    known: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return known


def _batches(folder: Path, size: int) -> Iterator[list[dict[str, Any]]]:
    with (folder / PROMPTS).open(encoding="utf-8") as lines:
        while batch := [json.loads(line) for line in islice(lines, size)]:
            yield batch


def _batch_file(folder: Path, number: int) -> Path:
    return folder / BATCHES / f"{number}.json"


def _rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def _seed(seed: int, number: int) -> int:
    digest = blake2b(f"{seed} {number}".encode(), digest_size=8, person=b"base writes").digest()
    return int.from_bytes(digest, "big") >> 1
