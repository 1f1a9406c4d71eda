"""The front door: what the commands do, as functions; `import dllm_convert` offers them.

Each imports what it needs when it is called: a plan takes no torch. What takes long (`convert`,
`evaluate`, `push`) tells its progress on stderr as the commands do, everything else is silent; a
`Reporter` of one's own decides otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from dllm_convert.common.console import Reporter
from dllm_convert.common.ranks import Place
from dllm_convert.common.tables import Printed
from dllm_convert.errors import IncompatibleError, RequestError
from dllm_convert.pipeline.asked import ConversionRequest
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.recipe.typed import default_out

if TYPE_CHECKING:
    import torch

    from dllm_convert.evaluation.shown import Evaluation
    from dllm_convert.publishing import PushOptions, PushResult
    from dllm_convert.sampling.run import Sample
    from dllm_convert.verification.report import VerificationReport


@dataclass(frozen=True)
class Conversion(Printed):
    """A finished conversion.

    Attributes:
        path: Folder of the checkpoint.
        manifest: Content of its dllm_convert.json.
        report: Its verification, which may have failed: look at `report.passed`.
        pushed: What was published, None if nothing was asked for or verification failed.
    """

    path: Path
    manifest: Mapping[str, Any]
    report: VerificationReport
    pushed: PushResult | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `run --json` prints."""
        from dllm_convert.pipeline.shown import run_document

        published = self.pushed.as_dict() if self.pushed else None
        passed = self.manifest["verification"]["passed"]
        return run_document(str(self.path), passed, self.manifest, published)

    def as_text(self) -> str:
        """Return the verification, what was measured, and a sample."""
        from dllm_convert.pipeline.shown import run_text

        return run_text(self.as_dict())


def load_recipe(source: str | Path | Recipe, **asked: Unpack[ConversionRequest]) -> Recipe:
    """Resolve a recipe, the presets it inherits and what is asked into one value.

    Args:
        source: Recipe name or .yaml file, Hub id, folder or .gguf file, tried in that order.
        **asked: What wins over it, see `plan`.

    Raises:
        RequestError: What is asked contradicts itself, or would change nothing.
        IncompatibleError: There is no such recipe, or a field or value of it is wrong.
        HubError: A source on the Hub cannot be asked whether it is a conversion.
    """
    from dllm_convert.pipeline.asked import resolve

    return resolve(source, **asked)


def plan(
    source: str | Path | Recipe | ConversionPlan, **asked: Unpack[ConversionRequest]
) -> ConversionPlan:
    """Decide everything a conversion will do; reads headers only. Printed, it is what `check` says.

    Args:
        source: Recipe name or .yaml file, Hub id, folder or .gguf file, tried in that order; or a
            recipe or an earlier plan, of which what is asked is changed.
        **asked: `to` and `block` (what to convert to), `data`, `steps`, `tokens`, `max_time`,
            `global_batch`, `preset`, `lora`, `full`, `train`, `keep_adapter`, `revision`,
            `allow_pickle`, `allow_generic`, `report_to`, and `overrides` for every other field of
            a recipe by its dotted name; see `dllm_convert.pipeline.asked.ConversionRequest`.

    Raises:
        DllmConvertError: The source cannot be read, or cannot be converted as asked.
    """
    from dllm_convert.pipeline.run import plan_conversion

    return plan_conversion(_recipe_of(source, asked))


def _recipe_of(source: str | Path | Recipe | ConversionPlan, asked: ConversionRequest) -> Recipe:
    return load_recipe(source.recipe if isinstance(source, ConversionPlan) else source, **asked)


def convert(
    source: str | Path | Recipe | ConversionPlan,
    out: str | Path | None = None,
    *,
    push: str | PushOptions | None = None,
    link: bool = False,
    verify: str = "auto",
    extend: bool = False,
    reporter: Reporter | None = None,
    **asked: Unpack[ConversionRequest],
) -> Conversion:
    """Convert, train, verify and document a checkpoint; the same call goes on where it stopped.

    Args:
        source: As in `plan`.
        out: Folder in which the checkpoint appears when it is whole; None is ./NAME-TARGET.
        push: Repository, or `PushOptions`, to publish a checkpoint at that passed verification.
        link: Hard-link weight files that do not change, instead of copying them.
        verify: `full` runs the model, `files` reads files only, `auto` is full after training and
            for models up to 1 GiB in float32.
        extend: Train the finished checkpoint in `out` on.
        reporter: Progress; None tells it on stderr.
        **asked: As in `plan`.

    Raises:
        DllmConvertError: A stage failed; what is finished is kept for the next call.
    """
    recipe = _recipe_of(source, asked)
    if verify not in list(Depth):
        raise RequestError(f"verify is {verify!r}, expected one of {', '.join(Depth)}")
    if extend and recipe.training.method == "none":
        raise RequestError("`extend` trains on; leave out `train=False`")
    if Place.from_environment().world > 1:
        raise IncompatibleError(
            "this is one of several processes, and convert() works in one",
            hint="Use `dllm-convert run --num-processes N`, or torchrun -m dllm_convert run",
        )
    options = push_options(push) if isinstance(push, str) else push
    how = RunOptions(link=link, verify=Depth(verify), extend=extend)
    folder = default_out(recipe) if out is None else Path(out)
    return convert_recipe(recipe, folder, reporter or Reporter(), push=options, how=how)


