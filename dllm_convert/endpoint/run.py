"""Put the server of a checkpoint together, and run it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from dllm_convert.endpoint.answering import ChatHandler, NotHere, TextHandler
from dllm_convert.endpoint.generating import AnswerManager
from dllm_convert.errors import RequestError


class _OneModel(ModelManager):
    """transformers' keeper of models, with the one that is served, whose class is ours."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self._held = model, tokenizer
        self._since = int(time.time())
        super().__init__(device="cpu", force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """A name is a name: there are no revisions of it here."""
        return model_id

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self._held[1]

    def _load_model(self, *_: Any, **__: Any) -> Any:
        return self._held[0]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the one model, instead of what the Hub's cache holds."""
        name = self.force_model
        return [{"id": name, "object": "model", "created": self._since, "owned_by": "dllm-convert"}]


class _OneManager(GenerationState):
    """transformers' state of a server, with our decoding for whatever is asked."""

    def __init__(self, verifier: Any) -> None:
        super().__init__()
        self._manager = AnswerManager(verifier)

    def get_manager(self, model_id: str, use_cb: bool = False) -> AnswerManager:
        """Return what decodes."""
        return self._manager


def _nobody() -> Any:
    # In the places of handlers for other kinds of models.
    return NotHere()


def make_app(
    name: str,
    model: Any,
    tokenizer: Any,
    defaults: Mapping[str, Any] | None = None,
    *,
    verifier: Any = None,
    cors: bool = False,
) -> FastAPI:
    """Return the application that answers for a model.

    Args:
        name: What requests call it.
        model: Diffusion model, in evaluation mode.
        tokenizer: Its tokenizer.
        defaults: Settings of decoding, and `seed`, where requests say nothing.
        verifier: Another model, whose text is written where `verify_with` is "base"; None for none.
        cors: Whether pages of other origins may ask.

    Raises:
        RequestError: The tokenizer cannot stream.
    """
    if not hasattr(tokenizer, "_tokenizer"):
        raise RequestError(
            f"the tokenizer is a {type(tokenizer).__name__}, which cannot stream: the server needs "
            "one with a tokenizer.json"
        )
    models, state, nobody = _OneModel(name, model, tokenizer), _OneManager(verifier), _nobody()
    given = dict(defaults or {})
    app: FastAPI = build_server(
        models,
        ChatHandler(models, state, defaults=given),
        completion_handler=TextHandler(models, state, defaults=given),
        response_handler=nobody,
        transcription_handler=nobody,
        systemone_handler=nobody,
        generation_state=state,
        enable_cors=cors,
    )
    # What is not there is not listed either; models come and go with the process.
    paths = ("/load_model", "/reset")
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") not in paths]

    async def told(_: Request, error: Any) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = {"message": str(error.detail), "type": kind, "code": error.status_code}
        return JSONResponse({"error": body}, status_code=error.status_code)

    app.add_exception_handler(HTTPException, told)
    return app


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything is loaded.

    Raises:
        RequestError: The address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except OSError as error:
        raise RequestError(
            f"cannot listen at {host}, `port` {port}: {error.strerror or error}",
            hint="`port` 0 takes a free one",
        ) from error
    return bound


def answer(app: FastAPI, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until the process is told to end.

    Args:
        app: What `make_app` made.
        bound: Where it listens.
        ready: Called once it does.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

    config = uvicorn.Config(app, log_level="warning", access_log=False)
    try:
        Server(config).run(sockets=[bound])
    except KeyboardInterrupt:
        # How a server is ended: no failure.
        return
