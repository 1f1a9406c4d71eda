"""The command line: what is parsed, what is printed where, and the exit codes."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.cli.errors import redact
from dllm_convert.cli.options import TargetName
from dllm_convert.common.terms import Target
from dllm_convert.errors import (
    DataError,
    DllmConvertError,
    HubError,
    IncompatibleError,
    UnsupportedError,
    VerificationError,
)
from dllm_convert.pipeline import run as pipeline
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source import hub as source_hub
from dllm_convert.verification.shown import verification_blocks

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "huggingface_hub")
PROBE = {"name": "influence", "passed": True, "measured": 0.25, "required": "== 0", "detail": "ok"}
SKIPPED = PROBE | {"name": "cache", "passed": None, "measured": "", "detail": "no blocks"}
MANIFEST = {
    "verification": {"passed": True, "probes": [PROBE, SKIPPED]},
    "measurements": {
        "nelbo_before": {"nats_per_token": 8.5, "stderr": 0.125, "tokens": 512},
        "nelbo_after": {"nats_per_token": 5.5, "stderr": 0.0625, "tokens": 512},
        "ar_nll": {"nats_per_token": 3.25, "stderr": None, "tokens": 512},
        "train": {"steps": 3},
    },
    "sample": {"prompt": "Once", "text": " upon", "tokens_per_forward": 1.5, "seconds": 2.0},
}
FAILED = {"passed": False, "probes": [PROBE | {"passed": False}, SKIPPED]}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a Hub id hand nothing down, as a base does."""
    monkeypatch.setattr(source_hub, "fetch_small", lambda *_: None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path]]:
    """Replace the pipeline by one that remembers its arguments and passes."""
    calls: list[tuple[Recipe, Path]] = []

    def run(recipe: Recipe, out: Path, reporter: object, **given: object) -> pipeline.RunResult:
        assert set(given) == {"push", "place", "how"}
        calls.append((recipe, out))
        return pipeline.RunResult(out, MANIFEST, True)

    monkeypatch.setattr(pipeline, "run", run)
    return calls


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Return a function that makes the pipeline raise."""

    def arrange(error: BaseException) -> None:
        def run(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(pipeline, "run", run)

    return arrange


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


# Start-up


def test_help_is_quick() -> None:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    seconds = []
    for _ in range(3):
        before = used()
        assert python("-m", "dllm_convert", "--help").returncode == 0
        seconds.append(used() - before)
    # Processor time, and the best of three: how busy the machine is does not matter. How fast it is
    # says what draws the page: three times as long as that takes to be imported.
    libraries = []
    for _ in range(3):
        before = used()
        assert python("-c", "import typer, rich.table, rich.panel").returncode == 0
        libraries.append(used() - before)
    assert min(seconds) < max(0.5, 3.5 * min(libraries))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes"], ["recipes", "qwen3-4b"], ["architectures", "--json"]]
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    result = python("-X", "importtime", "-m", "dllm_convert", *arguments)
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    assert imported.isdisjoint({*HEAVY, *(["pydantic"] if arguments == ["--help"] else [])})


def test_check_reads_headers_without_torch(source_factory: Callable[..., Path]) -> None:
    source = source_factory("llama")
    result = python(
        *("-X", "importtime", "-m", "dllm_convert", "check", str(source), "--to", "bd3lm"),
        *("--block", "16", "--json"),
    )
    assert result.returncode == 0
    plan = json.loads(result.stdout)
    assert (plan["target"], plan["block_size"]) == ("bd3lm", 16)
    assert " torch\n" not in result.stderr
    assert not Path(plan["out"]).exists()


def test_targets_are_those_of_the_schema() -> None:
    assert tuple(TargetName) == get_args(Target)


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["rnu", "x/y"],
        ["run", "x/y", "--nonsense"],
        ["run", "x/y", "--to", "ddpm"],
        ["run", "x/y", "--block", "0"],
        ["run", "x/y", "--block", "-4"],
        ["run", "x/y", "--block", "many"],
        ["run", "x/y", "--steps", "0"],
        ["run", "x/y", "--lora", "0"],
        ["run", "x/y", "--lora", "8", "--full"],
        ["run", "x/y", "--full", "--no-train"],
        ["run", "x/y", "--set", "training.steps"],
        ["run", "x/y", "--set", "=5"],
        ["sample", "x", "--threshold", "1.5"],
        ["sample", "x", "--temperature", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_with_an_empty_stdout(
    arguments: list[str], ran: list[tuple[Recipe, Path]]
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
    assert not ran


def test_no_arguments_show_the_help_and_the_exit_codes() -> None:
    text = " ".join(invoke().output.split())
    assert "Usage" in text
    for words in ("0 done", "3 incompatible", "4 verification failed", "130 interrupted"):
        assert words in text


def test_version_is_printed() -> None:
    from dllm_convert import __version__

    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"dllm-convert {__version__}\n")


# run


def test_flags_reach_the_recipe(ran: list[tuple[Recipe, Path]]) -> None:
    result = invoke(
        *("run", "qwen2.5-1.5b", "--to", "bd3lm", "--block", "8", "--data", "*.txt"),
        *(
            "--steps",
            "7",
            "--lora",
            "4",
            "--keep-adapter",
            "--source-revision",
            "abc",
            "--out",
            "there",
        ),
        *("--set", "training.learning_rate=2e-5", "--set", "noise.schedule=cosine"),
    )
    assert result.exit_code == 0
    recipe, out = ran[0]
    assert out == Path("there")
    assert (recipe.target, recipe.block_size, recipe.data.source) == ("bd3lm", 8, "*.txt")
    training = recipe.training
    assert (training.steps, training.method, training.lora.rank) == (7, "lora", 4)
    assert (training.keep_adapter, recipe.revision) == (True, "abc")
    assert (training.learning_rate, recipe.noise.schedule) == (2e-5, "cosine")


@pytest.mark.parametrize(
    ("flags", "method"),
    [([], "full"), (["--lora", "8"], "lora"), (["--full"], "full"), (["--no-train"], "none")],
)
def test_training_method(flags: list[str], method: str, ran: list[tuple[Recipe, Path]]) -> None:
    assert invoke("run", "x/y", *flags).exit_code == 0
    assert ran[0][0].training.method == method


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("qwen2.5-1.5b", "qwen2.5-1.5b-mdlm"),
        ("Qwen/Qwen2.5-1.5B", "Qwen2.5-1.5B-mdlm"),
        ("models/tiny/", "tiny-mdlm"),
        ("models/tiny.Q4_1.gguf", "tiny.Q4_1-mdlm"),
    ],
)
def test_default_output_folder(source: str, out: str, ran: list[tuple[Recipe, Path]]) -> None:
    assert invoke("run", source, "--to", "mdlm").exit_code == 0
    assert ran[0][1] == Path(out)


def test_run_shows_what_came_of_it_and_with_verbose_every_probe(
    ran: list[tuple[Recipe, Path]],
) -> None:
    short = invoke("run", "x/y", "--out", "there").stdout
    for words in ("Verified: 1 of 2", "8.500 ± 0.125 nats", "Once upon", "1.50", "verify there"):
        assert words in short
    assert "influence" not in short
    assert short.endswith("Checkpoint: there\n")
    text = invoke("run", "x/y", "--out", "there", "--verbose").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["ok", "influence", "0.25", "==", "0"] in rows
    assert ["skipped", "cache", "no", "blocks"] in rows, "why it was not run"
    for words in ("8.500 ± 0.125", "5.500 ± 0.062", "3.250", "4915", "Once upon", "1.50 tokens"):
        assert words in text
    assert text.endswith("Checkpoint: there\n")


def test_run_prints_one_json_document(ran: list[tuple[Recipe, Path]]) -> None:
    result = invoke("run", "x/y", "--out", "there", "--json")
    expected = {"path": "there", "passed": True, "manifest": MANIFEST}
    assert json.loads(result.stdout) == expected
    assert result.stderr == ""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_failed_verification_exits_4_and_says_which(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = pipeline.RunResult(Path("there"), {"verification": FAILED}, False)
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: failed)
    result = invoke("run", "x/y", *flags)
    assert result.exit_code == 4
    assert result.stderr == (
        "error: verification failed: influence: measured 0.25, required == 0\n"
    )
    assert "FAILED" in result.stdout or json.loads(result.stdout)["passed"] is False


# Failures


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


FAILURES = [
    (DllmConvertError("found a"), 1, "found a"),
    (DataError("found b", hint="do c"), 1, "found b. do c"),
    (HubError("found d"), 1, "found d"),
    (UnsupportedError("found e"), 3, "found e"),
    (IncompatibleError("found f"), 3, "found f"),
    (VerificationError("found g"), 4, "found g"),
    (KeyboardInterrupt(), 130, "interrupted. The same command goes on where it stopped"),
    (MemoryError(), 1, "not enough memory"),
    (OutOfMemoryError("CUDA"), 1, "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device", "w.bin"), 1, "disk is full while writing w"),
    (PermissionError(errno.EACCES, "Permission denied", "there"), 1, "no permission for there"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), 1, "No such file x.txt. HF_DEBUG=1"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES, ids=lambda value: repr(value)[:30])
def test_known_failure_is_one_line(
    error: BaseException, code: int, words: str, failing: Callable[[BaseException], None]
) -> None:
    failing(error)
    result = invoke("run", "x/y")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_an_evaluation_that_is_interrupted_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dllm_convert.pipeline.api.judging.evaluate", stop)
    result = invoke("evaluate", str(tmp_path), "--tasks", "dllm_copy")
    assert result.exit_code == 130
    assert "interrupted. The same command goes on where it stopped" in result.stderr


def test_failure_with_json_is_one_document(failing: Callable[[BaseException], None]) -> None:
    failing(DataError("found b", hint="do c"))
    document = json.loads(invoke("run", "x/y", "--json").stdout)
    problem = {"kind": "DataError", "message": "found b", "hint": "do c"}
    assert document == {"error": problem, "exit_code": 1}


def test_bug_is_not_hidden(failing: Callable[[BaseException], None]) -> None:
    failing(RuntimeError("a bug"))
    result = invoke("run", "x/y")
    assert (result.exit_code, str(result.exception)) == (1, "a bug")


def test_traceback_on_demand(
    failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEBUG", "1")
    failing(DataError("found b"))
    result = invoke("run", "x/y")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: found b\n")


@pytest.mark.parametrize("debug", ["", "1"])
def test_tokens_are_never_printed(
    debug: str, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_like_one = "hf_" + "A1b2" * 8
    monkeypatch.setenv("HF_DEBUG", debug)
    monkeypatch.setenv("HF_TOKEN", "an-unusual-secret")
    failing(HubError(f"refused an-unusual-secret and {looks_like_one}", hint=looks_like_one))
    output = invoke("run", "x/y", "--json").output
    assert "an-unusual-secret" not in output
    assert looks_like_one not in output
    assert "hf_***" in output


def test_redaction_leaves_other_words_alone() -> None:
    text = "hf_cache_dir and HF_TOKEN"
    assert redact(text) == text


def test_unknown_recipe_and_field_suggest() -> None:
    result = invoke("run", "qwen2.5-1.5")
    assert result.exit_code == 2
    assert "qwen2.5-1.5b" in result.stderr
    result = invoke("run", "x/y", "--set", "training.step=4")
    assert result.exit_code == 2, "seen from the command line alone"
    assert "training.steps (integer > 0)" in result.stderr


# The other commands


def test_recipes_are_listed_and_shown(tmp_path: Path) -> None:
    assert "Qwen/Qwen2.5-1.5B" in invoke("recipes").stdout
    names = [entry["name"] for entry in json.loads(invoke("recipes", "--json").stdout)]
    assert "qwen2.5-1.5b" in names
    shown = tmp_path / "shown.yaml"
    shown.write_text(invoke("recipes", "bert-base-uncased").stdout, encoding="utf-8")
    document = json.loads(invoke("recipes", "bert-base-uncased", "--json").stdout)
    assert json.loads(invoke("recipes", str(shown), "--json").stdout) == document
    assert invoke("recipes", "bert-bas-uncased").exit_code == 2


def test_architectures_are_listed() -> None:
    families = {
        entry["model_type"] for entry in json.loads(invoke("architectures", "--json").stdout)
    }
    assert families == {"bert", "modernbert", "roberta", "llama", "qwen2", "qwen3", "mistral"}
    lines = invoke("architectures").stdout.splitlines()
    assert {line.split()[0] for line in lines[1:]} == families


def report_of(verification: Mapping[str, Any]) -> Any:
    return SimpleNamespace(
        passed=verification["passed"],
        as_dict=lambda: verification,
        as_blocks=lambda: verification_blocks(verification),
    )


def test_verify_passes_on_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def verify_checkpoint(folder: Path, **options: Any) -> Any:
        seen.update(options, folder=folder)
        return report_of(MANIFEST["verification"])

    fake_module(monkeypatch, "dllm_convert.verification", verify_checkpoint=verify_checkpoint)
    info = SimpleNamespace(files=(), path=tmp_path)
    fake_module(
        monkeypatch, "dllm_convert.source.inspect", inspect_source=lambda source, revision: info
    )
    folder = SimpleNamespace(folder=tmp_path)
    materialised = {"materialise": lambda info, reporter: folder}
    fake_module(monkeypatch, "dllm_convert.source.materialise", **materialised)
    result = invoke("verify", "there", "--against", str(tmp_path))
    assert result.exit_code == 0
    assert "influence" in result.stdout
    assert (seen["folder"], seen["against"]) == (Path("there"), tmp_path)
    assert json.loads(invoke("verify", "there", "--json").stdout) == MANIFEST["verification"]
    assert seen["against"] is None
    assert (seen["trust_remote_code"], seen["block_size"], seen["revision"]) == (False, None, None)
    invoke("verify", "a/b", "--trust-remote-code", "--block", "4", "--revision", "v1")
    assert (seen["trust_remote_code"], seen["block_size"], seen["revision"]) == (True, 4, "v1")
    assert invoke("verify", "a/b", "--block", "0").exit_code == 2


def test_failed_verify_exits_4(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(FAILED)
    fake_module(monkeypatch, "dllm_convert.verification", verify_checkpoint=lambda *_, **__: report)
    result = invoke("verify", "there")
    assert result.exit_code == 4
    assert "influence: measured 0.25" in result.stderr


def test_sample_passes_options_and_prints_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run_sample(
        folder: Path, prompts: list[str], reporter: object, shown: object, **options: Any
    ) -> Any:
        seen.update(options, prompts=prompts, shown=shown)
        return [SimpleNamespace(as_dict=lambda: MANIFEST["sample"])] * len(prompts)

    shown = {"Display": lambda watch, record, screen: (watch, record)}
    fake_module(monkeypatch, "dllm_convert.sampling.run", run_sample=run_sample, **shown)
    result = invoke(
        *("sample", "there", "--prompt", "Once", "--max-new-tokens", "9", "--steps", "3"),
        *("--threshold", "0.5", "--temperature", "0.25", "--seed", "4"),
    )
    assert (result.exit_code, result.stdout) == (0, "Once upon\n")
    assert seen == {
        "prompts": ["Once"],
        "shown": (False, None),
        "chat": False,
        "mark": None,
        "max_new_tokens": 9,
        "max_denoising_steps": 3,
        "confidence_threshold": 0.5,
        "temperature": 0.25,
        "seed": 4,
        "verifier": None,
    }
    assert json.loads(invoke("sample", "there", "--json").stdout) == MANIFEST["sample"]
    both = invoke("sample", "there", "--prompt", "Once", "--prompt", "Twice", "--chat")
    assert (both.exit_code, both.stdout) == (0, " upon\n---\n upon\n")
    assert (seen["prompts"], seen["chat"]) == (["Once", "Twice"], True)
    document = invoke("sample", "there", "--prompt", "Once", "--prompt", "Twice", "--json").stdout
    assert json.loads(document) == [MANIFEST["sample"]] * 2


def test_sample_reads_a_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run_sample(folder: Path, prompts: list[str], *_: object, **__: object) -> Any:
        seen.append(prompts)
        return [SimpleNamespace(as_dict=lambda: MANIFEST["sample"])]

    shown = {"Display": lambda watch, record, screen: None}
    fake_module(monkeypatch, "dllm_convert.sampling.run", run_sample=run_sample, **shown)
    for given in (b"Once \xc3\xa4\n\n", b"Once \xff"):
        result = CliRunner().invoke(app, ["sample", "there", "--prompt", "-"], input=given)
    assert seen == [["Once ä\n"]]
    assert result.exit_code == 1
    assert "error: the prompt on stdin is not UTF-8" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--record", "film.png"],
        ["--record", "film"],
        ["--record", "nowhere/film.gif"],
        ["--record", "film.gif", "--prompt", "a", "--prompt", "b"],
        ["--watch", "--quiet"],
        ["--watch", "--json"],
        ["--prompt", "-", "--prompt", "-"],
    ],
    ids=" ".join,
)
def test_sample_refuses_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_module(monkeypatch, "dllm_convert.sampling.run")
    result = invoke("sample", "there", *options)
    assert result.exit_code == 2
    if "--json" in options:
        assert json.loads(result.stdout)["exit_code"] == 2
    else:
        assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_card_prints_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def writes(name: str) -> Callable[[Path], Path]:
        return lambda folder: (order.append(name), folder / name)[1]

    fake_module(monkeypatch, "dllm_convert.card.readme", write_card=writes("README.md"))
    fake_module(monkeypatch, "dllm_convert.card.report", write_report=writes("report.html"))
    assert invoke("card", "there").stdout == "there/README.md\n"
    assert order == ["report.html", "README.md"], "the card links to the report"
    assert json.loads(invoke("card", "there", "--json").stdout) == {
        "path": "there/README.md",
        "report": "there/report.html",
    }


def test_a_report_nowhere_is_refused_before_anything_is_verified(tmp_path: Path) -> None:
    result = invoke("verify", "there", "--report", str(tmp_path / "missing" / "report.html"))
    assert result.exit_code == 2
    assert "Invalid value for --report" in result.stderr


IDLE = ["--link", "--extend", "--quiet", "--dry-run", "--verify=full"]


@pytest.mark.parametrize("option", IDLE)
def test_check_refuses_what_would_change_nothing(option: str) -> None:
    refused = invoke("check", "some/model", option)
    assert refused.exit_code == 2
    assert "No such option" in refused.stderr


def test_a_dry_run_takes_every_option_and_says_what_check_says(
    source_factory: Callable[..., Path], tmp_path: Path
) -> None:
    common = [str(source_factory("llama")), "--to", "mdlm", "--out", str(tmp_path / "o"), "--json"]
    checked = invoke("check", *common)
    assert checked.exit_code == 0, checked.stderr
    rest = [*IDLE, "--push-to-hub", "me/x", "--commit-message", "new"]
    assert invoke("run", *common, *IDLE).stdout == checked.stdout
    published = json.loads(invoke("run", *common, *rest).stdout)
    assert published.pop("publication")["repository"] == "me/x"
    assert published.keys() == json.loads(checked.stdout).keys()
