"""What control groups and the system leave a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm_convert.common.memory import available_bytes, cgroup_available, in_words

GIB = 1 << 30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/slice/job\n")
    root = tmp_path / "fs"
    write(root / "slice/job", memory__max="max", memory__current="5")
    write(
        root / "slice", memory__max="1000", memory__current="900", memory__stat="inactive_file 50"
    )
    assert cgroup_available(root, own) == 150


def test_version_1_and_a_container(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:cpu:/a\n9:memory:/docker/elsewhere\n")
    root = tmp_path / "fs"
    write(root / "memory", memory__limit_in_bytes="800", memory__usage_in_bytes="300")
    assert cgroup_available(root, own) == 500


def test_no_limit(tmp_path: Path) -> None:
    assert cgroup_available(tmp_path / "none", tmp_path / "no-file") is None
    write(tmp_path / "fs", memory__max="max", memory__current="5")
    assert cgroup_available(tmp_path / "fs", tmp_path / "no-file") is None


def test_used_more_than_allowed_is_nothing_free(tmp_path: Path) -> None:
    write(tmp_path / "fs", memory__max="10", memory__current="15")
    assert cgroup_available(tmp_path / "fs", tmp_path / "no-file") == 0


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 0 < available_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1536, "1.5 KiB"), (3 * GIB, "3 GiB"), (5 << 40, "5 TiB"), (5 << 50, "5120 TiB")],
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert in_words(count) == words
