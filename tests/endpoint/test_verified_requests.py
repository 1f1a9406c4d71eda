"""Requests whose text another model verifies, and what is told where none does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

import dllm_convert as dc

pytest.importorskip("openai")
pytest.importorskip("fastapi")
NAME = "drafter"


@pytest.fixture(scope="module")
def opened(
    source_cache: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A conversion whose clean tokens were opened, and its base."""
    base, out = source_cache("llama"), tmp_path_factory.mktemp("verified") / "out"
    convert(base, out, "bd3lm", block=8)
    return out, base


def app_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    """The application that `serve` would run."""
    import dllm_convert.endpoint.run as running

    found: list[Any] = []
    monkeypatch.setattr(running, "answer", lambda app, bound, ready: found.append(app))
    dc.serve(folder, port=0, name=NAME, max_new_tokens=10, reporter=dc.Reporter(quiet=True), **how)
    return found[0]


def asked(app: Any, **more: Any) -> Any:
    from fastapi.testclient import TestClient

    body = {"model": NAME, "prompt": "a name", **more}
    with TestClient(app) as client:
        return client.post("/v1/completions", json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_is_the_verifiers(
    stream: bool, opened: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = opened
    right = dc.sample(folder, "a name", max_new_tokens=10, lossless=True, base=base)
    assert right.text != dc.sample(folder, "a name", max_new_tokens=10).text
    app = app_of(folder, monkeypatch, lossless=True, base=base)
    answer = asked(app, stream=stream)
    assert answer.status_code == 200, answer.text
    if stream:
        assert '"verifier_forwards"' in answer.text and "error" not in answer.text
        return
    told = answer.json()
    assert told["choices"][0]["text"] == right.text
    assert told["usage"]["forwards"] == right.forwards
    assert told["usage"]["verifier_forwards"] == right.verifier_forwards
    # A request may say so itself, and what would make another text is refused.
    same = asked(app, verify_with="base", confidence_threshold=0.9).json()
    assert same["choices"][0]["text"] == right.text
    refused = asked(app, guidance_scale=2.0)
    assert refused.status_code == 400 and "guidance_scale" in refused.text


def test_a_server_without_a_verifier_says_how_to_start_one(
    opened: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = opened
    refused = asked(app_of(folder, monkeypatch), verify_with="base")
    assert refused.status_code == 400
    assert "start it with --lossless" in refused.json()["error"]["message"]
    with pytest.raises(dc.DataError, match="says nothing of the base"):
        app_of(folder, monkeypatch, lossless=True)
    with pytest.raises(dc.RequestError, match="give `lossless` too"):
        app_of(folder, monkeypatch, base=base)
