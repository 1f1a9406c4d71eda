"""`--extend`: a finished checkpoint is trained on, and stays until the new one is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import changed_files, listing_faults, read_manifest
from dllm_convert.errors import DataError, IncompatibleError, VerificationError
from dllm_convert.pipeline import run as pipeline
from dllm_convert.pipeline import stages
from dllm_convert.pipeline.context import Run
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.pipeline.results import Verified
from dllm_convert.pipeline.run import run
from dllm_convert.pipeline.workspace import Workspace, goes_on
from dllm_convert.recipe.schema import Recipe

QUIET = Reporter(quiet=True)
EXTEND = RunOptions(extend=True, verify=Depth.FILES)
Sources = Callable[..., Path]


def recipe(source: Path, **fields: Any) -> Recipe:
    training = {
        **{"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32"},
        **fields.pop("training", {}),
    }
    return Recipe.model_validate(
        {
            **{"source": str(source), "target": "bd3lm", "block_size": 8},
            "data": {"sequence_length": 32, "max_documents": 40, "held_out_sequences": 8},
            "training": training,
            "generation": {"max_new_tokens": 4},
            **fields,
        }
    )


@pytest.fixture(scope="module")
def finished(source_cache: Sources, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its finished run."""
    source, out = source_cache("llama"), tmp_path_factory.mktemp("finished") / "out"
    run(recipe(source), out, QUIET, how=RunOptions(verify=Depth.FILES))
    return source, out


