"""Several texts as one: the rows of a mixture, each text prepared or streamed by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import blake2b
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from dllm_convert.errors import DataError
from dllm_convert.training.data.packing import Layout, pack
from dllm_convert.training.data.preparation import Preparation, Text
from dllm_convert.training.data.reading import Split
from dllm_convert.training.data.rows import PackedText
from dllm_convert.training.data.store import Store
from dllm_convert.training.data.streaming import StreamedRows, TextStream
from dllm_convert.training.data.turns import Turns


@dataclass(frozen=True)
class Mixture:
    """Texts that take turns.

    Attributes:
        texts: Each of them, with rows, epochs and an order of its own.
        turns: Whose turn it is.
    """

    texts: tuple[PackedText | TextStream, ...]
    turns: Turns

    @property
    def layout(self) -> Layout:
        """What rows look like."""
        return self.texts[0].layout

    @property
    def streams(self) -> bool:
        """Whether any of the texts is read while training goes on."""
        return any(isinstance(text, TextStream) for text in self.texts)

    def row(self, number: int) -> dict[str, Any]:
        """Return the `number`-th row of training, where no text is streamed."""
        text, own = self.turns.of(number)
        found = self.texts[text]
        if isinstance(found, TextStream):
            raise TypeError("a stream has no rows by number")
        return found.row(own)


class MixedRows(IterableDataset[dict[str, Any]]):
    """The rows of a mixture of which a text is streamed, from a number on, without end.

    Row k is a function of the texts, their shares, the seed and k, as of a single stream.

    Args:
        mixture: The texts.
        start: Rows that were trained on already.
    """

    def __init__(self, mixture: Mixture, start: int) -> None:
        self._mixture = mixture
        self._start = start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield columns of shape (length,), as `build_row` gives them."""
        if get_worker_info() is not None:
            raise ValueError("a stream reads ahead in a thread: dataloader_num_workers must be 0")
        texts, turns = self._mixture.texts, self._mixture.turns
        with ExitStack() as open_streams:
            rows = [
                open_streams.enter_context(closing(_rows(text, trained)))
                for text, trained in zip(texts, turns.counts(self._start), strict=True)
            ]
            for number in count(self._start):
                yield next(rows[turns.of(number)[0]])


def _rows(text: PackedText | TextStream, start: int) -> Any:
    """Return a generator of a text's rows from a number on."""
    if isinstance(text, TextStream):
        return iter(StreamedRows(text, start))
    return (text.row(number) for number in count(start))


@dataclass(frozen=True)
class MixedText:
    """A mixture on both sides of the split.

    Attributes:
        train: What is trained on.
        held_out: Documents that are not, of each text; of one text, where another is measured on.
        turns: Whose turn it is among those that are held out.
        facts: Counts for the manifest, of all and of each.
    """

    train: Mixture
    held_out: tuple[Store, ...]
    turns: Turns
    facts: dict[str, Any]


def mix(whole: Preparation) -> MixedText:
    """Read the texts of a mixture, each into a folder of its own, and hold documents out.

    Each text holds documents out by their content, so that copies fall on the same side in all of
    them; what one text holds out because it has little is taken out of the others too.

    Args:
        whole: How the mixture is read; its recipe names the texts.

    Raises:
        DataError: There is too little of a text, on either side.
    """
    elsewhere = whole.elsewhere()
    given, known = (None, {}) if elsewhere is None else elsewhere
    shares = [share for share, _ in whole.recipe.data.texts]
    found = [part.read(given) for part in parts_of(whole)]
    stores = tuple(text.held_out for text in found)
    if given is None:
        found = [
            _without(text, [store for other, store in enumerate(stores) if other != number])
            for number, text in enumerate(found)
        ]
    train = Mixture(tuple(text.train for text in found), Turns(shares))
    facts = _facts(whole, found, shares) | known
    if given is not None:
        facts["held_out_documents"] = len(given)  # the same ones beside each text
        return MixedText(train, (given,), Turns([Fraction(1)]), facts)
    return MixedText(train, stores, Turns(shares), facts)


def parts_of(whole: Preparation) -> list[Preparation]:
    """Return how each text of a mixture is read."""
    return [
        replace(
            whole,
            recipe=whole.recipe.model_copy(update={"data": data}),
            folder=whole.folder / f"text-{number}",
            share=share,
        )
        for number, (share, data) in enumerate(whole.recipe.data.texts)
    ]


def _without(text: Text, held_out: list[Store]) -> Text:
    """Return a text of which nothing is trained on that another one holds out.

    Raises:
        DataError: Nothing is left.
    """
    keys = np.unique(np.concatenate([store.keys for store in held_out]))
    train = text.train
    if isinstance(train, TextStream):
        # A document that its own text holds out anyway need not be named.
        further = frozenset(int(key) for key in keys if int(key) >= train.split.below)
        kept = Split(train.split.below, train.split.keys | further)
        return replace(text, train=replace(train, split=kept))
    copies = np.isin(train.store.keys, keys)
    if not copies.any():
        return text
    store = train.store.choose(~copies)
    packing = pack(store.lengths, store.chats, train.layout)
    if not packing.rows:
        raise DataError(
            f"--data {text.facts['source']}: all of it is held out of another text of the mixture",
            hint="Leave one of them out, or name slices that do not overlap",
        )
    facts = text.facts | {
        "documents": len(store),
        "chats": int(store.chats.sum()),
        "train_tokens": store.size,
        "rows": packing.rows,
        "padding_share": round(packing.padding_share, 4),
    }
    return replace(text, train=replace(train, store=store, packing=packing), facts=facts)


_ADDED = (
    *("documents", "chats", "train_tokens", "rows", "held_out_documents"),
    *("read", "empty", "silent", "truncated", "spelled"),
)
"""Counts of a mixture that are those of its texts together, where each has them."""


def _facts(whole: Preparation, found: list[Text], shares: list[Fraction]) -> dict[str, Any]:
    """Return what is known of a mixture and of each of its texts."""
    each = [text.facts for text in found]
    asked = [data for _, data in whole.recipe.data.texts]
    where = ("subset", "split", "containing")
    fingerprints = " ".join(str(facts["fingerprint"]) for facts in each)
    together = {
        name: sum(facts[name] for facts in each)
        for name in _ADDED
        if all(name in facts for facts in each)
    }
    padded = [facts["padding_share"] for facts in each if "padding_share" in facts]
    if len(padded) == len(each):
        weighed = sum(float(share) * own for share, own in zip(shares, padded, strict=True))
        together["padding_share"] = round(weighed, 4)
    return {
        "source": whole.recipe.data.source,
        "kind": "mixture",
        "revision": None,
        "streaming": any(facts["streaming"] for facts in each),
        "left_out": [name for facts in each for name in facts["left_out"]],
        "fingerprint": blake2b(fingerprints.encode(), digest_size=8).hexdigest(),
        **together,
        "texts": [
            {"share": float(share)}
            | {name: getattr(text, name) for name in where if getattr(text, name) is not None}
            | facts
            for share, text, facts in zip(shares, asked, each, strict=True)
        ],
    }
