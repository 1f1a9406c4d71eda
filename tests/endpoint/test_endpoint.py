"""The server of a checkpoint, asked by OpenAI's own client over loopback."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conversion import convert
from gated import gated_folder

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

KINDS = ("blocks", "whole", "gated", "qwen2")
NAME = "tiny"
TURNS = [{"role": "user", "content": "a name"}]


def _model(kind: str, source: Callable[[str], Path], folder: Path) -> Path:
    if kind == "gated":
        gated_folder(source("llama"), folder)
    elif kind == "whole":
        convert(source("mistral"), folder, "mdlm")
    else:
        convert(source("llama" if kind == "blocks" else kind), folder, "bd3lm", block=4)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest,
    source_cache: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A server in this process, and what it serves."""
    from dllm_convert.endpoint.run import listen, make_app
    from dllm_convert.modeling.loading import load_checkpoint

    folder = _model(request.param, source_cache, tmp_path_factory.mktemp("served") / "out")
    loaded = load_checkpoint(folder, device="cpu", dtype="float32")
    if loaded.tokenizer.chat_template is None:
        loaded.tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    # Half a character is shown in a whole text and never in a stream.
    shown = [loaded.tokenizer.decode([token]) for token in range(loaded.model.config.vocab_size)]
    odd = [token for token, text in enumerate(shown) if not text.isascii() or len(text) < 1]
    loaded.model.generation_config.suppress_tokens = odd
    app = make_app(NAME, loaded.model, loaded.tokenizer, {"max_new_tokens": 24})
    bound = listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    while not server.started:
        time.sleep(0.01)
    yield SimpleNamespace(
        client=client, model=loaded.model, tokenizer=loaded.tokenizer, port=port, kind=request.param
    )
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def text_of(served: Any, prompt: str = "a name", **more: Any) -> Any:
    """What the client gets of the completions."""
    given = {"max_tokens": 12, "temperature": 0, **more}
    return served.client.completions.create(model=NAME, prompt=prompt, **given)


def ours(served: Any, prompt: str = "a name", new: int = 12, **more: Any) -> Any:
    """What `sample` writes of the same prompt."""
    from dllm_convert.sampling.run import decode_sample

    return decode_sample(served.model, served.tokenizer, prompt, max_new_tokens=new, **more)


def joined(stream: Any) -> tuple[str, Any, Any]:
    """The text of a stream, why it ended, and its usage."""
    text, reason, usage = "", None, None
    for chunk in stream:
        choice = chunk.choices[0]
        delta = choice.text if hasattr(choice, "text") else choice.delta.content
        text += delta or ""
        reason, usage = choice.finish_reason or reason, chunk.usage or usage
    return text, reason, usage


def counted(usage: Any) -> dict[str, Any]:
    known: dict[str, Any] = usage.model_dump(exclude_none=True)
    return known


def test_completions_say_what_sample_says(served: Any) -> None:
    right = ours(served)
    found = text_of(served)
    assert found.choices[0].text == right.text
    assert found.model == NAME
    assert found.usage.completion_tokens == right.new_tokens
    assert found.usage.prompt_tokens + right.new_tokens == found.usage.total_tokens
    assert found.usage.forwards == right.forwards
    assert found.usage.tokens_per_forward == right.tokens_per_forward
    text, reason, usage = joined(text_of(served, stream=True))
    assert text == right.text
    assert reason == found.choices[0].finish_reason
    assert counted(usage) == counted(found.usage)


