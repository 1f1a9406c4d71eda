"""A request's settings, what is refused of it, and what its answer says it took."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler

from dllm_convert.common import strict_json
from dllm_convert.endpoint.generating import AnswerManager, cut_at, stop_texts
from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.published.limits import check_context, context_of
from dllm_convert.modeling.published.paired import check_paired
from dllm_convert.modeling.published.settings import DEFAULT_NEW_TOKENS, TAKEN, decoding_options
from dllm_convert.sampling.checking import own_verifier
from dllm_convert.sampling.prompts import encode_prompt

LONGEST_ANSWER = 1024
"""New tokens where neither a request nor the server says how many, of a model that writes blocks
until its text ends; what writes whole texts writes as many as its checkpoint says."""
_FOREIGN = ("stop_strings", "tokenizer", "logits_processor", "stopping_criteria")
"""Settings of `generate` that have no place in a request, or another name."""
_SAMPLING = frozenset(TAKEN) - set(_FOREIGN) - {"prefix_allowed_tokens_fn", "num_return_sequences"}
_ONE = "one answer is written for each request; ask again, with another seed"
_ODDS = (
    "a diffusion has no probabilities of next tokens; dllm-convert evaluate bounds those of a text"
)
_IDLE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), _ONE),
    "best_of": ((1,), _ONE),
    "logprobs": ((False, 0), _ODDS),
    "top_logprobs": ((0,), _ODDS),
    "echo": ((False,), "the answer is what is new"),
    "presence_penalty": ((0,), "repetition_penalty, or frequency_penalty, is there"),
    "response_format": (({"type": "text"},), "nothing holds a text to a grammar here"),
    "prediction": ((), "drafts are denoised"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tools"),
    "modalities": ((["text"],), "the model writes text"),
    "audio": ((), "the model writes text"),
}
"""Fields of OpenAI that would change the answer and are not honoured: at which values they change
nothing, and what to say otherwise. transformers leaves them out without a word."""
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "seed", "n"), ((int,), "a whole number")
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "presence_penalty", "frequency_penalty"),
        ((int, float), "a number"),
    ),
    "stop": ((str, list), "a text or a list of texts"),
    "stream": ((bool,), "true or false"),
    "messages": ((list,), "a list of messages"),
    "prompt": ((str, list), "a text"),
}
"""What fields of OpenAI hold. transformers' server looks at their names alone."""


def _check_kinds(body: Mapping[str, Any]) -> None:
    """Refuse fields that hold something else than they may.

    Raises:
        HTTPException: One does.
    """
    for name, (kinds, expected) in _KINDS.items():
        value = body.get(name)
        # Python counts true as 1.
        odd = isinstance(value, bool) and bool not in kinds
        if value is not None and (odd or not isinstance(value, kinds)):
            raise _bad(f"{name} is {strict_json.dumps(value)}, expected {expected}")


def _bad(why: str) -> HTTPException:
    return HTTPException(status_code=400, detail=why)


class _Fields:
    """The fields a request may have: those of transformers' server and of our decoding."""

    def __init__(self, theirs: Any) -> None:
        self.__mutable_keys__ = frozenset(getattr(theirs, "__mutable_keys__", ())) | _SAMPLING


