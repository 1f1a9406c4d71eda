"""Answer OpenAI's clients with a converted checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline.api.writing import load
from dllm_convert.source.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    import torch

_NEEDED = ("fastapi", "uvicorn", "openai", "transformers.cli.serving.completion")


def serve(
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    lossless: bool = False,
    base: str | Path | None = None,
    seed: int | None = None,
    cors: bool = False,
    reporter: Reporter | None = None,
    **decoding: Any,
) -> None:
    """Answer requests as OpenAI's API has them, until the process is interrupted.

    Chats at `/v1/chat/completions`, texts to go on from at `/v1/completions`, streamed or whole, by
    the server of `transformers serve`. Requests may have any setting of `generate`; `usage` says
    `forwards` and `tokens_per_forward` too. There is no password, and one request is decoded after
    the other.

    Args:
        checkpoint: Its folder, or the Hub id of one that was published.
        host: Address to listen at; "0.0.0.0" is every one this machine has.
        port: Port; 0 takes a free one.
        name: What requests call the model; None is the Hub id, or the folder's name.
        revision: Branch, tag or commit of a Hub id.
        device: Where the model goes; None is the GPU if there is one.
        dtype: Type the weights are held in; None is bfloat16 on a GPU and float32 elsewhere.
        lossless: Write what autoregressive decoding would write, and denoise only to draft it. What
            holds no verifier drafts for the base it was made of, as two models.
        base: Who verifies then, in place of that base: a folder, a Hub id or a GGUF file.
        seed: Of requests that have none.
        cors: Whether pages of other origins may ask.
        reporter: Told where it listens; by default on stderr.
        **decoding: Settings of decoding where a request says nothing.

    Raises:
        DataError: There is no such checkpoint, or it is not whole.
        DllmConvertError: What the server needs is not installed.
        HubError: The Hub does not have it, refuses it or cannot be reached.
        IncompatibleError: It is no diffusion checkpoint.
        RequestError: Settings contradict each other or the checkpoint, or the port is taken.
    """
    _require_server()
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.endpoint.run import answer, listen, make_app
    from dllm_convert.sampling.pairing import settle

    teller = reporter or Reporter()
    given = {setting: value for setting, value in decoding.items() if value is not None}
    with quiet_libraries(), listen(host, port) as bound:
        folder = checkpoint_folder(checkpoint, teller, revision)
        settled = settle(folder, given, lossless=lossless, base=base)
        with teller.task("load"):
            model, tokenizer = load(folder, device=device, dtype=dtype)
        verifier = settled.load(model, tokenizer, teller)
        is_folder = Path(checkpoint).is_dir()
        called = name or (Path(checkpoint).resolve().name if is_folder else str(checkpoint))
        defaults = {**settled.given, **({} if seed is None else {"seed": seed})}
        app = make_app(called, model, tokenizer, defaults, verifier=verifier, cors=cors)
        at = f"http://{host}:{bound.getsockname()[1]}/v1"
        kinds = "chats and texts" if tokenizer.chat_template else "texts (it has no chat template)"
        answer(app, bound, lambda: teller.line(f"{called} answers {kinds} at {at}; Ctrl-C ends it"))


def _require_server() -> None:
    """Refuse to serve without transformers' server.

    Raises:
        DllmConvertError: A part of it is not installed.
    """
    try:
        missing = [name for name in _NEEDED if find_spec(name) is None]
    except ImportError:  # transformers without its command line
        missing = [_NEEDED[-1]]
    if missing:
        raise DllmConvertError(
            f"the server needs {', '.join(missing)}, which is not installed",
            hint="pip install 'dllm-convert[serve]'",
        )
