"""Tiny checkpoints of families without an adapter, each built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import generic
import pytest


@pytest.fixture(scope="session")
def generic_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that builds a tiny checkpoint once; callers must not write into it."""
    root = tmp_path_factory.mktemp("generic")
    built: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in built:
            built[model_type] = generic.make_generic(root / model_type, model_type)
        return built[model_type]

    return get
