"""Write a conversion in an engine's layout: refuse, describe, write, prove, explain."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_files
from dllm_convert.common.disk import sync_tree, writing
from dllm_convert.common.json_files import write_config
from dllm_convert.common.manifest import EXPORT_FILE
from dllm_convert.common.tables import Block, Printed
from dllm_convert.common.version import __version__
from dllm_convert.errors import DataError, IncompatibleError, RequestError
from dllm_convert.modeling.converted_config import (
    check_converted_config,
    read_converted_config,
    read_section,
)
from dllm_convert.planning.layouts.gguf import GgufLayout
from dllm_convert.planning.layouts.registry import target_of
from dllm_convert.planning.layouts.target import Converted, Layout, Target
from dllm_convert.serving.dangers import check, measure
from dllm_convert.serving.engines import engines_of
from dllm_convert.serving.guide import guide
from dllm_convert.serving.llama_cpp import require_llama_cpp
from dllm_convert.serving.origin import conversion_facts
from dllm_convert.serving.proof import Proof, as_section, prove_by_engine
from dllm_convert.serving.spans import (
    Piece,
    Vocabulary,
    entries_of,
    moved,
    shut,
    unused,
    whole,
)
from dllm_convert.serving.writing import prove, write_pieces
from dllm_convert.source.folder import LICENCE_FILES, file_names, matching
from dllm_convert.source.safetensors_header import (
    TORCH_NAMES,
    Header,
    TensorEntry,
    read_checkpoint,
)
from dllm_convert.source.tokenizer_files import SIDE_FILES, VOCABULARY_FILES, read_tokenizer

RECORD = EXPORT_FILE
"""What was exported from what, with hashes of both."""
_SHOWN_TOPICS = 6


@dataclass(frozen=True)
class Export(Printed):
    """What an export is.

    Attributes:
        path: The folder.
        target: Name of the layout.
        engines: Who reads it.
        ways: Name of a weight file to how it came about.
        checked: What was checked, and what came of it.
        launch: How to start an engine.
    """

    path: Path
    target: str
    engines: tuple[str, ...]
    ways: Mapping[str, str]
    checked: Mapping[str, str]
    launch: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what `export --json` prints."""
        return {
            "path": str(self.path),
            "target": self.target,
            "engines": list(self.engines),
            "ways": dict(self.ways),
            "checked": dict(self.checked),
            "launch": list(self.launch),
        }

    def as_blocks(self) -> list[Block]:
        """Return what a person sees."""
        checked = [f"  {what}: {found}" for what, found in self.checked.items()]
        return [
            f"Export for {' and '.join(self.engines)}: {self.path}",
            "Checked",
            *checked,
            *(["Start it with"] if self.launch else []),
            *(f"  {line}" for line in self.launch),
        ]


@dataclass(frozen=True)
class Source:
    """A conversion that is exported.

    Attributes:
        folder: Where it is.
        converted: What its headers and configs tell.
        headers: Headers of its weight files.
    """

    folder: Path
    converted: Converted
    headers: Mapping[str, Header]


def read_converted(folder: Path) -> tuple[Converted, dict[str, Header]]:
    """Read what the headers and configs of a conversion tell; no weight is loaded.

    Raises:
        DataError: There is no such folder, or a file is broken.
        IncompatibleError: It is no conversion, or its config contradicts itself.
    """
    config = read_converted_config(folder)
    adapter = check_converted_config(config, folder)
    headers = dict(read_checkpoint(folder))
    tokenizer = read_tokenizer(folder, config)
    return (
        Converted(
            config=config,
            section=read_section(config),
            adapter=adapter,
            entries=entries_of(headers),
            tokens=1 + max(tokenizer.vocab.values()),
        ),
        headers,
    )


