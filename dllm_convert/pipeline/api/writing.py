"""Open a converted checkpoint and write text with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, overload

from dllm_convert.common.console import Reporter
from dllm_convert.errors import RequestError
from dllm_convert.source.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    import torch

    from dllm_convert.sampling.conversation import Chat
    from dllm_convert.sampling.run import Sample

_THREADS = "`threads` is for GGUF files; torch takes OMP_NUM_THREADS"


def load(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    reporter: Reporter | None = None,
) -> tuple[Any, Any]:
    """Load a converted checkpoint: its diffusion class, in evaluation mode, and its tokenizer.

    The class is this package's own; code that a checkpoint brings along is not run.

    Args:
        checkpoint: Its folder, or the Hub id `owner/name` of one that was published.
        revision: Branch, tag or commit of a Hub id.
        device: Where the model goes; None is the GPU if there is one.
        dtype: Type the weights are held in, as torch has it or by name; None is bfloat16 on a GPU
            and float32 elsewhere.
        reporter: Says what is downloaded; by default silent.

    Raises:
        DataError: There is no such checkpoint, or it is not whole.
        HubError: The Hub does not have it, refuses it or cannot be reached.
        IncompatibleError: It is no diffusion checkpoint.
        RequestError: There is no such type.
    """
    import torch

    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.modeling.loading import load_checkpoint

    held = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(held, torch.dtype) and held.is_floating_point):
        raise RequestError(f"dtype is {dtype!r}, expected one such as 'bfloat16' or 'float32'")
    with quiet_libraries():
        folder = checkpoint_folder(checkpoint, reporter or Reporter(quiet=True), revision)
        loaded = load_checkpoint(
            folder,
            device=None if device is None else str(device),
            dtype=None if held is None else str(held).removeprefix("torch."),
        )
    return loaded.model, loaded.tokenizer


@overload
def sample(
    checkpoint: str | Path | tuple[Any, Any], prompt: str | None = None, **how: Any
) -> Sample: ...
@overload
def sample(
    checkpoint: str | Path | tuple[Any, Any], prompt: Sequence[str], **how: Any
) -> list[Sample]: ...


def sample(
    checkpoint: str | Path | tuple[Any, Any],
    prompt: str | Sequence[str] | None = None,
    *,
    max_new_tokens: int | None = None,
    chat: bool = False,
    infill: str | None = None,
    lossless: bool = False,
    base: Any = None,
    seed: int | None = None,
    watch: bool = False,
    stream: bool = False,
    record: str | Path | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
    **decoding: Any,
) -> Sample | list[Sample]:
    """Write text with a converted checkpoint.

    Args:
        checkpoint: Its folder or Hub id, a GGUF file that `export` wrote, which llama.cpp runs, or
            a pair (model, tokenizer) as `load` returns it.
        prompt: Text to go on from, or several, which are written in one batch.
        max_new_tokens: Tokens to write; None is the checkpoint's default.
        chat: Put each prompt into the chat template, and write the reply.
        infill: Text that stands for a token to be written wherever it is in a prompt.
        lossless: Write what autoregressive decoding would write, and denoise only to draft it: the
            setting `verify_with`, by whichever verifier the checkpoint holds. One that holds none
            drafts for the base it was made of, as two models.
        base: Who verifies then, in place of that base: a folder, a Hub id, a GGUF file, or a loaded
            model of transformers.
        seed: Seed for temperatures above 0.
        watch: Show the text on stderr while it is denoised.
        stream: The same below what is on the terminal, without the prompt.
        record: A .gif or .html file to write how the first text was denoised to.
        threads: Threads of llama.cpp, where it runs the model.
        reporter: Progress; by default silent.
        **decoding: Settings of decoding as `generate` takes them: `confidence_threshold`,
            `max_denoising_steps`, `temperature`, `top_p`, `stop_strings`, ...; or some of them in a
            `generation_config`.

    Returns:
        A sample, whose `text` is what was written; of several prompts, or with
        `num_return_sequences`, a list.

    Raises:
        DataError: There is no such checkpoint, or a prompt is empty.
        IncompatibleError: It is no diffusion checkpoint, or has no chat template.
        RequestError: Settings contradict each other or the checkpoint.
    """
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.sampling import DEFAULT_PROMPT
    from dllm_convert.sampling.pairing import settle
    from dllm_convert.sampling.run import Display, run_sample

    if prompt is None or isinstance(prompt, str):
        prompts = [DEFAULT_PROMPT if prompt is None else prompt]
    else:
        prompts = list(prompt)
    if not prompts:
        raise RequestError("there is no prompt", hint="Give a text, or a list with some")
    given = dict(decoding)
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    how: dict[str, Any] = {"chat": chat, "mark": infill, "seed": seed}
    # What is watched is drawn by a reporter that draws.
    teller = reporter or Reporter(quiet=not (watch or stream))
    shown = Display(watch or stream, _film(record), screen=watch)
    with quiet_libraries():
        if is_gguf(checkpoint):
            checkpoint = _load_gguf(Path(checkpoint), threads, teller)
        elif threads is not None:
            raise RequestError(_THREADS, argument="threads")
        if isinstance(checkpoint, str | Path):
            folder = checkpoint_folder(checkpoint, teller)
            settled = settle(folder, given, lossless=lossless, base=base)
            how |= settled.given
            samples = run_sample(folder, prompts, teller, shown, verifier=settled.other, **how)
        else:
            try:
                model, tokenizer = checkpoint
            except (TypeError, ValueError) as error:
                raise RequestError(
                    f"sample takes a folder or a pair (model, tokenizer), not "
                    f"{type(checkpoint).__name__}"
                ) from error
            from dllm_convert.sampling.run import sample_with

            settled = settle(model, given, lossless=lossless, base=base)
            how |= {**settled.given, "verifier": settled.load(model, tokenizer, teller)}
            samples = sample_with(model, tokenizer, prompts, teller, shown, **how)
    one = prompt is None or isinstance(prompt, str)
    return samples[0] if one and len(samples) == 1 else list(samples)


def opened(
    checkpoint: str | Path | tuple[Any, Any],
    reporter: Reporter | None = None,
    threads: int | None = None,
) -> tuple[Any, Any, Mapping[str, Any]]:
    """Load what can be talked with: model, tokenizer, and its manifest, empty where it has none.

    Args:
        checkpoint: As in `sample`.
        reporter: Progress; by default silent.
        threads: Threads of llama.cpp, where it runs the model.

    Raises:
        DllmConvertError: It cannot be loaded.
    """
    from dllm_convert.common.manifest import MANIFEST_FILE, read_manifest
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.modeling.loading import load_checkpoint

    teller = reporter or Reporter(quiet=True)
    if isinstance(checkpoint, tuple):
        return (*checkpoint, {})
    with quiet_libraries():
        if is_gguf(checkpoint):
            return (*_load_gguf(Path(checkpoint), threads, teller), {})
        if threads is not None:
            raise RequestError(_THREADS, argument="threads")
        folder = checkpoint_folder(checkpoint, teller)
        with teller.task("load"):
            loaded = load_checkpoint(folder)
    known = (folder / MANIFEST_FILE).is_file()
    return loaded.model, loaded.tokenizer, read_manifest(folder) if known else {}


def reply(
    checkpoint: str | Path | tuple[Any, Any],
    chat: Chat,
    *,
    base: Any = None,
    reporter: Reporter | None = None,
) -> Chat:
    """Write the answer to what was asked last in a conversation.

    Args:
        checkpoint: As in `sample`; a pair as `load` returns it is not loaded again for each answer.
        chat: The conversation, as `Chat().ask("...")` makes one. A setting `verify_with` of
            "base" is the base wherever it lies, as in `sample`.
        base: Who verifies then, in place of the base that was converted.
        reporter: Progress; by default silent.

    Returns:
        The conversation with the answer: `chat.turns[-1].content`.

    Raises:
        DataError: The template refuses the conversation, or it is longer than the model's context.
        IncompatibleError: It is no diffusion checkpoint, or has no chat template.
        RequestError: Nothing was asked, or settings contradict each other or the checkpoint.
    """
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.sampling.pairing import settle
    from dllm_convert.sampling.replies import reply as answered

    teller = reporter or Reporter(quiet=True)
    model, tokenizer, _ = opened(checkpoint, reporter)
    with quiet_libraries():
        settled = settle(model, chat.settings, base=base, folder=home_of(checkpoint))
        verifier = settled.load(model, tokenizer, teller)
        return answered(model, tokenizer, chat, teller, verifier=verifier)


def home_of(checkpoint: str | Path | tuple[Any, Any]) -> Path | None:
    """Return the folder of a checkpoint that is named and was fetched; of others None."""
    if isinstance(checkpoint, tuple) or is_gguf(checkpoint):
        return None
    return checkpoint_folder(checkpoint, Reporter(quiet=True))


def is_gguf(checkpoint: object) -> TypeGuard[str | Path]:
    """Whether what is named is a GGUF file, by its ending as everybody names them."""
    if not isinstance(checkpoint, str | Path):
        return False
    return Path(checkpoint).suffix.lower() == ".gguf" and not Path(checkpoint).is_dir()


def _load_gguf(path: Path, threads: int | None, reporter: Reporter) -> tuple[Any, Any]:
    from dllm_convert.serving.gguf_model import load_gguf

    with reporter.task("load"):
        loaded = load_gguf(path, threads)
    return loaded.model, loaded.tokenizer


def _film(record: str | Path | None) -> Path | None:
    path = None if record is None else Path(record)
    if path is not None and path.suffix.lower() not in (".gif", ".html"):
        raise RequestError(f"{path} does not end in .gif or .html", argument="record")
    return path
