"""From a recipe to text that is ready to train on and text that is held out, each read once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from dllm_convert.common.counts import LARGEST_COUNT
from dllm_convert.common.json_files import write_json
from dllm_convert.common.ranks import ALONE, Rank
from dllm_convert.errors import DataError
from dllm_convert.modeling.text_bounds import end_token
from dllm_convert.recipe.schema import Data, Recipe
from dllm_convert.training.data.corpus import Corpus
from dllm_convert.training.data.documents import no_text, open_corpus
from dllm_convert.training.data.encoding import KEYS, Encoder
from dllm_convert.training.data.packing import Layout, pack
from dllm_convert.training.data.reading import Need, Reader, Split
from dllm_convert.training.data.rows import PackedText
from dllm_convert.training.data.store import Store
from dllm_convert.training.data.streaming import TextStream

PREPARED_AT_MOST = 1 << 26
"""Tokens of a training up to which a Hub dataset is tokenised before it: a minute or two."""
BYTES_PER_TOKEN = 4
"""English under a vocabulary of 50,000 to 150,000 tokens; only compared with, never counted."""
CHOICE = 4
"""Held-out text to choose from, in multiples of what is measured."""
FACTS, STREAM = "facts.json", "stream.json"


@dataclass(frozen=True)
class Text:
    """Text on both sides of the split.

    Attributes:
        train: What is trained on.
        held_out: Documents that are not.
        facts: Counts for the manifest.
    """

    train: PackedText | TextStream
    held_out: Store
    facts: dict[str, Any]


def layout_of(recipe: Recipe, tokenizer: Any) -> Layout:
    """Return what rows look like: which documents are filled up, to what, with which token.

    Raises:
        DataError: If padding is to be supervised and there is no end token to supervise.
    """
    data, block = recipe.data, recipe.block_size if recipe.target == "bd3lm" else None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if data.supervise_padding:
        end = end_token(tokenizer)
        if end is None:
            raise DataError(
                "data.supervise_padding needs an end token, and the tokenizer has none",
                hint="--set data.supervise_padding=false",
            )
        unit = block or data.sequence_length
        return Layout(data.sequence_length, pad, end, unit, unit, fill_scored=True)
    mask = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else pad
    on = {"on": (True, True), "auto": (False, True), "off": (False, False)}[data.fill_blocks]
    text, chat = (block if wanted and block else 1 for wanted in on)
    return Layout(data.sequence_length, pad, mask, text, chat)


@dataclass
class Preparation:
    """Reads what a recipe asks for, or finds what an earlier call read.

    Attributes:
        recipe: The resolved recipe.
        tokenizer: The converted checkpoint's tokenizer.
        folder: Where tokens are kept.
        advance: Told how many documents were read.
        place: This process among those that train.
        share: Part of the training's sequences that are of this text.
        measures: Text whose held-out documents are measured, where that is not the one that is
            trained on because a base wrote that from it.
    """

    recipe: Recipe
    tokenizer: Any
    folder: Path
    advance: Callable[[int], None]
    place: Rank = ALONE
    share: Fraction = Fraction(1)
    measures: Data | None = None

    def finish(self) -> Text:
        """Read and split.

        Raises:
            DataError: If there is too little text on either side.
        """
        elsewhere = self.elsewhere()
        if elsewhere is None:
            return self.read(None)
        held_out, measured = elsewhere
        text = self.read(held_out)
        return replace(text, facts=text.facts | measured)

    def elsewhere(self) -> tuple[Store, dict[str, Any]] | None:
        """Read the text to measure on and what to say of it; None if the recipe names none."""
        asked = self._elsewhere
        self.folder.mkdir(parents=True, exist_ok=True)
        if asked is None and self.measures is not None:
            split = Split.by_fraction(self.measures.held_out_fraction)
            return self._read("held_out", self.measures, Need(split, 0, self._choice))[0], {}
        if asked is None:
            return None
        store, known = self._read("held_out", asked, Need(Split(KEYS), 0, self._choice))
        part: dict[str, Any] = {}
        if known["kind"] == "hub":
            part = {"subset": asked.subset, "split": asked.split}
        elif "[" in asked.split:
            part = {"split": asked.split}
        if asked.containing is not None:
            part["containing"] = asked.containing
        return store, {"held_out": {n: known[n] for n in ("source", "kind", "revision")} | part}

    def read(self, held_out: Store | None) -> Text:
        """Read what is trained on.

        Args:
            held_out: What is measured on, if that is another text; no copy of it is trained on.

        Raises:
            DataError: If there is too little text.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        split = Split.by_fraction(self.recipe.data.held_out_fraction)
        if held_out is not None:
            split = Split(0, frozenset(held_out.keys.tolist()))
        return self._stream(split, held_out) if self._streams else self._prepare(split, held_out)

    def measured(self, *, held_out: bool) -> tuple[Store, dict[str, Any]]:
        """Read all of the text, or all that is never trained on, to measure on it.

        Args:
            held_out: Whether to leave out what training on this text would have seen.

        Raises:
            DataError: If there is too little of it.
        """
        data = self.recipe.data
        self.folder.mkdir(parents=True, exist_ok=True)
        if held_out and self._elsewhere is not None:
            raise DataError(
                f"all of --data {data.source} was trained on: the recipe measures on another text",
                hint=f"--data {data.held_out_source or data.source}, or a text of your own",
            )
        corpus = open_corpus(data)
        # Of a dataset of terabytes, as much as a run chooses from.
        most = self._choice if corpus.kind == "hub" else LARGEST_COUNT
        split = Split.by_fraction(data.held_out_fraction)
        whole = corpus.kind != "hub" or not held_out
        need = Need(Split(KEYS) if whole else split, 0, most)
        store, facts = self._read("measured", data, need, lambda: corpus)
        if held_out and whole:
            _, store = divide(store, split, data.held_out_fraction)
        self._check(len(store), {"scored": store}, facts["silent"])
        return store, facts

    def _prepare(self, split: Split, held_out: Store | None) -> Text:
        data = self.recipe.data
        wanted = 2 * self._tokens
        need = Need(split, wanted, 0 if held_out is not None else self._choice)
        store, facts = self._read("text", data, need, self._corpus_to_train)
        train = store
        if held_out is None:
            train, held_out = divide(store, split, data.held_out_fraction)
        parts = {"training": train, "held-out": held_out}
        self._check(len(store) + len(held_out), parts, facts["silent"])
        layout = layout_of(self.recipe, self.tokenizer)
        packing = pack(train.lengths, train.chats, layout)
        facts |= {
            "fingerprint": blake2b(store.keys.tobytes(), digest_size=8).hexdigest(),
            "documents": len(train),
            "chats": int(train.chats.sum()),
            "train_tokens": train.size,
            "rows": packing.rows,
            "padding_share": round(packing.padding_share, 4),
            "held_out_documents": len(held_out),
        }
        return Text(PackedText(train, packing, layout, self.recipe.training.seed), held_out, facts)

    def _stream(self, split: Split, held_out: Store | None) -> Text:
        data, corpus = self.recipe.data, self._opened
        silent = 0
        if held_out is None:
            need = Need(split, 0, self._choice)
            held_out, found = self._read("held_out", data, need, lambda: corpus)
            silent = found["silent"]
        self._check(len(held_out), {"held-out": held_out}, silent)
        facts = {
            **self._facts(corpus),
            "streaming": True,
            "fingerprint": corpus.revision,
            # Those that were looked at before training; whether there are any is what matters.
            "chats": int(held_out.chats.sum()),
            "held_out_documents": len(held_out),
        }
        stream = TextStream(
            Reader(corpus, data, Encoder(self.tokenizer, data)),
            split,
            layout_of(self.recipe, self.tokenizer),
            self.recipe.training.seed,
            self.folder / "bookmarks.jsonl",
            writes=self.place.main,
        )
        return Text(stream, held_out, facts)

    @cached_property
    def _elsewhere(self) -> Data | None:
        """The text that is measured on, where the recipe names some."""
        data = self.measures or self.recipe.data
        if data.held_out_source is None and data.held_out_split is None:
            return None
        same = data.held_out_source in (None, data.source)
        return data.model_copy(
            update={
                "source": data.held_out_source or data.source,
                "split": data.held_out_split or data.split,
                "subset": data.subset if same else None,
                "containing": data.containing if same else None,
                "mixture": (),
                "revision": data.revision if same else None,
                "max_documents": None,
            }
        )

    @property
    def _choice(self) -> int:
        data = self.recipe.data
        return ceil(CHOICE * data.held_out_sequences * data.sequence_length * self.share)

    @property
    def _tokens(self) -> int:
        """Tokens of all steps over all processes: what is read does not depend on their number."""
        return ceil(self.recipe.training_tokens * self.place.world * self.share)

    @cached_property
    def _opened(self) -> Corpus:
        """The corpus to train on, at the commit at which an earlier call found it."""
        data, path = self.recipe.data, self.folder / STREAM
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            data = data.model_copy(update=known)
        return open_corpus(data)

    def _corpus_to_train(self) -> Corpus:
        return self._opened

    @cached_property
    def _streams(self) -> bool:
        """Whether to read while training goes on; decided once for a folder."""
        if (self.folder / "text" / FACTS).exists():
            return False
        if (self.folder / STREAM).exists():
            return True
        wanted, corpus = self.recipe.data.streaming, self._opened
        large = corpus.size is None or corpus.size > self._tokens * BYTES_PER_TOKEN
        long = self._tokens > PREPARED_AT_MOST
        if wanted == "on" or (wanted == "auto" and corpus.kind == "hub" and long and large):
            write_json(self.folder / STREAM, {"revision": corpus.revision})
            return True
        return False

    def _read(
        self, name: str, data: Data, need: Need, find: Callable[[], Corpus] | None = None
    ) -> tuple[Store, dict[str, Any]]:
        """Tokenise part of a corpus into a folder, or open what an earlier call left there."""
        place = self.folder / name
        if not (place / FACTS).exists():
            partial = self.folder / f"{name}.partial"
            for leftover in (place, partial):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            corpus = find() if find else open_corpus(data)
            reader = Reader(corpus, data, Encoder(self.tokenizer, data))
            reader.write(partial, need, self.advance)
            write_json(partial / FACTS, {**self._facts(corpus), **reader.tally.as_dict()})
            partial.rename(place)
        facts: dict[str, Any] = json.loads((place / FACTS).read_text(encoding="utf-8"))
        return Store.open(place), facts

    def _facts(self, corpus: Corpus) -> dict[str, Any]:
        return {
            "source": corpus.name,
            "kind": corpus.kind,
            "revision": corpus.revision,
            "streaming": False,
            "left_out": [Path(name).name for name in corpus.left_out],
        }

    def _check(self, documents: int, parts: dict[str, Store], silent: int) -> None:
        data = self.recipe.data
        source = data.source
        if not documents and silent:
            raise DataError(
                f"--data {source} holds nothing to learn from: in {silent} conversations the "
                "assistant says nothing, its answers are left out by their weight, or it speaks "
                f"beyond the {data.sequence_length} tokens of data.sequence_length",
                hint="Look at the roles and weights of the messages, or raise data.sequence_length",
            )
        if not documents:
            raise no_text(source)
        smallest = max(self.recipe.block_size or 2, 2)
        for name, part in parts.items():
            if part.size < smallest:
                raise DataError(
                    f"--data {source} leaves {part.size} {name} tokens, "
                    f"fewer than one block of {smallest}",
                    hint="Give more text, a smaller --block, or --set data.held_out_fraction=0.5",
                )


def divide(store: Store, split: Split, fraction: float) -> tuple[Store, Store]:
    """Return the documents to train on and those that are held out, neither of them empty.

    Where chance leaves one side empty, the documents with the smallest or the largest key make it
    up; a single document is cut in two.

    Args:
        store: All documents.
        split: Which of them are held out.
        fraction: Share of a single document that is held out.
    """
    held_out = split.mask(store.keys)
    if held_out.all() or not held_out.any():
        keys = np.unique(store.keys)
        if len(keys) == 1:
            return store.cut_in_two(max(1, int(store.lengths[0] * (1 - fraction))))
        if len(keys) > 1:
            held_out = store.keys < (keys[-1] if held_out.all() else keys[1])
    return store.choose(~held_out), store.choose(held_out)