def convert_recipe(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    push: PushOptions | None = None,
    place: Place | None = None,
    how: RunOptions | None = None,
) -> Conversion:
    """Convert as a resolved recipe says, in the first of perhaps several processes."""
    from dllm_convert.pipeline import run as pipeline
    from dllm_convert.verification.report import VerificationReport

    done = pipeline.run(
        recipe, out, reporter, push=push, place=place or Place(), how=how or RunOptions()
    )
    report = VerificationReport.from_dict(done.manifest["verification"])
    return Conversion(done.path, done.manifest, report, done.pushed)


def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[Any, Any]:
    """Load a converted checkpoint: its diffusion class, in evaluation mode, and its tokenizer.

    Args:
        folder: The checkpoint.
        device: Where the model goes; None is the GPU if there is one.
        dtype: Type the weights are held in, as torch has it or by name; None is bfloat16 on a GPU
            and float32 elsewhere.

    Raises:
        DataError: There is no such checkpoint, or it is not whole.
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
        loaded = load_checkpoint(
            Path(folder),
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
    seed: int | None = None,
    watch: bool = False,
    record: str | Path | None = None,
    reporter: Reporter | None = None,
    **decoding: Any,
) -> Sample | list[Sample]:
    """Write text with a converted checkpoint.

    Args:
        checkpoint: Its folder, or a pair (model, tokenizer) as `load` returns it.
        prompt: Text to go on from, or several, which are written in one batch.
        max_new_tokens: Tokens to write; None is the checkpoint's default.
        chat: Put each prompt into the chat template, and write the reply.
        infill: Text that stands for a token to be written wherever it is in a prompt.
        seed: Seed for temperatures above 0.
        watch: Show the text on stderr while it is denoised.
        record: A .gif or .html file to write how the first text was denoised to.
        reporter: Progress; by default silent.
        **decoding: Settings of decoding as `generate` takes them: `confidence_threshold`,
            `max_denoising_steps`, `temperature`, `top_p`, ...

    Returns:
        A sample, whose `text` is what was written; of several prompts a list.

    Raises:
        DataError: There is no such checkpoint, or a prompt is empty.
        IncompatibleError: It is no diffusion checkpoint, or has no chat template.
        RequestError: Settings contradict each other or the checkpoint.
    """
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.sampling import DEFAULT_PROMPT
    from dllm_convert.sampling.run import Display, run_sample

    if prompt is None or isinstance(prompt, str):
        prompts = [DEFAULT_PROMPT if prompt is None else prompt]
    else:
        prompts = list(prompt)
    if not prompts:
        raise RequestError("there is no prompt", hint="Give a text, or a list with some")
    given = {name: value for name, value in decoding.items() if value is not None}
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    how = {**given, "chat": chat, "mark": infill, "seed": seed}
    # What is watched is drawn by a reporter that draws.
    teller = reporter or Reporter(quiet=not watch)
    shown = Display(watch, _film(record))
    with quiet_libraries():
        if isinstance(checkpoint, str | Path):
            _check_decoding(Path(checkpoint), given)
            samples = run_sample(Path(checkpoint), prompts, teller, shown, **how)
        else:
            from dllm_convert.sampling.run import sample_with

            try:
                model, tokenizer = checkpoint
            except (TypeError, ValueError) as error:
                raise RequestError(
                    f"sample takes a folder or a pair (model, tokenizer), not "
                    f"{type(checkpoint).__name__}"
                ) from error
            try:
                samples = sample_with(model, tokenizer, prompts, teller, shown, **how)
            except (TypeError, ValueError) as error:
                if not given:
                    raise
                raise RequestError(str(error)) from error
    return samples[0] if prompt is None or isinstance(prompt, str) else list(samples)


def _film(record: str | Path | None) -> Path | None:
    path = None if record is None else Path(record)
    if path is not None and path.suffix.lower() not in (".gif", ".html"):
        raise RequestError(f"{path} does not end in .gif or .html", argument="record")
    return path


def _check_decoding(folder: Path, given: Mapping[str, Any], argument: str | None = None) -> None:
    from dllm_convert.sampling.checking import check_decoding

    try:
        check_decoding(folder, given)
    except (TypeError, ValueError) as error:
        raise RequestError(str(error), argument=argument) from error


def verify(
    checkpoint: str | Path,
    *,
    against: str | Path | None = None,
    files: bool = False,
    page: str | Path | None = None,
    revision: str | None = None,
    block: int | None = None,
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
        trust_remote_code: Run modelling code of the checkpoint that this version did not write.
        allow_pickle: Read pickled weights of the base.
        reporter: Progress; by default silent.

    Raises:
        DataError: There is no such folder, or no config in it.
        IncompatibleError: It is not a diffusion checkpoint, or one that contradicts itself.
        RequestError: A page is asked for of what is not measured.
    """
    teller = reporter or Reporter(quiet=True)
    if page is not None and files:
        raise RequestError("`page` shows what the model does; leave `files` out")
    if files:
        from dllm_convert.verification.bytes import verify_folder

        base = _base(against, teller, allow_pickle=allow_pickle)
        return verify_folder(Path(checkpoint), base, teller)
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.verification import verify_checkpoint

    with quiet_libraries():
        base = _base(against, teller, allow_pickle=allow_pickle)
        report = verify_checkpoint(
            checkpoint,
            revision=revision,
            against=base,
            trust_remote_code=trust_remote_code,
            block_size=block,
            reporter=teller,
        )
        if page is not None:
            from dllm_convert.pipeline.page import write_page
            from dllm_convert.verification.opening import VerificationRequest, local_checkpoint

            folder = local_checkpoint(checkpoint, revision, teller)
            asked = VerificationRequest(base, trust_remote_code=trust_remote_code, block_size=block)
            report = write_page(Path(page), folder, asked, report, teller)
    return report


