"""`dllm-convert serve`: from the command line to an answer, and what is told instead of one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
from conversion import convert
from gated import gated_folder
from typer.testing import CliRunner

import dllm_convert as dc
from dllm_convert.cli.app import app
from dllm_convert.pipeline.api import endpoint

pytest.importorskip("openai")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def folder(source_cache: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "tiny-gated"
    gated_folder(source_cache("llama"), out)
    return out


def first_line(process: Any, log: Path, pattern: str, within: float) -> re.Match[str]:
    """The first match in what a process says, or a failure with all of it."""
    ends = time.monotonic() + within
    while time.monotonic() < ends and process.poll() is None:
        if found := re.search(pattern, log.read_text() if log.exists() else ""):
            return found
        time.sleep(0.1)
    pytest.fail(log.read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_it_answers_until_it_is_interrupted(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "dllm_convert", "serve", str(folder), "--port", "0"]
    log = tmp_path / "log"
    process = forks.start(
        [*command, "--lossless", "--max-new-tokens", "9"],
        log=log,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
    )
    try:
        found = first_line(process, log, r"tiny-gated answers chats and texts at (http\S+/v1);", 90)
        body = json.dumps({"model": "tiny-gated", "prompt": "a name"}).encode()
        request = urllib.request.Request(
            f"{found[1]}/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = json.load(answer)
        right = dc.sample(folder, "a name", max_new_tokens=9, lossless=True)
        assert told["choices"][0]["text"] == right.text
        assert told["usage"]["completion_tokens"] == right.new_tokens
        os.kill(process.pid, number)
        assert process.wait(30) == 0
        assert "Traceback" not in log.read_text() and "rror" not in log.read_text()
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(10)


def serve(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def told(result: Any) -> str:
    return " ".join(result.stderr.replace("│", "").split())


def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = serve(str(folder), "--port", port)
        assert result.exit_code == 2
        assert f"cannot listen at 127.0.0.1, --port {port}: Address already in use" in told(result)
        assert "--port 0 takes a free one" in told(result)
    result = serve(str(folder), "--port", "0", "--host", "no.such.host.invalid")
    assert result.exit_code == 2 and "cannot listen at no.such.host.invalid" in told(result)
    result = serve(str(folder), "--port", "70000")
    assert result.exit_code == 2 and "from 0 to 65,535" in told(result)
    result = serve(str(folder), "--port", "0", "--top-p", "0.5")
    assert result.exit_code == 2 and "--top-p does nothing without" in told(result)
    monkeypatch.undo()
    result = serve(str(tmp_path), "--port", "0")
    assert result.exit_code == 1 and "config.json" in told(result)
    missing = [name for name in endpoint._NEEDED if name in ("fastapi", "openai")]
    monkeypatch.setattr(endpoint, "find_spec", lambda name: None if name in missing else object())
    result = serve(str(folder))
    assert result.exit_code == 1
    assert "needs fastapi, openai, which is not installed" in told(result)
    assert "pip install 'dllm-convert[serve]'" in told(result)


def test_a_plain_checkpoint_is_no_diffusion_model(source_cache: Callable[[str], Path]) -> None:
    result = serve(str(source_cache("llama")), "--port", "0")
    assert result.exit_code == 3 and "is not a diffusion checkpoint" in told(result)


def test_a_hub_id_is_downloaded_and_is_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dllm_convert.endpoint.run as running
    import dllm_convert.source.checkpoints as opening

    asked: list[tuple[str, str | None]] = []

    def download(checkpoint: str, revision: str | None, reporter: dc.Reporter) -> Path:
        asked.append((checkpoint, revision))
        return folder

    names: list[str] = []
    made = running.make_app

    def make_app(name: str, *arguments: Any, **more: Any) -> Any:
        names.append(name)
        return made(name, *arguments, **more)

    monkeypatch.setattr(opening, "local_checkpoint", download)
    monkeypatch.setattr(running, "make_app", make_app)
    monkeypatch.setattr(running, "answer", lambda app, bound, ready: ready())
    result = serve("somebody/tiny-bd3lm", "--revision", "v1", "--port", "0", "--lossless")
    assert result.exit_code == 0, result.stderr
    assert asked == [("somebody/tiny-bd3lm", "v1")]
    assert names == ["somebody/tiny-bd3lm"]
    assert "somebody/tiny-bd3lm answers chats and texts at" in told(result)


def test_without_a_template_only_texts(
    source_cache: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dllm_convert.endpoint.run as running

    convert(source_cache("bert"), tmp_path / "plain", "mdlm")
    said: list[str] = []

    class Teller(dc.Reporter):
        def line(self, text: str) -> None:
            said.append(text)

    def at_once(app: Any, bound: Any, ready: Callable[[], None]) -> None:
        ready()

    monkeypatch.setattr(running, "answer", at_once)
    dc.serve(tmp_path / "plain", port=0, name="mine", reporter=Teller(quiet=True))
    assert said[-1].startswith("mine answers texts (it has no chat template) at http://127.")
