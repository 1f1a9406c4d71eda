"""Watching on a terminal and without one: what fits is shown, and the terminal is given back."""

from __future__ import annotations

import os
import re
import signal
import termios
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversion import convert
from factory import TOKENIZERS
from films import MASK, film_of
from rich.cells import cell_len
from rich.console import Console
from terminals import Terminal

from dllm_convert.common.console import Reporter
from dllm_convert.sampling.watch import terminal
from dllm_convert.sampling.watch.cells import Cell, State
from dllm_convert.sampling.watch.frames import UNWRITTEN, Film, Recorder
from dllm_convert.sampling.watch.layout import wrap
from dllm_convert.sampling.watch.pieces import TokenText
from dllm_convert.sampling.watch.terminal import Scene, Watcher, style_of, window

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def progress(film: Film, number: int) -> Any:
    frame = film.frames[number]
    return SimpleNamespace(
        canvas=torch.tensor([frame.tokens]),
        committed=torch.tensor([[when != UNWRITTEN for when in frame.written]]),
        lengths=torch.tensor([film.prompt_length]),
        rows=torch.tensor([0]),
        forwards=frame.forward,
        drafts=(),
    )


def scene(film: Film, tokenizer: Any, frames: int) -> Scene:
    recorder = Recorder(MASK, film.end_ids, film.block_size)
    for number in range(frames):
        recorder(progress(film, number))
    return Scene(recorder, TokenText(tokenizer, film.end_ids))


def drawn(what: Scene, width: int, height: int, **options: Any) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, **options)
    console.print(what)
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TOKENIZERS["llama"]()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (20, 10), (7, 5), (3, 3)])
@pytest.mark.parametrize("text", ["A name is bound. " * 40, "世界" * 60, "\n\x1b[2J\u202e" * 30])
def test_any_text_fits_any_terminal(tokenizer: Any, text: str, width: int, height: int) -> None:
    film = film_of(tokenizer, "Say", text, block=8, per_frame=4)
    for frames in (1, len(film.frames) // 2, len(film.frames)):
        shown = ESCAPE.sub("", drawn(scene(film, tokenizer, frames), width, height))
        lines = shown.rstrip("\n").split("\n")
        assert len(lines) <= max(height, 3)
        assert not set(shown) & {"\x1b", "\r", "\u202e"}
        assert all(cell_len(line) <= width for line in lines)


def test_what_is_not_written_and_what_is_new_show_without_colour(tokenizer: Any) -> None:
    film = film_of(tokenizer, "Say", " one two three four five", block=None, per_frame=1)
    assert "▒" in drawn(scene(film, tokenizer, 3), 60, 20)
    plain = drawn(scene(film, tokenizer, 3), 60, 20, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)
    assert re.search(r"\x1b\[1;7m", plain)
    assert re.search(r"\x1b\[1;4m", plain)
    styles = [style_of(Cell("a", State.WRITTEN, age)) for age in range(4)]
    assert len(set(styles)) == 4


def test_the_window_follows_what_is_written() -> None:
    cells = [Cell("word ", State.WRITTEN)] * 50 + [Cell("░", State.MASKED)] * 50
    lines = wrap([cell.text for cell in cells], 10)
    shown = window(lines, cells, 6)
    assert len(shown) == 6
    assert shown[0][0].cell < 50 <= shown[-1][-1].cell
    done = [Cell("word ", State.WRITTEN)] * 100
    lines = wrap([cell.text for cell in done], 10)
    assert window(lines, done, 6) == lines[-6:]


def reporter_on(file: StringIO, *, live: bool) -> Reporter:
    reporter = Reporter()
    reporter.console = Console(
        file=file, force_terminal=live, width=60, height=12, soft_wrap=True, highlight=False
    )
    return reporter


def test_without_a_terminal_there_are_plain_lines(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL_S", 0.0)
    film, file = film_of(tokenizer, "Say", " one\ntwo", per_frame=3), StringIO()
    recorder = Recorder(MASK, film.end_ids)
    with Watcher(recorder, TokenText(tokenizer), reporter_on(file, live=False)) as watcher:
        for number in range(len(film.frames)):
            watcher(progress(film, number))
    lines = file.getvalue().splitlines()
    assert len(lines) == len(film.frames)
    assert lines[0].startswith("forward 0, 0 of ")
    assert "\x1b" not in file.getvalue()
    assert recorder.film().frames[-1].tokens == film.frames[-1].tokens


def test_seldom_are_plain_lines_seldom(tokenizer: Any) -> None:
    film, file = film_of(tokenizer, "Say", " one two three"), StringIO()
    watcher = Watcher(Recorder(MASK), TokenText(tokenizer), reporter_on(file, live=False))
    with watcher:
        for number in range(len(film.frames)):
            watcher(progress(film, number))
    assert file.getvalue() == ""


@pytest.mark.parametrize("fails", [False, True])
def test_the_terminal_is_given_back(tokenizer: Any, fails: bool) -> None:
    film, file = film_of(tokenizer, "Say", " one two three"), StringIO()
    recorder = Recorder(MASK, film.end_ids)
    watcher = Watcher(recorder, TokenText(tokenizer), reporter_on(file, live=True))
    try:
        with watcher:
            watcher(progress(film, 0))
            watcher(progress(film, 1))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    written = file.getvalue()
    check_given_back(written)
    after = written.rpartition("\x1b[?1049l")[2]
    assert ("forward 1, 2 of" in after) == fails


def check_given_back(written: str) -> None:
    assert written.count("\x1b[?1049h") == written.count("\x1b[?1049l") == 1
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")


@pytest.mark.parametrize("watched", [True, False], ids=["watch", "stream"])
def test_ctrl_c_leaves_a_sane_terminal(
    source_cache: Callable[..., Path], tmp_path: Path, watched: bool
) -> None:
    convert(source_cache("llama", max_position_embeddings=8192), tmp_path / "out", "bd3lm")
    options = ["--max-new-tokens", "6000", "--steps", "8", *(["--watch"] if watched else [])]
    child = Terminal("sample", str(tmp_path / "out"), *options)
    child.read_until(b"of 6000 tokens")
    if watched:
        child.resize(10, 31)
        os.killpg(child.process.pid, signal.SIGWINCH)
        seen = len(child.written)
        while len(child.written) < seen + 2000:
            assert child.read(30)
    assert child.process.poll() is None
    os.write(child.master, b"\x03")
    assert child.close() == 130
    written = child.written.decode(errors="replace")
    assert "error: interrupted" in written
    assert "Traceback" not in written
    assert termios.tcgetattr(child.slave) == child.before
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    if watched:
        check_given_back(written)
        assert re.search(r"forward \d+, \d+ of 6000 tokens: .", written.rpartition("1049l")[2])
    else:
        assert "1049h" not in written, "what is there stays"
    os.close(child.master)
    os.close(child.slave)


def test_below_what_is_there_only_what_is_new_is_drawn(tokenizer: Any) -> None:
    film, file = film_of(tokenizer, "Say", " one two three"), StringIO()
    recorder = Recorder(MASK, film.end_ids)
    reporter = reporter_on(file, live=True)
    with Watcher(recorder, TokenText(tokenizer), reporter, screen=False) as watcher:
        for number in range(len(film.frames)):
            watcher(progress(film, number))
    assert "1049h" not in file.getvalue()
    written = ESCAPE.sub("", file.getvalue())
    assert "one two three" in written
    assert "Say" not in written