@pytest.fixture
def made(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, free to change."""
    source, out = finished
    return source, Path(shutil.copytree(out, tmp_path / "out"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_it_goes_on_from_the_weights_that_were_trained(made: tuple[Path, Path]) -> None:
    source, out = made
    before, first = weights(out), read_manifest(out)
    (out / "notes.md").write_text("mine")
    result = run(recipe(source), out, QUIET, how=EXTEND)
    after, second = weights(out), result.manifest
    assert result.passed
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Where the first training ended the second begins, within the noise of another seed's masks.
    measured = first["measurements"], second["measurements"]
    ended, began = measured[0]["nelbo_after"], measured[1]["nelbo_before"]
    spread = 4 * (ended["stderr"] + began["stderr"])
    assert abs(ended["nats_per_token"] - began["nats_per_token"]) < spread
    assert began["nats_per_token"] < measured[0]["nelbo_before"]["nats_per_token"]
    assert [entry["steps"] for entry in second["history"]] == [6]
    assert second["history"][0]["created"] == first["created"]
    assert changed_files(out, second["files"]) == {}
    assert listing_faults(out, second) == {}
    assert (out / "notes.md").read_text() == "mine"
    third = run(recipe(source, training={"steps": 2}), out, QUIET, how=EXTEND).manifest
    assert [entry["steps"] for entry in third["history"]] == [6, 6]
    assert third["seeds"]["training"] == second["seeds"]["training"] + 1


def test_a_kill_before_it_is_whole_leaves_the_old_one(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = made
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "ASSEMBLE", replace(stages.ASSEMBLE, work=lambda run: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(recipe(source), out, QUIET, how=EXTEND)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    done = run(recipe(source), out, QUIET, how=EXTEND).manifest
    assert len(done["history"]) == 1


@pytest.mark.parametrize("moved", [0, 1, 5])
def test_a_kill_among_the_renames_loses_nothing(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    source, out = made
    replace, count = Path.replace, 0

    def replace_some(self: Path, target: Path) -> Path:
        nonlocal count
        if self.parent.name == "staged" and target.parent == out:
            if count == moved:
                raise KeyboardInterrupt
            count += 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(source), out, QUIET, how=EXTEND)
    assert not (out / "config.json").exists()
    done = run(recipe(source), out, QUIET, how=EXTEND).manifest
    assert len(done["history"]) == 1
    assert changed_files(out, done["files"]) == {}


def test_one_that_fails_its_verification_replaces_nothing(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = made
    before = weights(out)

    def failing(run: Run) -> Verified:
        report = stages.VERIFY.work(run)
        first, *rest = report.probes
        return replace(report, passed=False, probes=[{**first, "passed": False}, *rest])

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "VERIFY", replace(stages.VERIFY, work=failing))
        with pytest.raises(VerificationError, match="does not replace"):
            run(recipe(source), out, QUIET, how=EXTEND)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    # Other options begin anew, from the checkpoint that stands there.
    done = run(recipe(source, training={"steps": 3}), out, QUIET, how=EXTEND).manifest
    assert [entry["steps"] for entry in done["history"]] == [6]


def test_files_that_the_new_one_has_not_go(made: tuple[Path, Path]) -> None:
    source, out = made
    manifest = read_manifest(out)
    (out / "old.png").write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    manifest["files"]["old.png"] = digest
    (out / "dllm_convert.json").write_text(json.dumps(manifest))
    run(recipe(source, training={"steps": 1}), out, QUIET, how=EXTEND)
    assert not (out / "old.png").exists()


def test_what_a_training_learnt_of_its_noise_is_no_other_conversion(
    source_cache: Sources, tmp_path: Path
) -> None:
    asked = recipe(
        source_cache("llama"), noise={"schedule": "learned", "classes": 3, "exponent_rate": 0.05}
    )
    run(asked, tmp_path / "out", QUIET, how=RunOptions(verify=Depth.FILES))
    first = json.loads((tmp_path / "out/config.json").read_text())["diffusion"]
    assert run(asked, tmp_path / "out", QUIET, how=EXTEND).passed
    then = json.loads((tmp_path / "out/config.json").read_text())["diffusion"]
    assert first["noise_classes"] == then["noise_classes"]
    assert first["noise_exponents"] != then["noise_exponents"]
    assert [round(w, 1) for w in first["noise_exponents"]] != [1.0] * 3


def test_every_extension_looks_at_its_text(made: tuple[Path, Path]) -> None:
    """The second one, of the same options, too: it is another training."""
    source, out = made
    run(recipe(source), out, QUIET, how=EXTEND)
    name = json.loads((out / ".work/journal.json").read_text())["run"]
    assert goes_on(out, name) and not goes_on(out, name, extend=True)


def test_what_cannot_be_extended_is_told(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    with pytest.raises(DataError, match="holds none"):
        run(recipe(source), tmp_path / "new", QUIET, how=EXTEND)
    before = Workspace(out).journal.read_bytes()
    with pytest.raises(IncompatibleError, match=r"block_size is 16, it was 8"):
        run(recipe(source, block_size=16), out, QUIET, how=EXTEND)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "README.md").write_text("The same weights: a copy.\n", encoding="utf-8")
    tuned = load_file(other / "model.safetensors")
    save_file({n: t + 1 for n, t in tuned.items()}, other / "model.safetensors")
    with pytest.raises(IncompatibleError, match="was converted from"):
        run(recipe(other), out, QUIET, how=EXTEND)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(DataError, match="only what was verified is trained on"):
        run(recipe(source), out, QUIET, how=EXTEND)
    assert Workspace(out).journal.read_bytes() == before, "it is still the run that it was"


def test_a_copy_of_the_source_is_the_source(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    other = Path(shutil.copytree(source, tmp_path / "other"))
    for path in other.iterdir():
        os.utime(path, (1, 1))
    assert run(recipe(other), out, QUIET, how=EXTEND).passed
    with pytest.raises(DataError, match="trained on since, with --extend"):
        run(recipe(other), out, QUIET)


def test_a_conversion_without_training_is_not_extended(
    source_cache: Sources, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", source_cache("llama")
    run(recipe(source, training={"method": "none"}), out, QUIET, how=RunOptions(verify=Depth.FILES))
    with pytest.raises(DataError, match="without training"):
        run(recipe(source), out, QUIET, how=EXTEND)
    assert Workspace(out).journal.is_file()


def test_the_commands(made: tuple[Path, Path]) -> None:
    source, out = made
    line = ["run", str(source), "--to", "bd3lm", "--block", "8", "--out", str(out)]
    refused = CliRunner().invoke(app, [*line, "--no-train", "--extend"])
    assert refused.exit_code == 2
    other = CliRunner().invoke(app, [*line, "--steps", "7"])
    assert other.exit_code == 1
    assert "--extend trains a finished checkpoint on" in other.output
