"""Is a checkpoint what it says it is, and how good is it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.common.console import Reporter
from dllm_convert.errors import RequestError

if TYPE_CHECKING:
    from dllm_convert.evaluation.shown import Evaluation
    from dllm_convert.verification.report import VerificationReport

_TEXT_FIELD = "data.text_field"


def verify(
    checkpoint: str | Path,
    *,
    against: str | Path | None = None,
    files: bool = False,
    page: str | Path | None = None,
    revision: str | None = None,
    block: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    reporter: Reporter | None = None,
) -> VerificationReport:
    """Check a diffusion checkpoint: files, tensors, mask token, attention, decoding.

    Args:
        checkpoint: Folder or Hub id of a diffusion checkpoint, ours or of a known layout.
        against: The base to compare the weights with: folder, Hub id or recipe.
        files: Only what files prove: the model is not loaded, whatever its size.
        page: An .html file to write what was found to, with pictures.
        revision: Branch, tag or commit of a Hub id.
        block: Tokens per block of a third-party checkpoint that does not record them.
        device: Where it will be used, which is looked at besides the CPU; a GPU if there is one.
        dtype: In what, as torch names it; bfloat16 on a GPU, else float32.
        trust_remote_code: Run modelling code of the checkpoint that this version did not write.
        allow_pickle: Read pickled weights of the base.
        reporter: Progress; by default silent.

    Raises:
        DataError: There is no such folder, or no config in it.
        IncompatibleError: It is not a diffusion checkpoint, or one that contradicts itself.
        RequestError: A page or a device is asked for of what is not measured, or the device or the
            type is none.
    """
    teller = reporter or Reporter(quiet=True)
    if page is not None and files:
        raise RequestError("`page` shows what the model does; leave `files` out")
    if files and (device is not None or dtype is not None):
        raise RequestError("a device or a dtype says where the model runs; leave `files` out")
    if files:
        from dllm_convert.verification.bytes import verify_folder

        base = _base(against, teller, allow_pickle=allow_pickle)
        return verify_folder(Path(checkpoint), base, teller)
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.verification import verify_checkpoint
    from dllm_convert.verification.accelerator import asked_for

    with quiet_libraries():
        base = _base(against, teller, allow_pickle=allow_pickle)
        report = verify_checkpoint(
            checkpoint,
            revision=revision,
            against=base,
            trust_remote_code=trust_remote_code,
            block_size=block,
            accelerator=asked_for(device, dtype),
            reporter=teller,
        )
        if page is not None:
            from dllm_convert.pipeline.page import write_page
            from dllm_convert.source.checkpoints import local_checkpoint
            from dllm_convert.verification.opening import VerificationRequest

            folder = local_checkpoint(checkpoint, revision, teller)
            asked = VerificationRequest(base, trust_remote_code=trust_remote_code, block_size=block)
            report = write_page(Path(page), folder, asked, report, teller)
    return report


def _base(source: str | Path | None, reporter: Reporter, *, allow_pickle: bool) -> Path | None:
    """Return the folder of a base's weights, fetched if need be."""
    if source is None:
        return None
    from dllm_convert.recipe.loading import load_recipe as load_layers
    from dllm_convert.source.folder import check_pickle
    from dllm_convert.source.inspect import inspect_source
    from dllm_convert.source.materialise import materialise

    recipe = load_layers(str(source), overrides={})
    info = inspect_source(recipe.source, revision=recipe.revision)
    check_pickle(info, allowed=allow_pickle or recipe.allow_pickle)
    return materialise(info, reporter).folder


