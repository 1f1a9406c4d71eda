"""The front door in Python: what `import dllm_convert` offers, and that it is what commands do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from hub_server import COMMIT, LoopbackHub, run_python, serve
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.common.tables import text_of

SMALL: dict[str, Any] = {
    "data.sequence_length": 32,
    "data.max_documents": 20,
    "data.held_out_sequences": 4,
    "training.batch_size": 2,
    "training.precision": "fp32",
    "generation.max_new_tokens": 16,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Path:
    """A conversion without training, of which only files were verified."""
    out = tmp_path_factory.mktemp("made") / "out"
    dc.convert(
        source_cache("llama"), out, to="bd3lm", block=8, train=False, verify="files",
        reporter=dc.Reporter(quiet=True),
    )  # fmt: skip
    return out


class TestNames:
    @pytest.mark.stranger
    def test_importing_loads_nothing_heavy(self) -> None:
        code = (
            "import sys, time; start = time.perf_counter(); import dllm_convert as dc; "
            "took = time.perf_counter() - start; dir(dc); "
            "heavy = {'torch', 'transformers', 'pydantic', 'typer', 'rich'} & set(sys.modules); "
            "assert not heavy, heavy; assert took < 1, took; "
            "dc.plan; dc.convert; dc.ConversionPlan; dc.VerificationReport; dc.diffusion; "
            "dc.training; heavy = {'torch', 'transformers', 'typer'} & set(sys.modules); "
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("module", [dc, dc.diffusion, dc.training], ids=lambda m: m.__name__)
    def test_every_name_is_there(self, module: Any) -> None:
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is getattr(module, name)
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing

    def test_every_error_of_ours_is_offered(self) -> None:
        from dllm_convert import errors

        own = {n for n, v in vars(errors).items() if isinstance(v, type) and n.endswith("Error")}
        assert own - set(dc.__all__) == {"OutputError"}

    def test_no_room_takes_the_place_of_a_function(self) -> None:
        rooms = {path.name for path in Path(dc.__file__).parent.iterdir() if path.is_dir()}
        assert rooms & set(dc.__all__) == {"diffusion", "training"}

    def test_star(self) -> None:
        space: dict[str, Any] = {}
        exec("from dllm_convert import *", space)
        assert set(dc.__all__) <= space.keys()


class TestPlan:
    @pytest.mark.parametrize(
        ("asked", "flags"),
        [
            ({"to": "bd3lm", "block": 8}, ["--to", "bd3lm", "--block", "8"]),
            ({"to": "mdlm", "train": False}, ["--to", "mdlm", "--no-train"]),
            (
                {"lora": 4, "steps": 7, "data": "pydoc"},
                ["--lora", "4", "--steps", "7", "--data", "pydoc"],
            ),
            ({"tokens": 50_000}, ["--tokens", "50k"]),
            ({"max_time": "2h", "global_batch": 6}, ["--max-time", "2h", "--global-batch", "6"]),
            (
                {"overrides": {"training.learning_rate": 3e-4}},
                ["--set", "training.learning_rate=3e-4"],
            ),
            ({"preset": "small-budget"}, ["--preset", "small-budget"]),
        ],
    )
    def test_printed_it_is_what_check_shows(
        self, asked: dict[str, Any], flags: list[str], source_cache: SourceFactory
    ) -> None:
        base = source_cache("llama")
        shown = CliRunner().invoke(app, ["check", str(base), *flags])
        assert shown.exit_code == 0, shown.stderr
        plan = dc.plan(base, **asked)
        # A plan reads no text, which the command looks at as well.
        told = re.sub(r"\nText\n(?:  .*\n)+", "", shown.stdout)
        assert f"{plan}\n" == told
        assert dc.plan(str(base), **asked) == plan

    def test_in_a_notebook_it_is_escaped(self, source_factory: SourceFactory) -> None:
        base = source_factory("llama")
        odd = base.rename(base.with_name("<b>&"))
        page = dc.plan(odd, to="mdlm")._repr_html_()
        assert "<table>" in page
        assert "&lt;b&gt;&amp;" in page
        assert "<b>" not in page

    def test_a_conversion_hands_down(self, made: Path) -> None:
        plan = dc.plan(made)
        assert (plan.recipe.target, plan.recipe.block_size) == ("bd3lm", 8)
        assert dc.plan(made, to="mdlm").recipe.block_size is None

    def test_a_plan_is_changed(self, source_cache: SourceFactory) -> None:
        plan = dc.plan(source_cache("llama"), to="bd3lm", block=8, lora=4)
        assert dc.plan(plan) == plan
        later = dc.plan(plan, steps=3).recipe
        assert later == dc.load_recipe(
            source_cache("llama"), to="bd3lm", block=8, lora=4, steps=3
        )  # fmt: skip
        assert dc.plan(plan, to="mdlm").recipe.block_size is None
        with pytest.raises(dc.RequestError, match="takes no preset"):
            dc.plan(plan, preset="small-budget")

    @pytest.mark.parametrize(
        ("asked", "error", "said"),
        [
            (
                {"lora": 4, "train": False},
                dc.RequestError,
                "`full` and `train=False`",
            ),
            ({"tokens": "5M", "steps": 3}, dc.RequestError, "give one of `tokens` and `steps`"),
            ({"tokens": "many"}, dc.RequestError, "no number of tokens"),
            ({"tokens": -3}, dc.RequestError, "no number of tokens"),
            ({"max_time": "soon"}, dc.RequestError, "no time"),
            ({"global_batch": 0}, dc.RequestError, "global_batch"),
            ({"processes": 0}, dc.RequestError, "processes"),
            ({"train": False, "steps": 3}, dc.RequestError, "change nothing"),
            ({"to": "other"}, dc.IncompatibleError, "target"),
            ({"steps": "3"}, dc.IncompatibleError, "training.steps"),
            ({"preset": "nothing"}, dc.IncompatibleError, "no preset"),
            ({"overrides": {"training.stepz": 3}}, dc.IncompatibleError, "stepz"),
            ({"blok": 3}, TypeError, "'blok'"),
        ],
    )
    def test_wrong_requests(
        self, asked: dict[str, Any], error: type[Exception], said: str, source_cache: SourceFactory
    ) -> None:
        with pytest.raises(error, match=said):
            dc.plan(source_cache("llama"), **asked)

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(dc.DllmConvertError):
            dc.plan(tmp_path / "nothing")
        with pytest.raises(dc.DllmConvertError):
            dc.plan(Path("nothing-at-all"))


class TestConvert:
    def test_result(self, made: Path) -> None:
        assert (made / "config.json").is_file()
        again = dc.convert(
            json.loads((made / "dllm_convert.json").read_text())["recipe"]["source"],
            made, to="bd3lm", block=8, train=False, verify="files",
            reporter=dc.Reporter(quiet=True),
        )  # fmt: skip
        assert again.path == made
        assert again.report.passed
        assert again.pushed is None
        text = str(again)
        assert text.startswith("Verified: ")
        assert str(again.report) not in text, "a screenful"
        assert str(again.report) in text_of(again.as_details())
        assert "probes passed" in again._repr_html_()
        assert again.report.as_dict() == again.manifest["verification"]

    def test_resumed_and_another(
        self, tmp_path: Path, source_cache: SourceFactory, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plan = dc.plan(source_cache("llama"), to="bd3lm", block=8, train=False)
        done = dc.convert(plan, tmp_path / "out", verify="files")
        assert "adapt" in capsys.readouterr().err
        stages = done.manifest["stages"]
        assert dc.convert(plan, str(tmp_path / "out")).manifest["stages"] == stages
        other = dc.plan(source_cache("qwen2"), to="bd3lm", block=8, train=False)
        with pytest.raises(dc.DataError, match="out"):
            dc.convert(other, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "dllm_convert.json").read_text()) == done.manifest

    def test_refused_before_any_work(
        self, tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, out = source_cache("llama"), tmp_path / "out"
        with pytest.raises(dc.RequestError, match="expected one of auto"):
            dc.convert(base, out, verify="some")
        with pytest.raises(dc.RequestError, match="extend"):
            dc.convert(base, out, extend=True, train=False)
        with pytest.raises(dc.DataError):
            dc.convert(base, base / "out", train=False)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(dc.IncompatibleError, match="several processes"):
            dc.convert(base, out)
        assert not out.exists()

    def test_the_callers_malloc_is_left_alone(
        self, tmp_path: Path, made: Path, source_cache: SourceFactory,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        from dllm_convert.common import allocator

        called: list[int] = []
        monkeypatch.setattr(allocator, "keep_freed_memory", lambda: called.append(1))
        dc.sample(made, "a b", max_new_tokens=8)
        dc.convert(
            source_cache("llama"), tmp_path / "out", to="mdlm", steps=1, lora=2, verify="files",
            overrides=SMALL, reporter=dc.Reporter(quiet=True),
        )  # fmt: skip
        assert not called
        run = CliRunner().invoke(app, ["sample", str(made), "--max-new-tokens", "8"])
        assert run.exit_code == 0, run.stderr
        assert called == [1]


class TestUse:
    def test_load(self, made: Path) -> None:
        import torch

        model, tokenizer = dc.load(made, device="cpu", dtype="bfloat16")
        assert type(model).__module__.startswith("dllm_convert.modeling")
        assert model.dtype is torch.bfloat16
        assert not model.training
        assert tokenizer.mask_token_id == model.config.mask_token_id
        with pytest.raises(dc.RequestError, match="dtype"):
            dc.load(made, dtype="int8")
        with pytest.raises(dc.RequestError, match="dtype"):
            dc.load(made, dtype="nothing")

    def test_wrong_folder(self, tmp_path: Path, source_cache: SourceFactory) -> None:
        for call in (dc.load, dc.sample, dc.verify):
            with pytest.raises(dc.DataError):
                call(tmp_path / "nothing")
            with pytest.raises(dc.IncompatibleError):
                call(source_cache("llama"))

    def test_sample(self, made: Path) -> None:
        one = dc.sample(made, "A list", max_new_tokens=8)
        pair = dc.sample(dc.load(str(made)), "A list", max_new_tokens=8)
        assert one.text == pair.text
        assert str(one).startswith("A list")
        several = dc.sample(str(made), ["A list", "The value"], max_new_tokens=8)
        assert [s.prompt for s in several] == ["A list", "The value"]
        assert isinstance(dc.sample(made, ["A list"], max_new_tokens=8), list)

    @pytest.mark.parametrize(
        "how",
        [{"temperature": -1.0}, {"colour": "red"}, {"top_k": 3}, {"record": "film.mp4"}],
    )
    def test_wrong_decoding(self, how: dict[str, Any], made: Path) -> None:
        for checkpoint in (made, dc.load(made)):
            with pytest.raises(dc.RequestError):
                dc.sample(checkpoint, "a", max_new_tokens=8, **how)

    @pytest.mark.parametrize(
        "how", [{"max_length": 2}, {"max_new_tokens": 10**9}, {"suppress_tokens": [10**9]},
                {"max_new_tokens": "eight"}, {"seed": "s"}]
    )  # fmt: skip
    def test_settings_that_a_loaded_model_cannot_meet(
        self, how: dict[str, Any], made: Path
    ) -> None:
        for checkpoint in (made, dc.load(made)):
            with pytest.raises(dc.RequestError):
                dc.sample(checkpoint, "one two three four", **how)

    @pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("a bug")])
    def test_a_bug_of_decoding_is_no_wrong_request(
        self, error: Exception, made: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from dllm_convert.modeling.published.modeling import DiffusionMixin

        def broken(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(DiffusionMixin, "forward", broken)
        for checkpoint in (made, dc.load(made)):
            with pytest.raises(type(error), match="a bug"):
                dc.sample(checkpoint, "a", max_new_tokens=8, temperature=1.0)

    def test_a_pair_that_does_not_denoise(self, made: Path) -> None:
        import transformers

        stock = transformers.AutoModelForCausalLM.from_pretrained(made)
        stock.config.diffusion = None
        with pytest.raises(dc.RequestError, match="LlamaForCausalLM"):
            dc.sample((stock, dc.load(made)[1]), "a")

    def test_wrong_pair_and_prompts(self, made: Path) -> None:
        with pytest.raises(dc.RequestError, match="a pair"):
            dc.sample(dc.load(made)[0], "a")
        with pytest.raises(dc.RequestError, match="no prompt"):
            dc.sample(made, [])
        with pytest.raises(dc.DataError, match="UTF-8"):
            dc.sample(made, "\udcff")

    def test_verify(self, made: Path, source_cache: SourceFactory) -> None:
        report = dc.verify(made, against=source_cache("llama"), files=True)
        assert report.passed
        shown = CliRunner().invoke(
            app, ["verify", str(made), "--against", str(source_cache("llama")), "--files"]
        )
        assert str(report).splitlines()[:-1] == shown.stdout.splitlines()[:-1]
        assert dc.VerificationReport.from_dict(report.as_dict()) == report
        with pytest.raises(dc.RequestError):
            dc.verify(made, files=True, page="page.html")

    def test_evaluate(self, made: Path) -> None:
        quiet = dc.Reporter(quiet=True)
        with pytest.raises(dc.DllmConvertError, match="nothing to evaluate"):
            dc.evaluate(made, reporter=quiet)
        with pytest.raises(dc.RequestError):
            dc.evaluate(made, data="pydoc", settings={"temperature": -1.0}, reporter=quiet)

    def test_push_asks_first(self, made: Path, tmp_path: Path) -> None:
        with pytest.raises(dc.RequestError, match="pull request"):
            dc.push(made, "me/x", create_pr=True, revision="main")
        with pytest.raises(dc.RequestError):
            dc.push(made, "me/x", max_shard_size="huge")
        with pytest.raises(dc.DataError):
            dc.push(tmp_path / "nothing", "me/x")


class TestProbe:
    def test_printed_it_is_what_check_shows(self, source_cache: SourceFactory) -> None:
        base = source_cache("llama")
        found = dc.probe(base)
        arguments = ["check", str(base), "--to", "bd3lm", "--block", "8", "--probe"]
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.stderr
        head, _, *lines = str(found).splitlines()
        assert head.startswith("llama can be converted: opened (--to mdlm); opened (--to bd3lm); ")
        assert lines[2:]
        assert {f"  {line}" for line in lines if line} <= set(shown.stdout.splitlines())
        document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
        told = json.loads(json.dumps(found.as_dict()))
        known = {key: told[key] for key in told if key != "adapter"}
        assert document["probe"] == known | {"ways": list(found.ways)}

    def test_what_cannot_be_measured(self, tmp_path: Path) -> None:
        with pytest.raises(dc.DllmConvertError):
            dc.probe(tmp_path / "nothing", to="mdlm")


class TestCard:
    def test_it_is_what_the_command_writes(self, made: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(made, tmp_path / "copy")
        for name in ("README.md", "report.html"):
            (folder / name).unlink()
        done = CliRunner().invoke(app, ["card", str(folder), "--json"])
        assert done.exit_code == 0, done.stderr
        written = {name: (folder / name).read_text() for name in ("README.md", "report.html")}
        for name in written:
            (folder / name).write_text("old")
        card = dc.write_card(str(folder))
        assert card.as_dict() == json.loads(done.stdout)
        assert str(card) == str(card.path) == str(folder / "README.md")
        assert {name: (folder / name).read_text() for name in written} == written

    def test_a_folder_without_a_manifest(self, source_cache: SourceFactory) -> None:
        before = sorted(path.name for path in source_cache("llama").iterdir())
        with pytest.raises(dc.DataError, match=r"dllm_convert\.json"):
            dc.write_card(source_cache("llama"))
        assert sorted(path.name for path in source_cache("llama").iterdir()) == before


ON_THE_HUB = """
import sys
import dllm_convert as dc
given, revision = sys.argv[1], sys.argv[2] or None
try:
    model, tokenizer = dc.load(given, revision=revision)
    text = dc.sample((model, tokenizer), "A list", max_new_tokens=8, seed=0).text
    assert revision or dc.sample(given, "A list", max_new_tokens=8, seed=0).text == text
    print(type(model).__name__, type(model).__module__, repr(text))
