"""Datasets of the Hub, streamed shard by shard at a pinned commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dllm_convert.errors import DllmConvertError, HubError
from dllm_convert.recipe.schema import Data
from dllm_convert.source.hub_errors import hub_errors, transport_error
from dllm_convert.training.data.corpus import Corpus, Shard
from dllm_convert.training.data.documents import dataset_rows
from dllm_convert.training.data.file_rows import Row
from dllm_convert.training.data.messages import BESIDE_CHATS, CHAT_COLUMNS


def open_hub_dataset(data: Data) -> Corpus:
    """Find a dataset on the Hub and pin its commit; no text is read yet.

    Args:
        data: `source` is its id; `subset`, `split` and `revision` say which part.

    Raises:
        HubError: If it is unknown, private, gated, unreachable, or has no such subset or split.
    """
    import datasets
    from huggingface_hub import HfApi

    with _explained(data):
        commit = HfApi().dataset_info(data.source, revision=data.revision).sha
        dataset = datasets.load_dataset(
            data.source, name=data.subset, split=data.split, revision=commit, streaming=True
        )
        if dataset.column_names:
            dataset = dataset.select_columns(_needed(dataset.column_names, data))
    split = (dataset.info.splits or {}).get(data.split)
    shards = tuple(
        Shard(f"dataset {data.source}", "row", partial(_read, dataset, number, data))
        for number in range(dataset.num_shards)
    )
    size, rows = (split.num_bytes, split.num_examples) if split else (None, None)
    return Corpus(data.source, "hub", shards, commit, size or None, rows=rows or None)


def _needed(columns: list[str], data: Data) -> list[str]:
    """Columns that are read; all of them if none is known, so that an error can name them."""
    named = {*data.columns.named.values()}
    if named:
        return sorted(named & {*columns}) or columns
    if data.text_field in columns:
        return sorted({data.text_field} | (BESIDE_CHATS & {*columns}))
    needed = frozenset().union(*(names for names in CHAT_COLUMNS if names <= {*columns}))
    return sorted(needed | (BESIDE_CHATS & {*columns})) if needed else columns


def _read(dataset: Any, number: int, data: Data, start: int) -> Iterator[Row]:
    with _explained(data):
        yield from dataset_rows(dataset.shard(dataset.num_shards, number), start)


@contextmanager
def _explained(data: Data) -> Iterator[None]:
    """Turn what reading a dataset raises into a HubError that says what to do."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        with hub_errors(f"dataset {data.source}", data.revision):
            yield
    except DllmConvertError as error:
        local = "or train on files: --data 'texts/*.txt'"
        raise HubError(
            f"no dataset {data.source!r} could be read from the Hub ({error.message})",
            hint=f"{error.hint or 'Check the id and the network'}, {local}",
        ) from error
    except (DatasetNotFoundError, transport_error(), OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise HubError(
            f"dataset {data.source!r} cannot be read ({reason})", hint=_hint(reason)
        ) from error


def _hint(reason: str) -> str:
    said = reason.lower()
    if "config name is missing" in said or "builderconfig" in said:
        return "Name one with --set data.subset=NAME"
    if "split" in said:
        return "Name one with --set data.split=NAME"
    if "script" in said:
        return "Datasets that run code are not read; look for a parquet version of it"
    if "gated" in said:
        return "Ask for access on its page, then `hf auth login` or set HF_TOKEN"
    return "Check the id and the network, or train on files: --data 'texts/*.txt'"