def test_a_chat_is_a_chat(served: Any) -> None:
    create = served.client.chat.completions.create
    given: dict[str, Any] = {"model": NAME, "messages": TURNS, "temperature": 0, "max_tokens": 12}
    right = ours(served, "a name", chat=True)
    found = create(**given)
    message = found.choices[0].message
    assert message.role == "assistant"
    text, reason, usage = joined(create(**given, stream=True))
    assert message.content.strip() == text.strip()  # as a parsed reply is
    if served.kind != "qwen2":  # whose replies transformers parses
        assert text == right.text
    assert reason == found.choices[0].finish_reason
    assert counted(usage) == counted(found.usage)
    assert usage.completion_tokens == right.new_tokens and usage.forwards == right.forwards
    assert usage.prompt_tokens > 4
    two = create(**{**given, "messages": [{"role": "system", "content": "Be."}, *TURNS]})
    assert two.usage.prompt_tokens > usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_its_stop(served: Any, stream: bool) -> None:
    free = ours(served).text
    stops = [free[5:7], "never to be seen"]
    expected = free[: free.index(stops[0])]
    found = text_of(served, stop=stops, stream=stream)
    text, reason, usage = joined(found) if stream else (
        found.choices[0].text, found.choices[0].finish_reason, found.usage
    )  # fmt: skip
    assert (text, reason) == (expected, "stop")
    assert usage.completion_tokens < 12 or len(free) < 12
    chat = {"model": NAME, "messages": TURNS, "temperature": 0, "max_tokens": 12, "stream": stream}
    free = served.client.chat.completions.create(**{**chat, "stream": False})
    free = free.choices[0].message.content
    if len(free) > 4:
        found = served.client.chat.completions.create(**chat, stop=free[3:5])
        text = joined(found)[0] if stream else found.choices[0].message.content
        assert text.strip() == free[: free.index(free[3:5])].strip()


def test_settings_of_ours_are_taken(served: Any) -> None:
    slow = text_of(served, extra_body={"max_denoising_steps": None, "confidence_threshold": 1.0})
    fast = text_of(served, extra_body={"confidence_threshold": 0.0})
    assert fast.usage.tokens_per_forward > slow.usage.tokens_per_forward
    right = ours(served, confidence_threshold=0.0)
    assert fast.choices[0].text == right.text
    drawn = [
        text_of(served, temperature=1.5, seed=seed, extra_body={"top_k": 50}).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == ours(served, temperature=1.5, seed=1, top_k=50).text
    banned = text_of(served, extra_body={"repetition_penalty": 9.0}).choices[0].text
    assert banned == ours(served, repetition_penalty=9.0).text
    if served.kind == "gated":
        found = text_of(served, extra_body={"verify_with": "base"})
        assert found.choices[0].text == ours(served, verify_with="base").text
    biased = served.client.chat.completions.create(
        model=NAME, messages=TURNS, max_tokens=4, temperature=0, logit_bias={"70": 100}
    )
    assert biased.choices[0].message.content == served.tokenizer.decode([70] * 4)


def test_the_servers_defaults_hold_where_nothing_is_said(served: Any) -> None:
    found = served.client.completions.create(model=NAME, prompt="a name")
    assert found.choices[0].text == ours(served, new=24).text


def test_prompts_as_lm_eval_sends_them(served: Any) -> None:
    one, two = text_of(served, "a name"), text_of(served, "the list is")
    ids = [served.tokenizer(text).input_ids for text in ("a name", "the list is")]
    for prompt in (["a name", "the list is"], ids):
        both = text_of(served, prompt)
        assert [c.text for c in both.choices] == [one.choices[0].text, two.choices[0].text]
        assert [c.index for c in both.choices] == [0, 1]
        assert both.usage.completion_tokens == (
            one.usage.completion_tokens + two.usage.completion_tokens
        )
    assert text_of(served, ids[0]).choices[0].text == one.choices[0].text


def test_eight_at_once(served: Any) -> None:
    prompts = [
        f"{word} name" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    ]

    def text(prompt: str) -> str:
        found: str = text_of(served, prompt, max_tokens=6).choices[0].text
        return found

    def streamed(prompt: str) -> str:
        return joined(text_of(served, prompt, max_tokens=6, stream=True))[0]

    alone = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, prompts)) == alone
        assert list(pool.map(streamed, prompts)) == alone