def evaluate(
    checkpoint: str | Path,
    *,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    against: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    thresholds: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    published: str | None = None,
    chat: bool = False,
    lossless: bool = False,
    base: str | Path | None = None,
    include: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    unsafe_code: bool = False,
    out: str | Path | None = None,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Evaluate a converted checkpoint, and a base on the same items.

    What is found is recorded in the checkpoint's manifest as it comes; of one of the Hub, or with
    `out`, in `evaluation.json` of a folder of its own.

    Args:
        checkpoint: Its folder or Hub id.
        tasks: Names of lm-eval's tasks.
        data: Text to measure: files or a Hub dataset; of what was trained on, what was held out.
        against: The base, evaluated on the same items; None evaluates the conversion alone.
        limit: Most items per task.
        shots: Examples before each question.
        batch_size: Changes speed, and no score.
        thresholds: Confidence thresholds to write with, each: accuracy against parallelism.
        batch_sizes: Prompts per forward to write with at each threshold: seconds, and no score.
        published: Name of settings that a paper reports with.
        chat: Ask through the chat template.
        lossless: Write what the verifier that the checkpoint holds would write, and denoise only to
            draft it: what is written scores as the verifier's own text does. A checkpoint that
            holds none drafts for the base it was made of, as two models.
        base: Who verifies then, in place of that base: a folder, a Hub id or a GGUF file.
        include: Folders with more tasks.
        settings: draws, rounds, confidence, masking, seed, settings of decoding, or
            `data.text_field`, the column of `data` that holds its text.
        unsafe_code: Let tasks run the code that the model wrote.
        out: Folder for what is found; None is the checkpoint's own, and `owner--name-evaluation` in
            the working directory for one of the Hub.
        revision: Branch, tag or commit of a Hub id.
        reporter: Progress; None tells it on stderr.

    Raises:
        DataError: There is no such checkpoint, or `out` is something else.
        DllmConvertError: There is nothing to evaluate, or lm-eval is not installed.
        HubError: The Hub does not have it, refuses it or cannot be reached.
        RequestError: Settings contradict each other or the checkpoint.
    """
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.evaluation.record import RECORD_FILE, evaluate_checkpoint
    from dllm_convert.evaluation.request import Request
    from dllm_convert.evaluation.settings import find_published, find_settings, merge
    from dllm_convert.evaluation.shown import Evaluation
    from dllm_convert.sampling.pairing import settle
    from dllm_convert.source.checkpoints import checkpoint_folder

    if isinstance(tasks, str):
        tasks = [tasks]
    if batch_sizes and not thresholds:
        raise RequestError("`batch_sizes` sweeps `thresholds`, and none is given")
    given = dict(settings or {})
    text_field = given.pop(_TEXT_FIELD, None)
    if text_field is not None and (data is None or not isinstance(text_field, str)):
        raise RequestError(f"{_TEXT_FIELD}={text_field!r} names a column of the text in `data`")
    merge(find_settings(published), given)  # refused before anything is downloaded
    teller = reporter or Reporter()
    folder = checkpoint_folder(checkpoint, teller, revision)
    fetched = folder != Path(checkpoint)
    if fetched and out is None:
        out = f"{str(checkpoint).replace('/', '--')}-evaluation"
    merged = merge(find_settings(published), given)
    settled = settle(folder, merged.generation, lossless=lossless, base=base, argument="settings")
    merged = replace(merged, generation=settled.given)
    request = Request(
        checkpoint=folder,
        record=None if out is None else Path(out),
        # A snapshot's folder has the name of its commit.
        name=f"{checkpoint}@{folder.name}" if fetched else None,
        tasks=tuple(tasks),
        base=None if against is None else str(against),
        include=tuple(map(str, include)),
        limit=limit,
        batch_size=batch_size,
        thresholds=tuple(thresholds),
        batch_sizes=tuple(batch_sizes),
        chat=chat or (published is not None and find_published(published).chat),
        shots=shots,
        unsafe_code=unsafe_code,
        published=published,
        data=None if data is None else str(data),
        text_field=text_field,
        settings=merged,
        verifier=settled.other,
    )
    with quiet_libraries():
        found = Evaluation(evaluate_checkpoint(request, teller))
    if request.record is not None:
        teller.line(f"recorded in {request.record / RECORD_FILE}")
    return found
