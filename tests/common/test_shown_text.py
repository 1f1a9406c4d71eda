"""What strangers wrote is shown and not obeyed; a reader who leaves does not end the work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from dllm_convert.cli.commands.shared import exit_if_failed, show_done
from dllm_convert.cli.errors import tell_line
from dllm_convert.common.console import Reporter
from dllm_convert.common.shown_text import json_safe, printable
from dllm_convert.common.tables import text_of
from dllm_convert.recipe.yaml_text import dump, parse_mapping
from dllm_convert.verification.report import Probe, VerificationReport
from dllm_convert.verification.shown import verification_blocks

Sources = Callable[..., Path]
ACTING = "\x1b[31m\x07\x9b2J\u202eabc\u2066\u200f\ufeff\ud800"


def acts(text: str) -> list[str]:
    """Return the characters that a terminal obeys or that turn a line around."""
    ranges = [("\0", "\x08"), ("\x0b", "\x1f"), ("\x7f", "\x9f"), ("\u202a", "\u202e")]
    ranges += [("\u2066", "\u2069"), ("\ud800", "\udfff")]
    single = "\u061c\u200e\u200f\ufeff"
    return [c for c in text if c in single or any(low <= c <= high for low, high in ranges)]


def test_printable_text_does_nothing() -> None:
    assert acts(ACTING)
    assert acts(printable(ACTING)) == []
    assert printable("as it is: ä 漢\t1\n") == "as it is: ä 漢\t1\n"


def test_json_keeps_its_values_and_does_nothing() -> None:
    document = json.dumps({"a": ACTING, "b": "ä\u200d"}, ensure_ascii=False)
    assert acts(json_safe(document)) == []
    assert json.loads(json_safe(document)) == {"a": ACTING, "b": "ä\u200d"}


def test_warnings_and_lines_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.warn(ACTING)
    reporter.line(ACTING)
    with reporter.task("work"):
        pass
    assert acts(capsys.readouterr().err) == []


def run(*arguments: str, out: object, err: object = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dllm_convert", *arguments]
    return subprocess.Popen(command, stdout=out, stderr=err, text=True)  # type: ignore[call-overload]


@pytest.mark.stranger
def test_names_with_escapes_reach_no_terminal(tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07\u202egpj"
    done = run("check", str(tmp_path / name), "--to", "mdlm", out=subprocess.PIPE)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2
    assert err.startswith("error: ")
    assert acts(out + err) == []


@pytest.mark.stranger
@pytest.mark.parametrize("as_json", [True, False])
def test_a_reader_who_left_is_no_failure(as_json: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("recipes", *(["--json"] if as_json else []), out=writing)
    os.close(writing)
    _, err = done.communicate(timeout=120)
    assert (done.returncode, err) == (0, "")


@pytest.mark.stranger
def test_a_closed_stdout_is_no_failure() -> None:
    shell = f"exec {sys.executable} -m dllm_convert recipes >&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.stranger
def test_a_full_stdout_is_told_as_what_it_is() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("recipes", "--json", out=full)
        _, err = done.communicate(timeout=120)
    assert done.returncode == 1
    assert err.startswith("error: stdout cannot be written (No space left on device)")
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.stranger
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("check", "--help")])
def test_help_on_a_full_stdout_is_told_as_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*arguments, out=full)
        _, err = done.communicate(timeout=120)
    assert done.returncode == 1
    assert err.startswith("error: stdout cannot be written")
    assert err.count("\n") == 1


@pytest.mark.stranger
@pytest.mark.parametrize("where", [">/dev/full", ">&-", "2>/dev/full", ">&- 2>&- <&-"])
def test_the_exit_code_of_the_work_stays(tmp_path: Path, where: str) -> None:
    shell = f"exec {sys.executable} -m dllm_convert check {tmp_path}/nosuch {where}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "stdout" not in done.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_a_failed_verification_ends_with_4_wherever_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    report = VerificationReport((Probe("hashes", False, "1", "0"),), 0.0)
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        show_done(report, as_json=as_json)
        with pytest.raises(typer.Exit) as caught:
            exit_if_failed(report.as_dict())
    assert caught.value.exit_code == 4
    warned, failed = capsys.readouterr().err.splitlines()
    assert warned.startswith("warning: stdout cannot be written")
    assert failed.startswith("error: verification failed: hashes")


def test_a_name_with_a_line_end_makes_no_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\nerror: forged\r\tb\u2028c"
    tell_line("error", name)
    Reporter().warn(name)
    row = {"name": "hashes", "passed": False, "measured": name, "required": "0", "detail": name}
    assert len(text_of(verification_blocks({"probes": [row]})).split("\n")) == 5
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.stranger
def test_nobody_reads_stderr(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("check", str(tmp_path / "nothing"), out=subprocess.PIPE, err=writing)
    os.close(writing)
    done.communicate(timeout=120)
    assert done.returncode == 2


def test_work_goes_on_when_nobody_reads_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Gone())
    reporter = Reporter()
    with reporter.task("work", total=2) as task:
        task.advance()
        reporter.warn("careful")
        reporter.line("on")


def test_sighup_counts_as_sigterm_unless_it_is_ignored() -> None:
    from dllm_convert.common.interruption import Interruption, heard

    # Whoever runs the tests with nohup has it ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert signal.SIGHUP in heard()
        with Interruption(gently=True) as interruption:
            assert not interruption.requested
            signal.raise_signal(signal.SIGHUP)
            assert interruption.requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in heard()
        with Interruption(gently=True) as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_recipe_says_what_it_says_and_does_nothing() -> None:
    text = "a\u202eb\x1b[31m\u2028\x9bc: \u200d é 中"
    dumped = dump({"name": text, "references": [text, "plain"], "n": 2e-5})
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", dumped)
    assert parse_mapping(dumped, "x") == {"name": text, "references": [text, "plain"], "n": 2e-5}


def test_a_failed_verification_keeps_its_code_when_nobody_reads_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with pytest.raises(typer.Exit) as left:
        exit_if_failed({"passed": False, "probes": []})
    assert left.value.exit_code == 4