except dc.DllmConvertError as error:
    print(type(error).__name__, error)
"""


class TestFromTheHub:
    @pytest.fixture
    def hub(self, made: Path, source_cache: SourceFactory) -> Iterator[LoopbackHub]:
        repos = {"me/converted": made, "me/base": source_cache("llama")}
        with serve(LoopbackHub(repos=repos)) as running:
            yield running

    def ask(self, hub: LoopbackHub, home: Path, given: str, revision: str = "") -> str:
        modules = ["dllm_convert.sampling.run", "dllm_convert.modeling.loading"]
        return run_python(ON_THE_HUB, given, revision, env=hub.environment(home), modules=modules)

    @pytest.mark.parametrize("revision", ["", COMMIT])
    def test_it_is_the_folders(
        self, hub: LoopbackHub, made: Path, tmp_path: Path, revision: str
    ) -> None:
        expected = dc.sample(made, "A list", max_new_tokens=8, seed=0).text
        found = self.ask(hub, tmp_path, "me/converted", revision)
        assert repr(expected) in found
        assert "transformers_modules" not in found

    @pytest.mark.parametrize(
        ("given", "revision", "said"),
        [
            ("me/base", "", "IncompatibleError"),
            ("me/nothing", "", "HubError"),
            ("nothing", "", "DataError there is no folder nothing"),
            ("./me/nothing", "", "DataError there is no folder"),
            ("/tmp", "main", "DataError"),
        ],
    )
    def test_refused(
        self, hub: LoopbackHub, tmp_path: Path, given: str, revision: str, said: str
    ) -> None:
        assert self.ask(hub, tmp_path, given, revision).startswith(said)


def test_libraries_are_as_loud_as_before(made: Path) -> None:
    before = list(warnings.filters)
    dc.load(made)
    assert warnings.filters == before
