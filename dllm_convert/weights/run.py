"""Write the untrained conversion: weights streamed from file to file, config, tokenizer, code.

Only the vocabulary tensors change, and of those only single rows are computed: every other byte is
copied, so memory stays small and precision is the source's whatever its dtype. What is read and
what is written is hashed in the same pass.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Event, Lock

from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import Way, sha256_files, switching_often, workers
from dllm_convert.common.disk import sync, writing
from dllm_convert.common.json_files import write_config
from dllm_convert.common.manifest import hash_files
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.config_code import code_keys
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.fit import Fit
from dllm_convert.source.folder import (
    LICENCE_FILES,
    SMALL_FILES,
    file_names,
    matching,
    read_config,
    tensor_infos,
)
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.quantised import SECTIONS as QUANTISED_SECTIONS
from dllm_convert.source.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    load_json_object,
    read_checkpoint,
    read_header,
)
from dllm_convert.source.source_fit import fit_folder
from dllm_convert.source.text_model import read_text_config
from dllm_convert.weights.shards import Changes, WrittenFile, write_shard

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's


@dataclass(frozen=True)
class Adapted:
    """What was read and written.

    Attributes:
        source: Name of a file of the source to the SHA-256 of what was read.
        files: Name of a file of the output to its SHA-256.
        ways: Name of a weight file to how it came about.
    """

    source: Mapping[str, str]
    files: Mapping[str, str]
    ways: Mapping[str, Way]


def _write_index(source: Path, out: Path, headers: Mapping[str, Header], changes: Changes) -> None:
    """Write the index with its totals counted anew; the tensors stay in their files."""
    index = load_json_object(source / INDEX_FILE)
    written = [read_header(out / file) for file in headers]
    entries = [entry for header in written for entry in header.entries.values()]
    metadata = {
        **(index.get("metadata") or {}),
        "total_parameters": sum(prod(entry.shape) for entry in entries),
        "total_size": sum(entry.end - entry.start for entry in entries),
    }
    weight_map = {
        changes.name(name): file
        for name, file in index["weight_map"].items()
        if name not in changes.dropped
    }
    write_config(out / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _check_rows(tensors: Mapping[str, TensorInfo], fit: Fit, plan: ConversionPlan) -> None:
    """Check that the embedding has the rows that the plan was made for.

    Raises:
        IncompatibleError: It has others.
    """
    rows = plan.mask.rows_before
    for old, new in fit.names.items():
        if new == plan.adapter.embedding and tensors[old].shape[0] != rows:
            raise IncompatibleError(
                f"{old} has shape {tensors[old].shape}, expected {rows} rows as planned"
            )


class _Weights:
    """The weight files of one conversion, several written at once."""

    def __init__(self, plan: ConversionPlan, source: Path, out: Path, *, link: bool) -> None:
        self._source, self._out, self._link = source, out, link
        self._headers = read_checkpoint(source)
        # The plan may have seen less: no shapes of a pickle, no bytes of what was on the Hub.
        self.fit = fit_folder(source, plan.adapter)
        _check_rows(tensor_infos(self._headers), self.fit, plan)
        self._changes = Changes(
            plan.mask, self.fit.vocabulary, frozenset(self.fit.dropped), self.fit.renamed
        )

    def write(self, reporter: Reporter, meanwhile: Callable[[], None]) -> list[WrittenFile]:
        """Write every file, and call `meanwhile` on this thread while others read and hash."""
        total = sum((self._source / file).stat().st_size for file in self._headers)
        lock, stopped = Lock(), Event()
        with reporter.task("write weights", total=total) as task, ExitStack() as stack:

            def advance(read: int) -> None:
                if stopped.is_set():
                    raise CancelledError
                with lock:
                    task.advance(read)

            # A disk that is flushed must not keep the next file waiting.
            stack.enter_context(switching_often())
            flushing = stack.enter_context(ThreadPoolExecutor(workers()))
            writing = stack.enter_context(ThreadPoolExecutor(workers()))
            flushed: list[Future[None]] = []

            def write(file: str) -> WrittenFile:
                source, out = self._source / file, self._out / file
                header = self._headers[file]
                made = write_shard(
                    source, out, header, self._changes, link=self._link, advance=advance
                )
                flushed.append(flushing.submit(sync, out))
                return made

            jobs = [writing.submit(write, file) for file in self._headers]
            whole = False
            try:
                meanwhile()
                made = [job.result() for job in jobs]
                for flush in flushed:
                    flush.result()
                whole = True
            finally:
                if not whole:
                    # Ctrl-C must not wait until files of many gigabytes are whole.
                    stopped.set()
                    writing.shutdown(wait=False, cancel_futures=True)
        if SINGLE_FILE not in self._headers:
            _write_index(self._source, self._out, self._headers, self._changes)
        return made


def _write_config(plan: ConversionPlan, source: Path, out: Path, fit: Fit) -> None:
    config = read_text_config(read_config(source))
    for key in ("_name_or_path", *QUANTISED_SECTIONS, *code_keys(config)):
        config.pop(key, None)
    write_config(out / "config.json", {**config, **fit.config, **plan.config_updates})


def _needed_bytes(plan: ConversionPlan, source: Path, *, link: bool) -> int:
    if link:
        return 0
    # A folder may hold the same weights in other formats, which nobody copies.
    copied = {*read_checkpoint(source), *matching(file_names(source), SMALL_FILES)}
    stats = [(source / name).stat() for name in copied]
    rows = plan.mask.rows_after - plan.mask.rows_before
    hidden = plan.config_updates.get("hidden_size", plan.source.config.get("hidden_size", 0))
    # Holes take no room, here or there.
    taken = sum(min(stat.st_size, stat.st_blocks * _BLOCK_BYTES) for stat in stats)
    return taken + 2 * rows * int(hidden) * 4


def _write_others(plan: ConversionPlan, source: Path, out: Path, fit: Fit, *, light: bool) -> None:
    from dllm_convert.modeling.bundle import write_code
    from dllm_convert.weights.generation import write_generation
    from dllm_convert.weights.tokenizer import write_tokenizer

    _write_config(plan, source, out, fit)
    write_tokenizer(plan.mask, plan.source.tokenizer, source, out, light=light)
    write_generation(plan, out)
    write_code(out, plan.adapter)
    for name in matching(file_names(source), LICENCE_FILES):
        shutil.copyfile(source / name, out / name)


def adapt(
    plan: ConversionPlan,
    source_dir: Path,
    out: Path,
    reporter: Reporter,
    *,
    link: bool = False,
    light: bool = False,
) -> Adapted:
    """Write the converted, untrained checkpoint; the source is only read.

    Args:
        plan: What to write.
        source_dir: Folder from `materialise`.
        out: Folder to create; it must not hold anything yet.
        reporter: Progress.
        link: Whether weight files that do not change may be hard links to the source's.
        light: Whether to leave transformers out, which proves a tokenizer that was written.

    Returns:
        Hashes of all that was read and written.

    Raises:
        DataError: A source file is broken, or the disk is full.
        IncompatibleError: The weights or the tokenizer turn out not to fit the plan.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty, expected a new folder")
    with writing(out, _needed_bytes(plan, source_dir, link=link)):
        out.mkdir(parents=True, exist_ok=True)
        weights = _Weights(plan, source_dir, out, link=link)
        made = weights.write(
            reporter, lambda: _write_others(plan, source_dir, out, weights.fit, light=light)
        )
        if plan.recipe.training.keeps_base:
            from dllm_convert.weights.gated import write_untrained_adapter

            write_untrained_adapter(plan, out)
        if plan.recipe.noise.kernel == "neighbours":
            from dllm_convert.weights.neighbours import write_neighbours

            write_neighbours(plan, out, reporter)
    names = {file.name for file in made}
    others = [name for name in matching(file_names(source_dir), SMALL_FILES) if name not in names]
    if SINGLE_FILE not in names:
        others.append(INDEX_FILE)
    read = sha256_files({name: source_dir / name for name in others})
    written = hash_files(out, exclude=names)
    return Adapted(
        source=read | {file.name: file.read for file in made},
        files=written | {file.name: file.written for file in made},
        ways={file.name: file.way for file in made},
    )