class _Answering(BaseHandler):
    """What both kinds of requests have in common."""

    def __init__(self, *arguments: Any, defaults: Mapping[str, Any], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.defaults = dict(defaults)
        self._valid_params_class: Any = _Fields(type(self)._valid_params_class)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request; what is wrong with it is a 400 that says so."""
        try:
            return await self._answer(body, request_id)
        except (DllmConvertError, KeyError, TypeError, TemplateError, ValueError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise _bad(_as_asked(missing, body)) from error

    async def _answer(self, body: dict[str, Any], request_id: str) -> Any:
        return await super().handle_request(body, request_id)

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        _check_kinds(body)
        for name, (idle, why) in _IDLE.items():
            value = body.get(name)
            if value is not None and value not in idle:
                raise _bad(f"{name} is {value!r}, which is not supported: {why}")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        """Return what a request says, the server's defaults behind it; no more.

        The checkpoint's own settings are `generate`'s to add: it knows what outweighs what.
        """
        said = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(said, GenerationConfig(), use_cb=use_cb)
        sizes = ("max_tokens", "max_completion_tokens", "generation_config")
        if all(body.get(name) is None for name in sizes):
            config.max_new_tokens = None
        for name, value in self.defaults.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
        for name in _SAMPLING & body.keys():
            if body[name] is not None and name not in ("temperature", "top_p"):
                setattr(config, name, body[name])
        config.seed = body.get("seed", self.defaults.get("seed"))
        return config

    def _check(self, model: Any, tokenizer: Any, ids: torch.Tensor, config: Any) -> None:
        """Say how many tokens an answer has at the most, and refuse what could not be decoded."""
        width, block = ids.shape[1], getattr(model.config, "block_size", None)
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = _most_new(model, width, block)
        given = GenerationConfig()
        held = {name: value for name, value in vars(config).items() if value is not None}
        vars(given).update({name: held[name] for name in held if name not in ("seed", *_FOREIGN)})
        seed, own = config.seed, model.generation_config
        other = self._other_verifier(model, given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = decoding_options(model.config, own, 1, seed, {}, given=given, width=width)
        if other is not None:
            check_paired(model, other, options)
        config.max_new_tokens = new = options.max_new_tokens
        if options.num_return_sequences > 1:
            raise ValueError(_ONE)
        context = context_of(model)
        if context is not None and width + new > context:
            raise ValueError(
                f"the prompt has {width} tokens and {new} are asked for, together more than the "
                f"context of {context}"
            )
        check_context(model, [width], new, block)
        if any(not isinstance(stop, str) or not stop for stop in stop_texts(config)):
            raise ValueError(f"stop is {config.stop_strings!r}, expected texts")

    def _other_verifier(self, model: Any, given: Any) -> Any:
        """Take a verifier that is another model out of a request's settings; None for none."""
        asked = getattr(given, "verify_with", None)
        if asked != "base" or own_verifier(model.config.to_dict()) == "base":
            return None
        if self._manager.verifier is None:
            raise ValueError(
                "verify_with is 'base', and this server holds none beside the model: start it with "
                "--lossless, and --base if its manifest names none"
            )
        # In the place of one that the checkpoint has saved.
        given.verify_with = None
        return self._manager.verifier

    @property
    def _manager(self) -> AnswerManager:
        state: Any = self.generation_state
        manager: AnswerManager = state.get_manager("")
        return manager

    def _with_spent(self, usage: Any, request_id: str) -> Any:
        """Add forwards, and tokens per forward, to the usage that a client is told."""
        if usage is None:  # more of the text is to come
            return None
        spent = self._manager.spent.pop(request_id)
        return type(usage)(**usage.model_dump(exclude_none=True), **spent.as_usage())

    def _streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, config: Any,
        *more: Any, **named: Any,
    ) -> Any:  # fmt: skip
        self._check(model, processor, inputs["input_ids"], config)
        return super()._streaming(
            request_id, model, processor, model_id, inputs, config, *more, **named
        )

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, config: Any,
        *more: Any, **named: Any,
    ) -> Any:  # fmt: skip
        self._check(model, processor, inputs["input_ids"], config)
        answer = await super()._non_streaming(
            request_id, model, processor, model_id, inputs, config, *more, **named
        )
        told = json.loads(answer.body)
        spent = self._manager.spent.pop(request_id)
        told["usage"] |= spent.as_usage()
        for choice in told["choices"]:
            # A parsed reply is made of all tokens, those of the stop string too.
            message = choice.get("message", {})
            if message.get("content"):
                message["content"] = cut_at(message["content"], stop_texts(config))
        return JSONResponse(told)

    def _build_chunk_sse(self, request_id: str = "", *more: Any, **named: Any) -> str:
        named["usage"] = self._with_spent(named.get("usage"), request_id)
        told: str = super()._build_chunk_sse(request_id, *more, **named)
        return told


