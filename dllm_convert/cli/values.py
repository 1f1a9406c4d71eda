"""Options that go together, as values; what cannot go together is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import typer

from dllm_convert.errors import DataError

if TYPE_CHECKING:
    from dllm_convert.common.console import Reporter
    from dllm_convert.publishing import PushOptions
    from dllm_convert.recipe.schema import Recipe


@overload
def push_options(repo_id: str, **given: Any) -> PushOptions: ...
@overload
def push_options(repo_id: None, **given: Any) -> None: ...
@overload
def push_options(repo_id: str | None, **given: Any) -> PushOptions | None: ...


def push_options(repo_id: str | None, **given: Any) -> PushOptions | None:
    """Return where and how to publish, None if nothing is to be published.

    Args:
        repo_id: Repository, None for none.
        **given: Fields of `PushOptions`; `max_shard_size` as text.

    Raises:
        typer.BadParameter: Options that mean nothing, or not together.
    """
    if repo_id is None:
        _refuse_alone(given)
        return None
    from dllm_convert.publishing import PushOptions
    from dllm_convert.publishing.reshard import parse_size

    if given.get("create_pr") and given.get("revision"):
        raise typer.BadParameter("give --create-pr or --revision, a pull request has its own")
    size = given.pop("max_shard_size", None)
    try:
        return PushOptions(repo_id, max_shard_size=parse_size(size) if size else None, **given)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-shard-size") from error


def _refuse_alone(given: dict[str, Any]) -> None:
    for field, value in given.items():
        if value not in (None, False):
            flag = "public/--private" if field == "public" else field.replace("_", "-")
            more = "; the source's is --source-revision" if field == "revision" else ""
            raise typer.BadParameter(f"--{flag} needs --push-to-hub REPO_ID{more}")
    if given.get("public") is False:
        raise typer.BadParameter("--public/--private needs --push-to-hub REPO_ID")


def method(lora: int | None, *, full: bool, no_train: bool) -> str | None:
    """Return the training method the flags name, None if they name none.

    Raises:
        typer.BadParameter: They name several.
    """
    chosen = [
        name
        for name, given in (("lora", lora is not None), ("full", full), ("none", no_train))
        if given
    ]
    if len(chosen) > 1:
        raise typer.BadParameter("give one of --lora, --full and --no-train")
    return chosen[0] if chosen else None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the fields of `--set KEY=VALUE` options.

    Raises:
        typer.BadParameter: One is not of that form, or two contradict each other.
    """
    from dllm_convert.recipe.yaml_text import parse_value

    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(
                f"{assignment!r} is not KEY=VALUE, as in training.learning_rate=2e-5",
                param_hint="--set",
            )
        value = parse_value(text, f"--set {assignment}")
        if key.strip() in values and values[key.strip()] != value:
            raise typer.BadParameter(
                f"{key.strip()} is given twice, and not alike", param_hint="--set"
            )
        values[key.strip()] = value
    return values


def output_file(path: Path | None, formats: tuple[str, ...], option: str) -> Path | None:
    """Check where a page or picture is to be written, and that nothing of a model is lost.

    Args:
        path: What was typed; None for nothing.
        formats: Endings it may have.
        option: The option's name, for the message.

    Raises:
        typer.BadParameter: Nothing can or may be written there.
    """
    if path is None:
        return None
    if path.suffix.lower() not in formats:
        why = f"does not end in {' or '.join(formats)}"
    elif path.is_dir() or not path.absolute().parent.is_dir():
        why = "cannot be a file: there is no such folder"
    elif path.exists() and not path.is_file():
        why = "is no ordinary file"
    elif path.exists() and (path.resolve().parent / "config.json").exists():
        why = "is a file of a checkpoint, and would be replaced; give another name"
    else:
        return path
    raise typer.BadParameter(f"{path} {why}.", param_hint=option)


def default_out(recipe: Recipe) -> Path:
    """Return the output folder where none was given.

    Going on from a conversion counts its names instead of piling them up: x-bd3lm, x-bd3lm-2.
    """
    name = recipe.name or Path(recipe.source).resolve().name.removesuffix(".gguf")
    going_on = re.fullmatch(r"(.+)-(mdlm|bd3lm)(?:-(\d{1,6}))?", name)
    if recipe.name is None and going_on:
        base, target, number = going_on.groups()
        again = f"-{int(number or 1) + 1}" if target == recipe.target else ""
        return Path(f"{base}-{recipe.target}{again}")
    return Path(f"{name}-{recipe.target}")


def refuse_in_source(out: Path, source: str) -> None:
    """Refuse an output folder in the source, or around it.

    Raises:
        typer.BadParameter: It is.
    """
    from dllm_convert.pipeline.workspace import check_apart

    try:
        check_apart(out, Path(source).expanduser())
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


def plan_document(
    recipe: Recipe,
    folder: Path,
    push: PushOptions | None,
    processes: int,
    *,
    probe: bool = False,
) -> dict[str, Any]:
    """Return what a dry run shows: the plan, on how many processes, where it would be published.

    With `probe` the family is measured, whether it has an adapter or not.

    Raises:
        DllmConvertError: The conversion cannot work, or may not be published as asked.
    """
    from dllm_convert.pipeline.run import plan_conversion
    from dllm_convert.planning.conversion import plan_as_dict, source_facts
    from dllm_convert.planning.devices import this_cpu
    from dllm_convert.planning.estimate import estimate

    measured: dict[str, Any] = {}
    if probe:
        recipe, measured = _probed(recipe)
    plan = plan_conversion(recipe)
    document = {
        "out": str(folder),
        **plan_as_dict(plan),
        "estimate": estimate(plan, this_cpu()),
        **measured,
    }
    if recipe.training.method != "none" and processes > 1:
        sequences = recipe.training.sequences_per_step * processes
        document["launch"] = {"processes": processes, "sequences_per_step": sequences}
    if push is None:
        return document
    from dllm_convert.publishing.run import licence_warnings

    publication = {
        "repository": push.repo_id,
        "visibility": "public" if push.public else "private, if it is new",
        "revision": "a pull request" if push.create_pr else push.revision or "main",
        "warnings": list(licence_warnings({"source": source_facts(plan)}, push)),
    }
    return document | {"publication": publication}


def _probed(recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """Measure a recipe's source; return the recipe that allows it, and what was measured."""
    from dllm_convert.adapters import has_adapter
    from dllm_convert.pipeline.family import probe_source
    from dllm_convert.source.inspect import inspect_source

    source = inspect_source(recipe.source, revision=recipe.revision)
    report = probe_source(source)
    if not has_adapter(source.model_type):
        report.require()
    found = {key: value for key, value in report.as_dict().items() if key != "adapter"}
    return recipe.model_copy(update={"allow_generic": True}), {"probe": found}


def base_folder(source: str, reporter: Reporter, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a base's weights, fetched if need be."""
    from dllm_convert.planning.checks import check_pickle
    from dllm_convert.recipe.loading import load_recipe
    from dllm_convert.source.inspect import inspect_source
    from dllm_convert.source.materialise import materialise

    recipe = load_recipe(source, overrides={})
    info = inspect_source(recipe.source, revision=recipe.revision)
    check_pickle(info, allowed=allow_pickle or recipe.allow_pickle)
    return materialise(info, reporter).folder
