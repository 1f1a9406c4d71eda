"""Text to training rows: tokenise, hold documents out, cut and pack.

Text is either tokenised before training, into a file whose rows are then drawn by number, or
streamed. Which documents are held out depends on their content alone, so no copy of one is ever
trained on, and the same documents are measured however the rest is read.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dllm_convert.common.console import Reporter
from dllm_convert.common.ranks import ALONE, Rank
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.recipe.schema import Columns, Data, Recipe
from dllm_convert.recipe.splits import SPLIT
from dllm_convert.training.base_text import TEXT
from dllm_convert.training.data.mixing import MixedRows, MixedText, Mixture, mix, parts_of
from dllm_convert.training.data.packing import Layout, pack
from dllm_convert.training.data.preparation import Preparation, Text, layout_of
from dllm_convert.training.data.reading import permutation
from dllm_convert.training.data.rows import NumberedRows, PackedText, collate, text_batch
from dllm_convert.training.data.store import Store, build_row
from dllm_convert.training.data.streaming import StreamedRows, TextStream
from dllm_convert.training.data.turns import Turns


@dataclass(frozen=True)
class TextData:
    """Text to train on and held-out text.

    Attributes:
        train: The text, prepared or streamed.
        held_out: Batches of text that is never trained on.
        facts: Counts for the manifest.
        keep: What has to live as long as the data.
    """

    train: PackedText | TextStream | Mixture
    held_out: tuple[TextBatch, ...]
    facts: dict[str, Any]
    keep: Any = field(default=None, repr=False)

    @property
    def streaming(self) -> bool:
        """Whether the text is read while training goes on."""
        if isinstance(self.train, Mixture):
            return self.train.streams
        return isinstance(self.train, TextStream)

    def rows_in(self, times: int) -> int | None:
        """Rows in which no text is read more often than so many times; None if streams bound none.

        Args:
            times: Epochs of the text, of a mixture of the one that is read most often.
        """
        if isinstance(self.train, TextStream):
            return None
        if isinstance(self.train, PackedText):
            return times * self.train.packing.rows
        shares = self.train.turns.shares
        ends = [
            int(times * text.packing.rows / share)
            for text, share in zip(self.train.texts, shares, strict=True)
            if isinstance(text, PackedText)
        ]
        return min(ends, default=None)

    def training_rows(self, *, start: int, total: int) -> Dataset[dict[str, Any]]:
        """Return the rows of a training, for `collate`.

        Args:
            start: Rows that were trained on before an interruption, over all processes.
            total: Rows of all steps, over all processes.

        Returns:
            Prepared text: all rows by number, to be read in their order from `start` on. A stream:
            the rows from `start` on.
        """
        if isinstance(self.train, Mixture) and self.train.streams:
            return MixedRows(self.train, start)
        if isinstance(self.train, TextStream):
            return StreamedRows(self.train, start)
        return NumberedRows(self.train, total)


def prepare_data(
    recipe: Recipe,
    tokenizer: Any,
    reporter: Reporter,
    folder: Path | None = None,
    place: Rank = ALONE,
    written: Path | None = None,
) -> TextData:
    """Read, tokenise, split and pack the recipe's text.

    Several processes may call it at once with one folder: the first reads, the others wait for it.

    Args:
        recipe: The resolved recipe.
        tokenizer: The converted checkpoint's tokenizer.
        reporter: Progress.
        folder: Where tokens are kept, for a later call on the same recipe to find them; a temporary
            one if None.
        place: This process among those that train on it: how much is read depends on how many.
        written: What the base wrote from the recipe's text, as `base_text.gather` left it, to train
            on in its place; measured is the recipe's.

    Returns:
        Rows to train on and batches to measure on; the same for the same recipe and text.

    Raises:
        DataError: If there is no text, less of it than one block to train or to measure on, or
            something else than text.
        HubError: If a Hub dataset cannot be read.
    """
    keep = None
    if folder is None:
        keep = tempfile.TemporaryDirectory(prefix="dllm-convert-")
        folder = Path(keep.name)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), reporter.task(f"read {recipe.data.source}") as task:
        preparation = Preparation(recipe, tokenizer, folder, task.advance, place)
        if written is not None:
            preparation = replace(
                preparation,
                recipe=recipe.model_copy(update={"data": own_text(recipe.data, written)}),
                measures=recipe.data,
            )
        text = _read(preparation)
    if beside := text.facts.get("left_out"):
        some = ", ".join(beside[:5]) + (f" and {len(beside) - 5} more" if beside[5:] else "")
        reporter.line(f"left out of --data {recipe.data.source}: {some}")
    rows = _measured_rows(text, recipe.data.held_out_sequences)
    size = recipe.training.sequences_per_forward
    held_out = tuple(
        text_batch(collate(rows[start : start + size])) for start in range(0, len(rows), size)
    )
    measured = int(sum(batch.scorable.sum() for batch in held_out))
    return TextData(text.train, held_out, {**text.facts, "held_out_tokens": measured}, keep)


def own_text(data: Data, written: Path) -> Data:
    """Return what is trained on of what a base wrote.

    Args:
        data: The text it wrote that from.
        written: The folder it lies in.
    """
    return data.model_copy(
        update={
            "source": str(written / TEXT),
            "subset": None,
            "split": SPLIT,
            "revision": None,
            "text_field": "text",
            "columns": Columns(),
            "containing": None,
            "streaming": "off",
            "max_documents": None,
        }
    )


def text_to_measure(
    recipe: Recipe, tokenizer: Any, reporter: Reporter, *, held_out: bool
) -> tuple[tuple[TextBatch, ...], dict[str, Any]]:
    """Read and pack all of a text to measure on; none of it is trained on.

    Args:
        recipe: The resolved recipe; its `data.source` names the text.
        tokenizer: The converted checkpoint's tokenizer.
        reporter: Progress.
        held_out: Take only documents that training on this text holds out.

    Returns:
        Batches, and counts.

    Raises:
        DataError: If there is no text, or something else than text.
        HubError: If a Hub dataset cannot be read.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dllm-convert-") as folder,
        reporter.task(f"read {recipe.data.source}") as task,
    ):
        preparation = Preparation(recipe, tokenizer, Path(folder), task.advance)
        parts = parts_of(preparation) if recipe.data.mixture else [preparation]
        found = [part.measured(held_out=held_out) for part in parts]
        layout = layout_of(recipe, tokenizer)
        rows = [row for store, _ in found for row in _all_rows(store, layout)]
    size = recipe.training.sequences_per_forward
    batches = tuple(
        text_batch(collate(rows[start : start + size])) for start in range(0, len(rows), size)
    )
    scored = int(sum(batch.scorable.sum() for batch in batches))
    documents = sum(len(store) for store, _ in found)
    facts = found[0][1] if len(found) == 1 else {}
    return batches, {**facts, "documents": documents, "rows": len(rows), "tokens": scored}


def _read(preparation: Preparation) -> MixedText | Text:
    return mix(preparation) if preparation.recipe.data.mixture else preparation.finish()


def _all_rows(store: Store, layout: Layout) -> list[dict[str, Any]]:
    packing = pack(store.lengths, store.chats, layout)
    return [build_row(store, packing, row, layout) for row in range(packing.rows)]


def _measured_rows(text: MixedText | Text, count: int) -> list[dict[str, Any]]:
    """Choose the rows that are measured: the same ones whatever the training's seed is.

    The texts of a mixture are measured by their shares, as long as they last.
    """
    layout = text.train.layout
    stores, turns = (
        (text.held_out, text.turns)
        if isinstance(text, MixedText)
        else ((text.held_out,), Turns([Fraction(1)]))
    )
    packings = [pack(store.lengths, store.chats, layout) for store in stores]
    orders = [permutation(packing.rows, 0) for packing in packings]
    rows = []
    for number in range(count):
        which, own = turns.of(number)
        if own < packings[which].rows:
            row = int(orders[which][own])
            rows.append(build_row(stores[which], packings[which], row, layout))
    return rows


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
