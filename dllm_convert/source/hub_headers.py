"""Shapes of a Hub repository's weights from as few bytes as tell them.

`HfApi.get_safetensors_metadata` asks for 100 kB of every shard: 3 MB where a model of 70B
parameters has 30 of them. Here a request is as long as the index makes the header likely to be, and
a sharded repository is asked only for the headers that differ: layers repeat, so tensors whose
names differ in numbers alone have the same shape. That is believed only if all sizes add up to the
index's `total_size`; otherwise every header is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.safetensors_header import (
    DTYPE_BYTES,
    INDEX_FILE,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    Header,
    load_json_object,
    parse_header,
    read_weight_map,
)

_NUMBER = re.compile(r"\d+")
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")
ENTRY_BYTES = 100
"""Of a header beside a tensor's name: type, shape, offsets and the JSON around them."""
SINGLE_GUESS = 40_000
"""Bytes first asked of a repository with one file: the header of about 300 tensors."""
CONNECTIONS = 8


class _Shard:
    """One file of weights on the Hub, read by ranges."""

    def __init__(self, repo_id: str, commit: str, file: str) -> None:
        from huggingface_hub import hf_hub_url, utils

        self.file = file
        self._url = hf_hub_url(repo_id, file, revision=commit)
        self._headers = utils.build_hf_headers()  # type: ignore[attr-defined]
        self._size = 0

    def _get(self, first: int, last: int) -> bytes:
        """Return bytes first..last; of an answer that ignores the range no more than that."""
        from huggingface_hub import get_session, utils

        part = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        headers = {**self._headers, **part}
        wanted = last + 1 - first
        with get_session().stream("GET", self._url, headers=headers, timeout=30) as response:
            if response.is_error:
                response.read()
            utils.hf_raise_for_status(response)  # type: ignore[attr-defined]
            total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or total is None:
                raise DataError(
                    f"{self.file}: the server sends no part of a file, only all of it",
                    hint="Download the repository and give its folder",
                )
            self._size = int(total[1])
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if len(content) >= wanted:
                    break
        return bytes(content[:wanted])

    def header(self, guess: int) -> Header:
        """Read and check the header, in one request if it is no longer than `guess` bytes."""
        content = self._get(0, guess - 1)
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(MAX_HEADER_BYTES, self._size - 8):
            raise DataError(
                f"{self.file}: a header of {length} bytes in a file of {self._size}, expected a "
                "safetensors file",
                hint="Ask whoever uploaded it for a complete copy",
            )
        if length + 8 > len(content):
            content += self._get(len(content), length + 7)
        return parse_header(content[8 : 8 + length], file=self.file, file_bytes=self._size)


def _template(name: str) -> str:
    return _NUMBER.sub("#", name)


def _telling(weight_map: Mapping[str, str]) -> list[str]:
    """Choose few files that together hold a tensor of every template."""
    held: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        held.setdefault(file, set()).add(_template(name))
    missing, chosen = set().union(*held.values()), []
    while missing:
        file = max(sorted(held), key=lambda file: len(held[file] & missing))
        chosen.append(file)
        missing -= held[file]
    return chosen


def _infos(headers: Iterable[Header]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(entry.dtype, entry.shape, header.file)
        for header in headers
        for name, entry in header.entries.items()
    }


def _inferred(
    weight_map: Mapping[str, str], known: Mapping[str, TensorInfo], total: Any
) -> dict[str, TensorInfo] | None:
    """Give every tensor the shape of its template; None unless the bytes add up to `total`."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in known.items():
        shape = shapes.setdefault(_template(name), (tensor.dtype, tensor.shape))
        if shape != (tensor.dtype, tensor.shape):
            return None
    found = {name: TensorInfo(*shapes[_template(name)], file) for name, file in weight_map.items()}
    size = sum(DTYPE_BYTES[tensor.dtype] * prod(tensor.shape) for tensor in found.values())
    return found if size == total else None


def _check_names(weight_map: Mapping[str, str], headers: Iterable[Header]) -> None:
    for header in headers:
        wanted = {name for name, file in weight_map.items() if file == header.file}
        differing = sorted(wanted ^ header.entries.keys())
        if differing:
            raise DataError(
                f"{header.file}: {INDEX_FILE} and its header disagree about {differing[0]!r}",
                hint="Ask whoever uploaded it for a complete copy",
            )


def _sharded(repo_id: str, commit: str, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_weight_map(index)
    metadata = load_json_object(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None

    def read(file: str) -> Header:
        names = [name for name, place in weight_map.items() if place == file]
        guess = 8 + ENTRY_BYTES + sum(len(name) + ENTRY_BYTES for name in names)
        return _Shard(repo_id, commit, file).header(guess)

    first = _telling(weight_map)
    rest = sorted(set(weight_map.values()) - set(first))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = list(pool.map(read, first))
        _check_names(weight_map, headers)
        found = _inferred(weight_map, _infos(headers), total)
        if found is not None:
            return found
        headers += pool.map(read, rest)
    _check_names(weight_map, headers)
    return _infos(headers)


def read_hub_tensors(
    repo_id: str, commit: str, names: Iterable[str]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Read the shapes of a repository's weights, and the names of its weight files.

    Args:
        repo_id: Repository.
        commit: Its commit.
        names: Files of that commit, among them the single file or the index.

    Raises:
        DataError: A header or the index is broken, or they disagree.
    """
    if SINGLE_FILE in set(names):
        header = _Shard(repo_id, commit, SINGLE_FILE).header(SINGLE_GUESS)
        return _infos([header]), [SINGLE_FILE]
    from huggingface_hub import hf_hub_download

    index = Path(hf_hub_download(repo_id, INDEX_FILE, revision=commit))
    tensors = _sharded(repo_id, commit, index)
    return tensors, [*sorted({tensor.file for tensor in tensors.values()}), INDEX_FILE]
