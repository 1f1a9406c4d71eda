"""A proof by an engine's code ends, whatever the engine does, and says what it saw."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pretend_engine
import pytest
from conftest import SourceFactory
from conversion import convert

import dllm_convert as dc
from dllm_convert.common.console import Reporter
from dllm_convert.errors import RequestError, VerificationError
from dllm_convert.serving import dangers, engines, proof, run
from dllm_convert.serving.proof import Proof, Subject
from dllm_convert.serving.run import read_converted

Pretends = Callable[[str], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Path:
    out = tmp_path_factory.mktemp("proof") / "a"
    convert(source_cache("llama"), out, "bd3lm", block=4, token_shift="drop")
    return out


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject.load(folder, mask=156895, tokens=read_converted(folder)[0].tokens)


@pytest.fixture(scope="module")
def place(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pretend")
    pretend_engine.prepare(made, subject, subject.questions())
    return made


@pytest.fixture
def pretends(subject: Subject, place: Path, monkeypatch: pytest.MonkeyPatch) -> Pretends:
    """Return what makes the engine behave as told."""
    monkeypatch.setenv("PYTHONPATH", str(Path(pretend_engine.__file__).parent))
    monkeypatch.setenv(pretend_engine.PLACE, str(place))
    monkeypatch.setattr(proof.Subject, "load", lambda *_, **__: subject)

    def told(does: str) -> None:
        (place / "does").write_text(does)

    return told


def prove(folder: Path) -> list[Proof]:
    return proof.prove_by_engine(
        folder, folder, (pretend_engine.CODE,), mask=0, tokens=0, reporter=Reporter(quiet=True)
    )


def test_what_is_equal_is_told_where_everybody_looks(
    folder: Path, tmp_path: Path, pretends: Pretends, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("MASK_BOUND", "ROWS_BOUND"):  # nobody trained this one
        monkeypatch.setattr(dangers, bound, 1.0)
    monkeypatch.setattr(engines, "ENGINES", {"llada2": (pretend_engine.CODE,)})
    pretends("chatty")
    made = dc.export(folder, "llada2", tmp_path / "out", prove=True)
    words = "189 of 189 decoded tokens equal"
    (said,) = [found for what, found in made.checked.items() if "Pretend" in what]
    assert words in said
    assert words in (made.path / "README.md").read_text()
    ((engine, record),) = json.loads((made.path / run.RECORD).read_text())["proofs"].items()
    assert engine == "Pretend of unknown version"
    assert (record["texts"], record["planned"]) == (9, 9)

    pretends("other token")
    with pytest.raises(VerificationError):
        dc.export(folder, "llada2", tmp_path / "other", prove=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_engine_that_is_slow_is_stopped_and_what_it_said_counts(
    folder: Path, pretends: Pretends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "SECONDS", 6.0)
    pretends("slow")
    began = time.monotonic()
    (made,) = prove(folder)
    assert time.monotonic() - began < 30
    assert f"{pretend_engine.TEXTS_BEFORE} of 9 texts in the time there was" in made.in_words()


@pytest.mark.parametrize(
    ("does", "seconds", "reason"),
    [
        ("silent", 3.0, "had 0 of 3 texts read in 3 seconds"),
        ("dies", 60.0, "cannot read the export: Segmentation fault"),
        ("raises", 60.0, "cannot read the export: KeyError: 'lm_head.weight'"),
        ("other logits", 60.0, "reads another model: logits differ by at most 1.0e-02"),
        ("other token", 60.0, "180 of 189 decoded tokens equal"),
    ],
)
def test_what_proves_nothing_or_the_contrary_is_refused(
    does: str,
    seconds: float,
    reason: str,
    folder: Path,
    pretends: Pretends,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "SECONDS", seconds)
    pretends(does)
    with pytest.raises(VerificationError, match=reason) as caught:
        prove(folder)
    assert caught.value.exit_code == 4
    advised = "on a machine that does nothing else" if does == "silent" else "pretend-engine==1.0"
    assert advised in str(caught.value.hint)


def test_a_model_that_amplifies_rounding_is_held_against_float64(
    folder: Path, pretends: Pretends, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = subject.exact(subject.questions().texts)
    pretends("other logits")
    # Where ours loses as much in float32, the engine's difference is rounding.
    monkeypatch.setattr(Subject, "exact", lambda *_: [found + 2e-3 for found in exact])
    (made,) = prove(folder)
    assert made.tolerance == pytest.approx(2e-2, rel=0.1)
    assert subject.model.dtype.is_floating_point
    assert subject.logits(subject.questions().texts[0]).dtype == "float32"


def test_a_proof_that_cannot_be_made_is_refused_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="no engine of a2d runs its code"):
        dc.export(folder, "a2d", prove=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"sglang and mlx_vlm, whose code .* are not installed"):
        dc.export(folder, "llada2", prove=True)
