"""Options that go together, as values; what cannot go together is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import typer

from dllm_convert.errors import DataError

if TYPE_CHECKING:
    from dllm_convert.publishing import PushOptions


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
    from dllm_convert.cli.commands.shared import typed
    from dllm_convert.pipeline.api import publication

    with typed():
        return publication.push_options(repo_id, **given)


def _refuse_alone(given: dict[str, Any]) -> None:
    for field, value in given.items():
        if value not in (None, False):
            flag = "public/--private" if field == "public" else field.replace("_", "-")
            more = "; the source's is --source-revision" if field == "revision" else ""
            raise typer.BadParameter(f"--{flag} needs --push-to-hub REPO_ID{more}")
    if given.get("public") is False:
        raise typer.BadParameter("--public/--private needs --push-to-hub REPO_ID")


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
