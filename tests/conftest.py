"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import gc
import itertools
import os

# Set before torch and tokenizers are imported: many test processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dllm_convert.serving.engines import EngineCode, EngineProcess

SourceFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def source_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that builds each tiny checkpoint once; callers must not write into it."""
    root = tmp_path_factory.mktemp("sources")
    built: dict[str, Path] = {}

    def get(family: str, **options: Any) -> Path:
        from factory import make_source

        key = repr((family, sorted(options.items(), key=lambda item: item[0])))
        if key not in built:
            built[key] = make_source(root / f"{len(built)}-{family}", family, **options)
        return built[key]

    return get


@pytest.fixture
def source_factory(tmp_path: Path, source_cache: SourceFactory) -> SourceFactory:
    """Return `make(family, **options) -> Path`: a copy of a tiny checkpoint, free to break."""
    count = 0

    def make(family: str, **options: Any) -> Path:
        nonlocal count
        count += 1
        original = source_cache(family, **options)
        return Path(shutil.copytree(original, tmp_path / f"source-{count}-{family}"))

    return make


@pytest.fixture(scope="session")
def generic_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that builds a checkpoint of a family without an adapter, each once."""
    root = tmp_path_factory.mktemp("generic")
    built: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        from generic import make_generic

        if model_type not in built:
            built[model_type] = make_generic(root / model_type, model_type)
        return built[model_type]

    return get


def pytest_configure() -> None:
    """Have all tests of the command line share one tree of commands, which takes 0.1 s to build."""
    import typer.main
    import typer.testing

    build = functools.cache(typer.main.get_command)
    typer.testing._get_command = build  # type: ignore[attr-defined]


_TESTS_BETWEEN = 300
"""Tests after which what was imported meanwhile is set aside as well."""


def pytest_collection_finish() -> None:
    """Set modules and tests aside, half a million objects that every collection would look at.

    The collector runs at the end of each stage of a run (`common/memory.py`): looking through all
    that lives as long as the session was a third of a tiny run's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _set_aside(request: pytest.FixtureRequest) -> None:
    if request.session.testscollected and next(_run) % _TESTS_BETWEEN == 0:
        gc.collect()
        gc.freeze()


_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _forked_strangers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fresh processes forked, but where a test is marked to start real ones."""
    marks = {mark.name for mark in request.node.iter_markers()}
    if not marks & {"real", "stranger"}:
        from forks import Strangers

        from dllm_convert.verification.probes import portability

        monkeypatch.setattr(portability, "subprocess", Strangers())


@pytest.fixture
def converted(tmp_path: Path, source_factory: SourceFactory) -> Callable[..., Path]:
    """Return a maker of conversions whose hidden states lean to one side, as trained ones do."""
    from conversion import convert_leaning

    def make(
        family: str,
        *,
        tied: bool = False,
        target: str = "bd3lm",
        source: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Path:
        base = source_factory(family, tied=tied, **(source or {}))
        out = tmp_path / f"{family}-{tied}-{target}-{len(list(tmp_path.iterdir()))}"
        return convert_leaning(base, out, target, **fields)

    return make


@pytest.fixture(scope="session")
def engine_processes() -> Iterator[dict[str, EngineProcess]]:
    """Return processes by engine: one that imports torch and an engine serves many exports."""
    started: dict[str, EngineProcess] = {}
    yield started
    for process in started.values():
        process.close()


@pytest.fixture
def shared_engines(
    engine_processes: dict[str, EngineProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have proofs ask processes that are there already."""
    from dllm_convert.serving import proof
    from dllm_convert.serving.engines import EngineProcess

    @contextmanager
    def running(code: EngineCode) -> Iterator[EngineProcess]:
        if code.name not in engine_processes or not engine_processes[code.name].alive:
            engine_processes[code.name] = EngineProcess(code)
        yield engine_processes[code.name]

    monkeypatch.setattr(proof, "running", running)
