"""Decode text with a converted checkpoint: what `dllm-convert sample` and the card show."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common.console import Reporter
from dllm_convert.common.tables import Block, Printed
from dllm_convert.errors import DataError, RequestError
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.modeling.published.limits import ContextError, ContextWarning, context_of
from dllm_convert.modeling.published.lossless import VerifierError
from dllm_convert.modeling.published.options import Observer
from dllm_convert.modeling.text_bounds import end_ids
from dllm_convert.sampling.checking import check_with_prompts
from dllm_convert.sampling.packing import packed_linears
from dllm_convert.sampling.pairing import load_verifier
from dllm_convert.sampling.prompts import encode_prompt, encode_prompts
from dllm_convert.sampling.watch.frames import Recorder
from dllm_convert.sampling.watch.pieces import TokenText
from dllm_convert.sampling.watch.record import write_recording
from dllm_convert.sampling.watch.terminal import Watcher
from dllm_convert.source.info import SourceInfo


@dataclass(frozen=True)
class Sample(Printed):
    """One decoded text.

    Attributes:
        prompt: Text given, with its masks written if it has any.
        text: Text written, special tokens left out.
        new_tokens: Tokens written, up to and including the end of the text.
        forwards: Forward passes run.
        tokens_per_forward: New tokens divided by forwards.
        seconds: Wall time of decoding, loading not included.
        verifier_forwards: Of two models: how many of the forwards were the verifier's; else None.
        close: Of lossless decoding: tokens of the batch that stood so near another one's logit that
            a forward of a single token may have rounded otherwise; else None.
    """

    prompt: str
    text: str
    new_tokens: int
    forwards: int
    tokens_per_forward: float
    seconds: float
    close: int | None = None
    verifier_forwards: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a mapping."""
        return asdict(self)

    def as_blocks(self) -> list[Block]:
        """Return the prompt and what was written."""
        return [self.prompt + self.text]


def decode_samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    mark: str | None = None,
    seed: int | None = None,
    observer: Observer | None = None,
    verifier: Any = None,
    **options: Any,
) -> tuple[Sample, ...]:
    """Decode prompts with a loaded model, all in one batch.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompts: Texts to go on from.
        chat: Put each prompt into the chat template.
        mark: Text in the prompts that stands for a token to be written.
        seed: Seed for temperatures above 0; prompt n draws from `seed + n`.
        observer: Called after the prompts and after every denoising forward.
        verifier: Model of transformers whose text is written, and for which the model drafts; None
            for none beside it.
        **options: Fields of `DecodingOptions`; None keeps the checkpoint's default.

    Raises:
        DataError: A prompt is empty, has no mark where one was named, begins with a mask that
            nothing stands before, or is longer than the positions the model has.
        IncompatibleError: The tokenizer has no chat template, or the model knows no mask.
        RequestError: Options contradict each other, the model or the prompts.
    """
    encoded = encode_prompts(model, tokenizer, prompts, chat=chat, mark=mark)
    return decode_encoded(
        model,
        tokenizer,
        prompts,
        encoded,
        seed=seed,
        observer=observer,
        verifier=verifier,
        **options,
    )


def decode_encoded(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    *,
    seed: int | None = None,
    observer: Observer | None = None,
    streamer: Any | None = None,
    verifier: Any = None,
    **options: Any,
) -> tuple[Sample, ...]:
    """Decode prompts that are tokens already; arguments and errors are those of `decode_samples`.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompts: What the samples say was given.
        encoded: The tokens of each.
        seed: Seed for temperatures above 0.
        observer: Called after the prompts and after every denoising forward.
        streamer: Gets tokens as soon as nothing changes them, where there is one prompt.
        verifier: As in `decode_samples`.
        **options: Fields of `DecodingOptions`.
    """
    width = max(len(ids) for ids in encoded)
    rows = [ids + [0] * (width - len(ids)) for ids in encoded]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded]
    given = dict(options)
    # Another model verifies in the place of one that is saved.
    alone = given if verifier is None else {**given, "verify_with": None}
    check_with_prompts(model, encoded, seed, alone)
    if verifier is not None:
        given["verify_with"] = verifier
    started = time.monotonic()
    try:
        with packed_linears(model), nullcontext() if verifier is None else packed_linears(verifier):
            output = model.generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                seed=seed,
                observer=observer,
                streamer=streamer,
                return_dict_in_generate=True,
                tokenizer=tokenizer,
                **given,
            )
    except VerifierError as error:
        raise RequestError(str(error)) from error
    except ContextError as error:
        what, _, advice = str(error).partition(": ")
        raise DataError(what, hint=advice.capitalize()) from error
    seconds = round(time.monotonic() - started, 3)
    samples = []
    counts = output.new_tokens.tolist()
    copies = len(counts) // len(prompts)  # `num_return_sequences`
    given_texts = [pair for pair in zip(prompts, encoded, strict=True) for _ in range(copies)]
    for (prompt, ids), sequence, count in zip(
        given_texts, output.sequences.tolist(), counts, strict=True
    ):
        if model.config.mask_token_id in ids:
            prompt = tokenizer.decode(sequence[: len(ids)], skip_special_tokens=True)
        new = sequence[width : width + count]
        text = tokenizer.decode(new, skip_special_tokens=True)
        samples.append(
            Sample(
                prompt=prompt,
                text=text,
                new_tokens=len(new),
                forwards=output.forwards,
                tokens_per_forward=round(len(new) / max(output.forwards, 1), 3),
                seconds=seconds,
                close=output.close,
                verifier_forwards=output.verifier_forwards,
            )
        )
    return tuple(samples)