def refuse_full(place: Path) -> Path:
    """Return where an export goes.

    Raises:
        DataError: Something is there.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise DataError(f"{place} is not empty, expected a new folder", hint="Give another --out")
    return place


def refuse(target: Layout, converted: Converted) -> None:
    """Refuse what the engine would read wrong.

    Raises:
        IncompatibleError: Something stands in the way; says all of it.
    """
    found = tuple(target.stands_in_the_way(converted))
    if found:
        raise IncompatibleError(
            f"it cannot be exported to {target.name} ({', '.join(target.engines)}): "
            + "; ".join(refusal.reason for refusal in found),
            hint=found[0].way_out,
        )


def pieces_of(
    target: Target,
    converted: Converted,
    vocabulary: Vocabulary,
    closed: bytes | None,
    *,
    unties: bool,
) -> list[Piece]:
    """Describe every tensor of the export.

    Args:
        target: The layout.
        converted: The conversion.
        vocabulary: Rows of the export, and of the mask in both.
        closed: Row of the head that takes the place of those that must not be predicted; None to
            leave them as they are.
        unties: Whether a head that is the embedding is written beside it.

    Raises:
        DataError: A tensor of the conversion would be lost.
    """
    adapter, entries = converted.adapter, converted.entries
    stacks: dict[str, list[tuple[str, TensorEntry]]] = {}
    for name in sorted(entries, key=_in_order):
        stacks.setdefault(target.names(name), []).append((name, entries[name]))
    head = target.names(adapter.head)
    heads = {head: (adapter.head, entries.get(adapter.head))}
    if unties and converted.tied:
        heads = {head: (adapter.embedding, entries[adapter.embedding])}
    pieces = []
    for name, sources in stacks.items():
        source, entry = sources[0]
        if source == adapter.embedding:
            pieces.append(_with_mask(name, source, entry, vocabulary))
        elif source != adapter.head:
            pieces.append(whole(name, entry, sources))
    for name, (source, found) in heads.items():
        if found is None:
            continue
        if closed is None:
            pieces.append(_with_mask(name, source, found, vocabulary))
        else:
            tokens = converted.tokens
            pieces.append(shut(name, source, found, vocabulary, tokens=tokens, row=closed))
    lost = [name for name in unused(pieces, entries) if closed is None or name != adapter.head]
    if lost:
        raise DataError(
            f"{lost[0]} would be lost in the layout of {target.name}",
            hint="Nothing was written; this layout does not fit the checkpoint",
        )
    return pieces


def _row_bytes(row: Any, dtype: str) -> bytes | None:
    """Return a row of numbers as a tensor's type has it."""
    if row is None:
        return None
    import torch

    stored = row.to(getattr(torch, TORCH_NAMES[dtype]))
    return bytes(stored.view(torch.uint8).numpy().tobytes())


def _with_mask(name: str, source: str, entry: TensorEntry, vocabulary: Vocabulary) -> Piece:
    if vocabulary.rows == entry.shape[0] and vocabulary.new == vocabulary.old:
        return whole(name, entry, [(source, entry)])
    return moved(name, source, entry, vocabulary)


def _in_order(name: str) -> tuple[str, int]:
    """Sort queries before keys before values: in that order they are stacked."""
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if f".{part}." in name:
            return name.replace(part, "q_proj"), number
    return name, 0


def export(
    folder: Path,
    to: str,
    out: Path | None = None,
    *,
    data: Path | None = None,
    proven: bool = False,
    outtype: str | None = None,
    reporter: Reporter | None = None,
) -> Export:
    """Write a conversion in the layout of an engine, and prove that it is the same model.

    Args:
        folder: A converted checkpoint; only read.
        to: Name of the target.
        out: Folder to create; None: beside the checkpoint, with the target's name behind.
        data: A text file to measure the mask's probability on; None: the language reference that
            comes with CPython.
        proven: Whether an engine's own code has to agree, in logits and in decoded tokens.
        outtype: Type of the matrices of a GGUF file; None: as they are.
        reporter: Progress; None: silent.

    Raises:
        DataError: A file is broken or missing, or the disk is full.
        IncompatibleError: The engine would read it wrong.
        RequestError: There is no such target, or no engine to prove it by.
        VerificationError: The engine reads another model.
    """
    teller = reporter or Reporter(quiet=True)
    target = target_of(to)
    if outtype is not None and not isinstance(target, GgufLayout):
        raise RequestError(f"`outtype` is for GGUF files, not for {to}", argument="outtype")
    in_gguf = isinstance(target, GgufLayout)
    if proven and in_gguf:
        require_llama_cpp("prove")
    engines = engines_of(target.name) if proven and not in_gguf else ()
    converted, headers = read_converted(folder)
    refuse(target, converted)
    place = refuse_full(out or folder.with_name(f"{folder.resolve().name}-{target.name}"))
    if isinstance(target, GgufLayout):
        # It builds on what stands here.
        from dllm_convert.serving.gguf_export import export_gguf

        source = Source(folder, converted, headers)
        return export_gguf(target, source, place, outtype or "auto", data, proven, teller)
    embedding = converted.entries[converted.adapter.embedding]
    old = converted.section.mask_token_id
    new = old if target.mask_row is None else target.mask_row
    rows = max(embedding.shape[0], target.rows, new + 1)
    found = measure(folder, held_out_texts(data), tokens=converted.tokens, rows=rows)
    unties = target.unties or (target.may_untie and converted.tied and not found.sound)
    closes = unties or (target.mask_row is not None and not converted.tied)
    row = _row_bytes(found.closed, embedding.dtype) if closes else None
    checked = dict(check(found, repaired=row is not None, tied=converted.tied))
    pieces = pieces_of(target, converted, Vocabulary(old, new, rows), row, unties=unties)
    size = sum(piece.row_bytes * piece.shape[0] for piece in pieces)
    with new_folder(place, size) as partial:
        with teller.task("write", total=size) as task:
            made = write_pieces(pieces, folder, partial, headers, task.advance)
        config = target.config(converted, rows, new)
        config["tie_word_embeddings"] = converted.tied and not unties
        write_config(partial / "config.json", config)
        compared = prove(pieces, folder, partial, headers)
        checked["bytes"] = f"{compared:,} compared with the conversion's, all equal"
        for name, text in target.files(converted).items():
            (partial / name).write_text(text, encoding="utf-8")
        proofs: list[Proof] = []
        if engines:
            proofs = prove_by_engine(
                folder, partial, engines, mask=new, tokens=converted.tokens, reporter=teller
            )
            checked |= {f"by the code of {proof.engine}": proof.in_words() for proof in proofs}
        _write_others(target, converted, folder, partial, checked, new)
        more = {"probabilities": found.as_dict(), "proofs": as_section(proofs)}
        write_record(target, folder, partial, headers, made, checked, more)
    return Export(
        path=place,
        target=target.name,
        engines=target.engines,
        ways={name: way for name, (way, _) in made.items()},
        checked=checked,
        launch=target.started(converted, place),
    )


