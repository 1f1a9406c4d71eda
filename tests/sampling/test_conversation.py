"""A conversation as a value, what is typed in one, and answers as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from factory import TOKENIZERS

import dllm_convert as dc
from dllm_convert.common.console import Reporter
from dllm_convert.common.json_files import load_json_object
from dllm_convert.errors import DataError, RequestError
from dllm_convert.recipe.decoding import SETTINGS
from dllm_convert.sampling.commands import as_commands, obey
from dllm_convert.sampling.conversation import Chat
from dllm_convert.sampling.replies import Stopped, TextPieces, reply
from dllm_convert.sampling.shown import banner

TALK = Chat(system="Be brief.").ask("One?").answer("1", {"forwards": 2}).ask("Two?").answer("2")


def nothing(settings: Mapping[str, Any]) -> None:
    """Check nothing."""


def typed(chat: Chat, line: str, verifier: str | None = None) -> Chat:
    return obey(chat, line, nothing, verifier).chat


def test_every_step_leaves_what_was_before_it_as_it_was() -> None:
    before = json.dumps(TALK.as_dict())
    assert [turn.content for turn in TALK.undo().turns] == ["One?", "1"]
    assert [turn.content for turn in TALK.reopen().turns] == ["One?", "1", "Two?"]
    assert TALK.reopen().waits
    assert TALK.ask("a").ask("b").turns[-1].content == "b", "what was not answered is replaced"
    assert TALK.ask("a").undo() == TALK
    assert TALK.under("").system is None
    hot = TALK.decoded_with(temperature=1.0)
    assert hot.decoded_as_saved("temperature", "top_k") == TALK
    assert hot.decoded_with(temperature=None).settings == {"temperature": None}
    assert not TALK.emptied().turns
    assert json.dumps(TALK.as_dict()) == before


def test_each_answer_draws_from_a_seed_of_its_own() -> None:
    chat = Chat(seed=5).ask("One?")
    seeds = {
        chat.next_seed,
        chat.answer("1").ask("Two?").next_seed,
        chat.answer("1").reopen().next_seed,
        chat.answer("1").reopen().answer("1").reopen().next_seed,
    }
    assert len(seeds) == 4
    assert None not in seeds
    assert Chat().ask("One?").next_seed is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Chat().answer("1"),
        lambda: Chat().undo(),
        lambda: Chat().reopen(),
        lambda: Chat().ask("  \n"),
        lambda: TALK.answer("3"),
    ],
)
def test_what_makes_no_conversation_is_refused(wrong: Callable[[], Chat]) -> None:
    with pytest.raises(RequestError):
        wrong()


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    assert obey(TALK, f"/save {file}", nothing, None).says == (f"saved in {file}",)
    assert Chat.from_dict(load_json_object(file), "it") == TALK
    with pytest.raises(RequestError, match="is there already"):
        obey(TALK, f"/save {file}", nothing, None)
    with pytest.raises(RequestError, match="cannot be written"):
        obey(TALK, f"/save {tmp_path}/no/file", nothing, None)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"turns": None},
        {"turns": [{"role": "assistant", "content": "1", "facts": {}}]},
        {"turns": [{"role": "user", "content": 1, "facts": {}}]},
        {"turns": [{"role": "user", "content": "a"}]},
        {"settings": []},
        {"seed": "1"},
        {"more": 1},
    ],
)
def test_what_is_no_saved_conversation_is_told(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"c\.json is no conversation"):
        Chat.from_dict(TALK.as_dict() | change, "c.json")


# What is typed


def test_every_setting_has_a_command() -> None:
    for name, setting in SETTINGS.items():
        if name == "verify_with":
            continue
        command = (setting.flag or f"--{name.replace('_', '-')}").removeprefix("--")
        value = setting.choices[0] if setting.choices else {"switch": "on"}.get(setting.kind, "1")
        changed = typed(TALK, f"/{command} {value}")
        assert set(changed.settings) == {name}
        assert typed(changed, f"/{command} default") == TALK
        assert typed(changed, f"/{command} off").settings == {name: None}
        assert as_commands(f"{name} is 3") == f"/{command} is 3"
        for wrong in ("", "x", "-1", "nan", "1e999"):
            if not (setting.kind == "switch" and wrong == ""):
                with pytest.raises(RequestError, match="expected"):
                    typed(TALK, f"/{command} {wrong}")


def test_commands_do_what_they_say() -> None:
    assert typed(TALK, "/undo") == TALK.undo()
    assert typed(TALK, "/SYSTEM  Sing.").system == "Sing."
    assert typed(TALK, "/system").system is None
    assert not typed(TALK, "/clear").turns
    again = obey(TALK, "/regen", nothing, None)
    assert again.replies
    assert again.says, "nothing is drawn"
    assert not obey(TALK.decoded_with(temperature=1.0), "/regen", nothing, None).says
    assert obey(TALK, "/quit", nothing, None).ends
    shown = "\n".join(obey(TALK, "/help", nothing, "self").says)
    for name in ("threshold", "steps", "regen", "undo", "system", "save", "lossless", "top-p"):
        assert f"/{name}" in shown
    with pytest.raises(RequestError, match="no /treshold") as caught:
        typed(TALK, "/treshold 1")
    assert caught.value.hint == "Did you mean /threshold?"


def test_lossless_is_there_where_there_is_a_verifier() -> None:
    with pytest.raises(RequestError, match="no verifier"):
        typed(TALK, "/lossless")
    assert "/lossless" not in "\n".join(obey(TALK, "/help", nothing, None).says)
    on = typed(TALK, "/lossless on", "base")
    assert on.settings == {"verify_with": "base"}
    assert typed(on, "/lossless off", "base").settings == {"verify_with": None}


def test_what_the_model_cannot_do_changes_nothing() -> None:
    def refuse(settings: Mapping[str, Any]) -> None:
        raise RequestError("no")

    with pytest.raises(RequestError, match="no"):
        obey(TALK, "/steps 3", refuse, None)


# Answers


def test_pieces_are_whole_characters_and_make_the_text() -> None:
    tokenizer = TOKENIZERS["llama"]()
    text = "A name 世界, é and 🙂."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for width in (1, 2, 5, len(ids)):
        pieces: list[str] = []
        streamer = TextPieces(tokenizer, pieces.append)
        streamer.put(torch.tensor([[1, 2, 3]]))
        for start in range(0, len(ids), width):
            streamer.put(torch.tensor([ids[start : start + width]]))
        streamer.end()
        assert "".join(pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.fixture(scope="module")
def loaded(source_cache: Callable[..., Path], tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("talk") / "out"
    convert(source_cache("llama"), folder, "bd3lm", generation={"max_new_tokens": 12})
    return dc.load(folder)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"confidence_threshold": 0.01}])
def test_an_answer_is_what_generate_writes(
    loaded: tuple[Any, Any], settings: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    asked = Chat(system="Be brief.", settings=settings, seed=3).ask("One?")
    pieces: list[str] = []
    done = reply(model, tokenizer, asked, Reporter(quiet=True), write=pieces.append)
    prompt = tokenizer.apply_chat_template(
        asked.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = prompt["input_ids"]
    expected = model.generate(ids, seed=asked.next_seed, **settings)[0, ids.shape[1] :]
    assert done.turns[-1].content == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == done.turns[-1].content
    facts = done.turns[-1].facts
    assert facts["tokens_per_forward"] == pytest.approx(
        facts["new_tokens"] / facts["forwards"], 0.01
    )
    assert dc.reply(loaded, asked).turns[-1].content == done.turns[-1].content
    following = dc.reply(loaded, done.ask("Two?"))
    assert [turn.role for turn in following.turns] == ["user", "assistant"] * 2


def test_an_answer_can_be_given_up(loaded: tuple[Any, Any]) -> None:
    looked: list[int] = []

    def third() -> bool:
        looked.append(1)
        return len(looked) == 3

    with pytest.raises(Stopped):
        reply(*loaded, Chat().ask("One?"), Reporter(quiet=True), stop=third)
    assert len(looked) == 3


def test_a_conversation_that_is_too_long_says_so(
    loaded: tuple[Any, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    dc.reply(loaded, Chat().ask("word " * 100))
    assert "more than the context of 256" in capfd.readouterr().err
    with pytest.raises(RequestError, match="nothing was asked"):
        dc.reply(loaded, Chat())
    with pytest.raises(RequestError):
        dc.reply(loaded, Chat(settings={"block_length": 8}).ask("One?"))


def test_the_banner_says_what_was_measured_and_nothing_else() -> None:
    nats = lambda value: {"nats_per_token": value}  # noqa: E731
    manifest: dict[str, Any] = {
        "recipe": {"target": "bd3lm", "block_size": 8, "source": "a/b\x1b"},
        "measurements": {
            "train": {"tokens": 2560},
            "nelbo_after": nats(6.5),
            "ar_nll": nats(3.25),
        },
    }
    first, second = banner("out", manifest)
    assert first == "out: bd3lm in blocks of 8, made of a/b␛; trained on 2,560 tokens"
    assert second == "NELBO 6.50 nats per token, 3.25 above the base's own NLL, 3.25"
    manifest["measurements"] = {}
    assert banner("out", manifest)[0].endswith("not trained: what it writes is noise")
    assert len(banner("out", manifest)) == 1
    assert banner("x.gguf", {}) == ["x.gguf: a diffusion model; nothing is recorded of it"]