@contextmanager
def telling(reporter: Reporter) -> Iterator[None]:
    """Have the reporter say, once the block ends, that texts were longer than the context."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ContextWarning)
        yield
    said = {str(w.message): w for w in caught}
    for text, warning in said.items():
        if issubclass(warning.category, ContextWarning):
            reporter.warn(text)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def fit(
    model: Any, tokenizer: Any, prompt: str, new: int, *, chat: bool = False
) -> tuple[str, int]:
    """Return as much of a prompt, and of a number of new tokens, as a small context has room for.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompt: Text to go on from; of which words may be left out from its end.
        new: Tokens wanted.
        chat: Whether it is put into the chat template.
    """
    context = context_of(model)
    block = getattr(model.config, "block_size", None) or 1
    while context is not None:
        room = context // block * block - len(encode_prompt(tokenizer, prompt, chat=chat))
        if room >= 1 or " " not in prompt:
            return prompt, max(min(new, room), 1)
        prompt = prompt.rpartition(" ")[0]
    return prompt, new


def decode_sample(
    model: Any, tokenizer: Any, prompt: str, *, seed: int | None = None, **options: Any
) -> Sample:
    """Decode one prompt with a loaded model.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompt: Text to go on from.
        seed: Seed for temperatures above 0.
        **options: More arguments of `decode_samples`.
    """
    return decode_samples(model, tokenizer, [prompt], seed=seed, **options)[0]


def recorder_of(model: Any) -> Recorder:
    """Return an observer that records what a model writes."""
    block = getattr(model.config, "block_size", None)
    return Recorder(model.config.mask_token_id, end_ids(model), block)


@dataclass(frozen=True)
class Display:
    """What is shown and kept of a decoding, besides its text.

    Attributes:
        watch: Show the text while it is denoised.
        record: File to write a film to; the first prompt's.
        screen: Have what is watched take the whole terminal and give it back; otherwise it is drawn
            below what is there, without the prompt.
    """

    watch: bool = False
    record: Path | None = None
    screen: bool = True


def run_sample(
    folder: Path,
    prompts: Sequence[str],
    reporter: Reporter,
    shown: Display = Display(),
    *,
    verifier: Any = None,
    **options: Any,
) -> tuple[Sample, ...]:
    """Load a converted checkpoint and decode prompts.

    Args:
        folder: Converted checkpoint.
        prompts: Texts to go on from.
        reporter: Progress.
        shown: What is shown and kept besides.
        verifier: Model whose text is written, from its headers or loaded; None for none beside it.
        **options: More arguments of `decode_samples`.

    Raises:
        DataError: There is no such checkpoint, or a prompt is empty.
        IncompatibleError: It is no diffusion checkpoint, or has no chat template.
    """
    with reporter.task("load"):
        loaded = load_checkpoint(folder)
    title = folder.resolve().name
    model, tokenizer = loaded.model, loaded.tokenizer
    if isinstance(verifier, SourceInfo):
        verifier = load_verifier(model, tokenizer, verifier, reporter, folder)
    options["verifier"] = verifier
    return sample_with(model, tokenizer, prompts, reporter, shown, title=title, **options)


def sample_with(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reporter: Reporter,
    shown: Display = Display(),
    *,
    title: str = "",
    **options: Any,
) -> tuple[Sample, ...]:
    """Decode prompts with a loaded model, and show or keep how.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompts: Texts to go on from.
        reporter: Progress.
        shown: What is shown and kept besides.
        title: Heading of a recorded page.
        **options: More arguments of `decode_samples`.

    Raises:
        DataError: A prompt is empty.
        IncompatibleError: The tokenizer has no chat template.
    """
    recorder = recorder_of(model)
    text = TokenText(tokenizer, end_ids(model))
    observer: Observer | None = recorder if shown.record else None
    with ExitStack() as stack:
        if shown.watch:
            observer = stack.enter_context(Watcher(recorder, text, reporter, screen=shown.screen))
        else:
            stack.enter_context(reporter.task("decode"))
        stack.enter_context(telling(reporter))
        samples = decode_samples(model, tokenizer, prompts, observer=observer, **options)
    if shown.record:
        with reporter.task(f"write {shown.record}"):
            record(recorder, tokenizer, shown.record, title=title)
    return samples


def record(recorder: Recorder, tokenizer: Any, path: Path, *, title: str = "") -> None:
    """Write how the first prompt's text was denoised.

    Args:
        recorder: The observer that followed.
        tokenizer: The tokenizer.
        path: A .gif or .html file.
        title: Heading of a page.
    """
    text = TokenText(tokenizer, recorder.end_ids)
    write_recording(path, recorder.film(), text, title=title)