@contextmanager
def new_folder(place: Path, size: int) -> Iterator[Path]:
    """Make a folder that is there whole or not at all: it is renamed once the block ends.

    Args:
        place: The folder.
        size: Bytes that will be written.

    Raises:
        DataError: The disk is full.
    """
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(partial, size):
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
        if place.exists():
            place.rmdir()
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def held_out_texts(data: Path | None) -> Sequence[str]:
    """Return texts that nothing was trained on: of a file, or of Python's language reference.

    Raises:
        DataError: The file is not text.
    """
    if data is not None:
        try:
            text = data.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{data} cannot be read as text ({error})") from error
        return [text[start : start + 2000] for start in range(0, min(len(text), 12000), 2000)]
    from pydoc_data.topics import topics

    longest = sorted(topics.values(), key=len)[-_SHOWN_TOPICS:]
    return [text[:2000] for text in longest]


def _write_others(
    target: Target,
    converted: Converted,
    folder: Path,
    out: Path,
    checked: Mapping[str, str],
    mask: int,
) -> None:
    names = file_names(folder)
    for name in matching(names, (*VOCABULARY_FILES, *SIDE_FILES, *LICENCE_FILES)):
        shutil.copyfile(folder / name, out / name)
    ends = {
        key: converted.config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if converted.config.get(key) is not None
    }
    write_config(out / "generation_config.json", ends)
    readme = guide(target, converted, checked, folder.resolve().name, mask)
    (out / "README.md").write_text(readme, encoding="utf-8")


def write_record(
    target: Layout,
    folder: Path,
    out: Path,
    headers: Mapping[str, Header],
    made: Mapping[str, tuple[str, str]],
    checked: Mapping[str, str],
    more: Mapping[str, Any],
) -> None:
    """Write what was exported from what.

    Args:
        target: The layout.
        folder: The conversion.
        out: The export, whole but for this file.
        headers: Headers of the conversion's files.
        made: Weight file to how it came about and its SHA-256.
        checked: What was checked, and what came of it.
        more: Numbers behind that.
    """
    others = [path.name for path in sorted(out.iterdir()) if path.name not in made]
    read = {name: folder / name for name in ("config.json", *headers)}
    write_config(
        out / RECORD,
        {
            "dllm_convert": __version__,
            "target": target.name,
            "engines": list(target.engines),
            "source": {"name": folder.resolve().name, "files": sha256_files(read)}
            | conversion_facts(folder),
            "files": {name: digest for name, (_, digest) in made.items()}
            | sha256_files({name: out / name for name in others}),
            "checked": dict(checked),
            **more,
        },
    )