def test_a_client_that_hangs_up_frees_the_model(served: Any) -> None:
    """What nobody reads is not written to its end: the next answer comes at once."""
    body = json.dumps({
        "model": NAME, "prompt": "a name", "max_tokens": 96, "stream": True, "temperature": 0,
        "generation_config": None,
    })  # fmt: skip
    seen = threading.Event()
    forward, count = type(served.model).forward, 0

    def slow(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        seen.set()
        time.sleep(0.05)
        return forward(self, *arguments, **more)

    served.model.forward = slow.__get__(served.model)
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert seen.wait(10)
        time.sleep(0.3)
        del served.model.forward
        before = count
        assert text_of(served).choices[0].text == ours(served).text
        assert before < 40
    finally:
        vars(served.model).pop("forward", None)


@pytest.mark.parametrize("served", ["blocks"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": "hot"}, 'temperature is "hot", expected a number'),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "x"}, 'max_tokens is "x", expected a whole number'),
        ({"max_tokens": True}, "max_tokens is true, expected a whole number"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected a whole number"),
        ({"stop": {"a": 1}}, "expected a text or a list of texts"),
        ({"seed": "1"}, 'seed is "1"'),
        ({"max_tokens": 10**9}, "more than the context of 256"),
        ({"prompt": [9] * 300}, "together more than the context of 256"),
        (
            {
                "temperature": 1,
                "extra_body": {
                    "generation_config": '{"num_return_sequences": 900, "do_sample": true}'
                },
            },
            "one answer",
        ),
        ({"n": 3}, "n is 3, which is not supported"),
        ({"logprobs": 2}, "no probabilities of next tokens"),
        ({"echo": True}, "echo is True"),
        ({"model": "another"}, "pinned to 'tiny'"),
        ({"prompt": []}, "prompt is a text"),
        ({"prompt": [5, -1]}, "ids are below"),
        ({"prompt": [100_000]}, "ids are below"),
        ({"prompt": ["a", "b"], "stream": True}, "one can be streamed"),
        ({"stop": [1]}, "stop"),
        ({"extra_body": {"confidence_threshold": -1}}, "confidence_threshold is -1"),
        ({"extra_body": {"unmasking": "best"}}, "unmasking is 'best'"),
        ({"extra_body": {"generation_config": '{"num_beams": 4}'}}, "no beams"),
        ({"extra_body": {"generation_config": "{"}}, "Expecting"),
        ({"stream": True, "extra_body": {"top_p": 7}}, "top_p is 7"),
    ],
    ids=str,
)
def test_a_bad_request_is_told(served: Any, fields: dict[str, Any], said: str) -> None:
    given = {"model": NAME, "prompt": "a name", **fields}
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        served.client.completions.create(**given)
    assert caught.value.body["type"] == "invalid_request_error"
    assert text_of(served, max_tokens=4).usage.total_tokens > 4, "it goes on"


def test_other_bad_requests(served: Any) -> None:
    create = served.client.chat.completions.create
    for turns in ([], "hello", [{"content": "no role"}], [1]):
        with pytest.raises(openai.BadRequestError):
            create(model=NAME, messages=turns)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        create(model=NAME, messages=TURNS, response_format={"type": "json_object"})
    with pytest.raises(openai.UnprocessableEntityError, match="temprature"):
        create(model=NAME, messages=TURNS, extra_body={"temprature": 1})
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        served.client.responses.create(model=NAME, input="a name")
    with pytest.raises(openai.NotFoundError):
        served.client.post("/reset", cast_to=object)


def test_models_and_health(served: Any) -> None:
    assert [model.id for model in served.client.models.list()] == [NAME]
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health", timeout=5) as answer:
        assert json.load(answer) == {"status": "ok"}


@pytest.mark.parametrize("served", ["blocks"], indirect=True)
def test_the_page_runs(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "endpoint.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000/v1" in code and "qwen3-0.6b" in code
    code = code.replace(":8000/", f":{served.port}/").replace("qwen3-0.6b", NAME)
    exec(code, {})
    assert float(capsys.readouterr().out.split()[-1]) > 0
