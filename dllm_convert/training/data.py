"""Text to training rows: tokenise, hold some documents out, cut and pack."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset

from dllm_convert.console import Reporter
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.errors import DataError
from dllm_convert.schema import Recipe
from dllm_convert.training.documents import kind_of, read_documents


@dataclass(frozen=True)
class TextData:
    """Training rows and held-out text.

    Attributes:
        train: Rows of `input_ids`, `segment_ids`, `position_ids`, each of the recipe's length.
        held_out: Batches of text that is never trained on.
        facts: Counts for the manifest.
    """

    train: Dataset
    held_out: tuple[TextBatch, ...]
    facts: dict[str, Any]


@dataclass
class Row:
    """A row being packed: tokens with the document and the position of each."""

    tokens: list[int]
    segments: list[int]
    positions: list[int]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise one document the way the base was trained to see it, ended by its end token."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    return ids


def pack(documents: Iterable[list[int]], length: int, pad: int) -> list[Row]:
    """Cut documents into pieces of at most `length` tokens and pack the pieces into rows.

    A piece counts its positions from 0 and never sees its neighbours, so packing changes nothing
    but speed (LLaDA2 finds that confining attention to the document trains best). Pieces of one
    token have nothing to predict and are left out.

    Args:
        documents: Token ids of each document.
        length: Tokens per row.
        pad: Token that fills the end of a row; its segment is -1.

    Returns:
        Rows of exactly `length` tokens.
    """
    rows: list[Row] = []
    open_row = Row([], [], [])
    for ids in documents:
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) < 2:
                continue
            row = Row([], [], []) if len(piece) == length else open_row
            if len(row.tokens) + len(piece) > length:
                rows.append(row)
                row = open_row = Row([], [], [])
            segment = row.segments[-1] + 1 if row.segments else 0
            row.tokens += piece
            row.segments += [segment] * len(piece)
            row.positions += range(len(piece))
            if row is not open_row:
                rows.append(row)
    if open_row.tokens:
        rows.append(open_row)
    for row in rows:
        missing = length - len(row.tokens)
        row.tokens += [pad] * missing
        row.segments += [-1] * missing
        row.positions += [0] * missing
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack dataset rows into tensors of shape (batch, length)."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def text_batch(columns: dict[str, torch.Tensor]) -> TextBatch:
    """View collated columns as clean text."""
    return TextBatch(columns["input_ids"], columns["segment_ids"], columns["position_ids"])


def _dataset(rows: list[Row]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [row.tokens for row in rows],
            "segment_ids": [row.segments for row in rows],
            "position_ids": [row.positions for row in rows],
        }
    )


def _split(
    documents: Iterator[list[int]], recipe: Recipe
) -> tuple[list[list[int]], list[list[int]]]:
    """Hold out whole documents; read only as many as the training steps will see."""
    data, wanted = recipe.data, recipe.training_tokens
    wanted_held_out = data.held_out_sequences * data.sequence_length
    draw = random.Random(recipe.training.seed)  # noqa: S311
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    train_tokens = held_out_tokens = 0
    for ids in documents:
        if draw.random() < data.held_out_fraction:
            held_out.append(ids)
            held_out_tokens += len(ids)
        else:
            train.append(ids)
            train_tokens += len(ids)
        if train_tokens >= 2 * wanted and held_out_tokens >= wanted_held_out:
            break
    if len(train) + len(held_out) > 1 and (not train or not held_out):
        full = train or held_out
        train, held_out = full[:-1], full[-1:]
    elif len(train) + len(held_out) == 1:
        (only,) = train + held_out
        cut = max(1, int(len(only) * (1 - data.held_out_fraction)))
        train, held_out = [only[:cut]], [only[cut:]]
    return train, held_out


def prepare_data(recipe: Recipe, tokenizer: Any, reporter: Reporter) -> TextData:
    """Read, tokenise, split and pack the recipe's text.

    Args:
        recipe: The resolved recipe.
        tokenizer: The converted checkpoint's tokenizer.
        reporter: Progress.

    Returns:
        Rows to train on and batches to measure on; the same for the same recipe and files.

    Raises:
        DataError: If there is no text, or less of it than one block to train or to measure on.
    """
    data = recipe.data
    with reporter.task(f"read {data.source}") as task:

        def encoded() -> Iterator[list[int]]:
            for text in islice(read_documents(data), data.max_documents):
                task.advance()
                yield encode(tokenizer, text)

        train, held_out = _split(encoded(), recipe)
    if not train and not held_out:
        raise DataError(
            f"--data {data.source} holds no text", hint="Give files with at least one paragraph"
        )
    smallest = recipe.block_size or 2
    for name, part in (("training", train), ("held-out", held_out)):
        tokens = sum(map(len, part))
        if tokens < max(smallest, 2):
            raise DataError(
                f"--data {data.source} leaves {tokens} {name} tokens, "
                f"fewer than one block of {smallest}",
                hint="Give more text, a smaller --block, or --set data.held_out_fraction=0.5",
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    train_rows = pack(train, data.sequence_length, pad)
    order = random.Random(recipe.training.seed)  # noqa: S311
    held_out_rows = pack(held_out, data.sequence_length, pad)
    order.shuffle(held_out_rows)
    measured = _dataset(held_out_rows[: data.held_out_sequences])
    size = recipe.training.batch_size
    batches = tuple(
        text_batch(collate([measured[i] for i in range(start, min(start + size, len(measured)))]))
        for start in range(0, len(measured), size)
    )
    facts = {
        "source": data.source,
        "kind": kind_of(data.source),
        "documents": len(train),
        "held_out_documents": len(held_out),
        "train_tokens": sum(map(len, train)),
        "held_out_tokens": int(sum(batch.scorable.sum() for batch in batches)),
    }
    return TextData(_dataset(train_rows), batches, facts)