def _base(source: str | Path | None, reporter: Reporter, *, allow_pickle: bool) -> Path | None:
    """Return the folder of a base's weights, fetched if need be."""
    if source is None:
        return None
    from dllm_convert.planning.checks import check_pickle
    from dllm_convert.recipe.loading import load_recipe as load_layers
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
    published: str | None = None,
    chat: bool = False,
    include: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    unsafe_code: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Evaluate a converted checkpoint, and its base on the same items; recorded in its manifest.

    Args:
        checkpoint: The folder.
        tasks: Names of lm-eval's tasks.
        data: Text whose held-out documents are measured: `pydoc`, files or a Hub dataset.
        against: The base, evaluated on the same items.
        limit: Most items per task.
        shots: Examples before each question.
        batch_size: Changes speed, and no score.
        thresholds: Confidence thresholds to write with, each: accuracy against parallelism.
        published: Name of settings that a paper reports with.
        chat: Ask through the chat template.
        include: Folders with more tasks.
        settings: draws, rounds, confidence, masking, seed, or settings of decoding.
        unsafe_code: Let tasks run the code that the model wrote.
        reporter: Progress; None tells it on stderr.

    Raises:
        DllmConvertError: There is nothing to evaluate, or lm-eval is not installed.
        RequestError: Settings contradict each other or the checkpoint.
    """
    from dllm_convert.common.quiet import quiet_libraries
    from dllm_convert.evaluation.record import evaluate_checkpoint
    from dllm_convert.evaluation.request import Request
    from dllm_convert.evaluation.settings import find_published, find_settings, merge
    from dllm_convert.evaluation.shown import Evaluation

    if isinstance(tasks, str):
        tasks = [tasks]
    merged = merge(find_settings(published), settings or {})
    _check_decoding(Path(checkpoint), merged.generation, "settings")
    request = Request(
        checkpoint=Path(checkpoint),
        tasks=tuple(tasks),
        base=None if against is None else str(against),
        include=tuple(map(str, include)),
        limit=limit,
        batch_size=batch_size,
        thresholds=tuple(thresholds),
        chat=chat or (published is not None and find_published(published).chat),
        shots=shots,
        unsafe_code=unsafe_code,
        published=published,
        data=None if data is None else str(data),
        settings=merged,
    )
    with quiet_libraries():
        return Evaluation(evaluate_checkpoint(request, reporter or Reporter()))


def push_options(
    repo_id: str, *, max_shard_size: int | str | None = None, **given: Any
) -> PushOptions:
    """Return where and how to publish.

    Args:
        repo_id: Repository.
        max_shard_size: Bytes per weight file, or text as `"5GB"`.
        **given: Other fields of `PushOptions`.

    Raises:
        RequestError: They contradict each other.
    """
    from dllm_convert.publishing import PushOptions
    from dllm_convert.publishing.reshard import parse_size

    if given.get("create_pr") and given.get("revision"):
        raise RequestError("give `create_pr` or `revision`, a pull request has its own")
    try:
        size = parse_size(str(max_shard_size)) if max_shard_size else None
    except ValueError as error:
        raise RequestError(str(error), argument="max_shard_size") from error
    return PushOptions(repo_id, max_shard_size=size, **given)


def push(
    checkpoint: str | Path,
    repo_id: str | PushOptions,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> PushResult:
    """Publish a converted checkpoint on the Hub, and check what arrived there.

    Args:
        checkpoint: The folder.
        repo_id: `namespace/name`, or a name in your own.
        reporter: Progress; None tells it on stderr.
        **options: `public`, `revision`, `create_pr`, `commit_message`, `max_shard_size`,
            `overwrite_card`, `adapter_only`, `force_unverified`; see `PushOptions`.

    Raises:
        VerificationError: It was not verified, or failed; or what was published does not work.
        IncompatibleError: The base's licence does not allow it as asked.
        HubError: The Hub refuses it or cannot be reached.
    """
    from dllm_convert.publishing import push_checkpoint

    asked = push_options(repo_id, **options) if isinstance(repo_id, str) else repo_id
    return push_checkpoint(Path(checkpoint), asked, reporter or Reporter())