def _as_asked(message: str, body: Mapping[str, Any]) -> str:
    """Return a message that names the length of an answer as the request did."""
    given = (n for n in ("max_completion_tokens", "max_tokens") if body.get(n) is not None)
    return message.replace("max_new_tokens", next(given, "max_new_tokens"))


def _most_new(model: Any, width: int, block: int | None) -> int:
    """How many tokens an answer may have where nobody says, behind a prompt of `width`."""
    own = int(getattr(model.generation_config, "max_new_tokens", None) or DEFAULT_NEW_TOKENS)
    wanted = max(own, LONGEST_ANSWER) if block else own
    context = context_of(model)
    if context is None:
        return wanted
    room = context // (block or 1) * (block or 1) - width
    if room < 1:
        raise ValueError(f"the prompt has {width} tokens, the context of this model {context}")
    return min(wanted, room)


class ChatHandler(_Answering, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    async def _answer(self, body: dict[str, Any], request_id: str) -> Any:
        turns = body.get("messages")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            raise _bad("messages is a list of at least one turn, each with a role and content")
        _, _, tokenizer = self._resolve_model(body)
        if not tokenizer.chat_template:
            raise _bad("this model has no chat template: ask /v1/completions")
        return await super()._answer(body, request_id)


class TextHandler(_Answering, CompletionHandler):
    """`/v1/completions`, of one prompt or several, as texts or as ids."""

    async def _answer(self, body: dict[str, Any], request_id: str) -> Any:
        self._validate_request(body)
        found: tuple[str, Any, Any] = self._resolve_model(body)
        model_id, model, tokenizer = found
        prompts = _prompts(body.get("prompt"), len(tokenizer), tokenizer)
        manager = self._manager
        config = self._build_generation_config(body, model.generation_config)

        def asked(ids: list[int], number: int) -> tuple[Any, ...]:
            inputs = {"input_ids": torch.tensor([ids], device=model.device)}
            name = f"{request_id}-{number}" if number else request_id
            return name, model, tokenizer, model_id, inputs, config, manager, body.get("suffix")

        if body.get("stream"):
            if len(prompts) > 1:
                raise _bad(f"prompt holds {len(prompts)} prompts, and one can be streamed")
            return self._streaming(*asked(prompts[0], 0))
        told: dict[str, Any] = {}
        for number, ids in enumerate(prompts):
            answer = await self._non_streaming(*asked(ids, number))
            _join(told, json.loads(answer.body), number)
        return JSONResponse(told)


def _prompts(given: Any, rows: int, tokenizer: Any) -> list[list[int]]:
    """Return the ids of each prompt of a request, as OpenAI has them: texts or ids, one or many."""
    several = given if isinstance(given, list) and given else [given]
    if all(isinstance(one, int) for one in several):
        several = [several]
    found = []
    for one in several:
        ids = encode_prompt(tokenizer, one) if isinstance(one, str) else one
        if not isinstance(ids, list) or not ids or not all(_is_id(token, rows) for token in ids):
            raise _bad(
                "prompt is a text, a list of texts, a list of ids, or a list of those; ids are "
                f"below {rows}"
            )
        found.append(ids)
    return found


def _is_id(token: Any, rows: int) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < rows


def _join(told: dict[str, Any], answer: dict[str, Any], number: int) -> None:
    """Put an answer to the others of its request."""
    for choice in answer["choices"]:
        choice["index"] = number
    if not told:
        told.update(answer)
        return
    told["choices"] += answer["choices"]
    usage, more = told["usage"], answer["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "forwards"):
        usage[name] += more[name]
    usage["tokens_per_forward"] = round(usage["completion_tokens"] / max(usage["forwards"], 1), 3)


class NotHere:
    """What transformers' server answers and a diffusion language model does not."""

    async def handle_request(self, *_: Any) -> Any:
        """Refuse.

        Raises:
            HTTPException: Always.
        """
        raise HTTPException(404, "ask /v1/chat/completions or /v1/completions")
