"""Tiny converted checkpoints, made by the real `adapt` and free to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conversion import convert


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint and the base it was made from."""

    folder: Path
    base: Path


@pytest.fixture(scope="session")
def converted_cache(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Converted]:
    """Return a function that converts each tiny checkpoint once; callers must not write into it."""
    root = tmp_path_factory.mktemp("converted")
    built: dict[str, Converted] = {}

    def get(family: str, target: str, *, block: int = 8, **options: Any) -> Converted:
        key = repr((family, target, block, sorted(options.items())))
        if key not in built:
            base = source_cache(family, **options)
            folder = root / f"{len(built)}-{family}-{target}"
            convert(base, folder, target, block=block)
            built[key] = Converted(folder, base)
        return built[key]

    return get


@pytest.fixture
def converted(
    converted_cache: Callable[..., Converted], tmp_path: Path
) -> Callable[..., Converted]:
    """Return `make(family, target, **options)`: a private copy of a converted checkpoint."""
    count = 0

    def make(family: str, target: str, **options: Any) -> Converted:
        nonlocal count
        count += 1
        original = converted_cache(family, target, **options)
        copy = shutil.copytree(original.folder, tmp_path / f"converted-{count}")
        return Converted(Path(copy), original.base)

    return make


@pytest.fixture
def llama(converted: Callable[..., Any]) -> Any:
    return converted("llama", "bd3lm")


@pytest.fixture
def open_llama(converted: Callable[..., Any]) -> Any:
    return converted("llama", "mdlm")
