"""Bytes from file to file: the same bytes, the right hashes, holes kept, the source left alone."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from dllm_convert.common import copying
from dllm_convert.common.copying import PIECE, TwinHash, place, sha256_file, sha256_files, spans
from dllm_convert.errors import DataError


def sparse(path: Path, *parts: tuple[int, bytes], size: int) -> Path:
    with path.open("wb") as file:
        for start, data in parts:
            file.seek(start)
            file.write(data)
        file.truncate(size)
    return path


SHAPES = {
    "empty": ((), 0),
    "one byte": (((0, b"x"),), 1),
    "a piece and a byte": (((0, os.urandom(PIECE + 1)),), PIECE + 1),
    "only a hole": ((), 5 * PIECE + 3),
    "hole, data, hole": (((3 * PIECE, b"data" * 4096),), 9 * PIECE),
    "data, hole, data": (((0, b"a" * 8192), (4 * PIECE, b"b" * 10)), 4 * PIECE + 10),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_copy_is_equal_hashed_and_as_sparse(name: str, tmp_path: Path) -> None:
    parts, size = SHAPES[name]
    source = sparse(tmp_path / "source", *parts, size=size)
    before = source.stat()
    seen: list[int] = []
    way, digest = place(source, tmp_path / "copy", link=False, advance=seen.append)
    copy = tmp_path / "copy"
    assert way in ("copied", "shared")
    assert copy.read_bytes() == source.read_bytes()
    assert digest == sha256_file(copy) == hashlib.sha256(source.read_bytes()).hexdigest()
    assert sum(seen) == size
    assert copy.stat().st_blocks <= before.st_blocks + 8
    assert (source.stat().st_mtime_ns, source.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with source.open("rb") as file:
        covered = list(spans(file.fileno(), 0, size))
    assert sum(length for _, length, _ in covered) == size


def test_a_link_is_made_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_share_blocks", lambda *_: False)
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    place(source, tmp_path / "copy", link=False)
    assert source.stat().st_nlink == 1
    way, digest = place(source, tmp_path / "linked", link=True)
    assert (way, source.stat().st_nlink) == ("linked", 2)
    assert digest == sha256_file(source)


def test_a_link_to_a_link_leads_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_share_blocks", lambda *_: False)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/b").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model").symlink_to("../blobs/b")
    way, _ = place(tmp_path / "snapshot/model", tmp_path / "out", link=True)
    assert way == "linked"
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").read_bytes() == b"weights"


def test_no_link_across_file_systems_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_share_blocks", lambda *_: False)
    monkeypatch.setattr(copying, "_hard_link", lambda *_: False)
    (tmp_path / "source").write_bytes(b"weights")
    assert place(tmp_path / "source", tmp_path / "out", link=True)[0] == "copied"
    assert (tmp_path / "out").read_bytes() == b"weights"


def test_two_streams_that_part_and_go_on_together() -> None:
    dice = random.Random(0)
    for _ in range(50):
        hashes, read, written = TwinHash(), b"", b""
        for _ in range(dice.randrange(8)):
            data, kind = dice.randbytes(dice.randrange(40)), dice.randrange(3)
            if kind != 2:
                read += data
            if kind != 1:
                written += data
            (hashes.both, hashes.read, hashes.written)[kind](data)
        expected = tuple(hashlib.sha256(data).hexdigest() for data in (read, written))
        assert hashes.digests == expected


def test_many_files_at_once(tmp_path: Path) -> None:
    paths = {}
    for number in range(20):
        paths[str(number)] = tmp_path / str(number)
        paths[str(number)].write_bytes(bytes([number]) * number)
    expected = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in paths.items()}
    assert sha256_files(paths) == expected


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (tmp_path / "a").open("rb") as file, pytest.raises(DataError, match="100 bytes early"):
        list(copying.pieces(file.fileno(), 0, 200))
