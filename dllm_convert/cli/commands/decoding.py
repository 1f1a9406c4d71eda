"""How `sample` decodes: the options, and what is said where they contradict each other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dllm_convert.cli.commands import shared
from dllm_convert.cli.types import count, named, offering, one_of
from dllm_convert.recipe.decoding import MORE, SETTINGS, Setting

FLAGS = {name: setting.flag or f"--{name.replace('_', '-')}" for name, setting in SETTINGS.items()}
"""Options by the name that decoding has for them."""
OFF = "off"
"""Word of a choice that switches off what a checkpoint has saved."""
_NAMES = re.compile(rf"\b({'|'.join(FLAGS)})\b")

Infill = Annotated[
    str | None,
    typer.Option(
        "--infill",
        metavar="MARK",
        rich_help_panel=MORE,
        help="Text that stands for a token to be written wherever it is in a prompt, as in ___.",
    ),
]

Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Write what autoregressive decoding would, and denoise only to draft it.",
    ),
]


VerifyingBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="SOURCE",
        parser=named,
        help="With --lossless: a folder, Hub id or GGUF file that verifies, for which a checkpoint "
        "without a verifier drafts; the base that was converted, if left out.",
    ),
]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Offer an option for each setting of decoding where a command has a parameter `settings`.

    Args:
        command: Is called with the settings that were given, by the names of decoding.
    """
    own = list(inspect.signature(command).parameters.values())
    hints = get_type_hints(command, include_extras=True)
    parameters = []
    for parameter in own:
        if parameter.name == "settings":
            parameters += [_parameter(name, setting) for name, setting in SETTINGS.items()]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @wraps(command)
    def called(**given: Any) -> None:
        typed = {name: given.pop(name) for name in SETTINGS}
        # An option that was left out takes the checkpoint's default, a flag too.
        settings = {
            name: None if value == OFF and SETTINGS[name].kind == "choice" else value
            for name, value in typed.items()
            if value is not None and value is not False
        }
        if given.get("lossless") and settings.get("verify_with", OFF) is None:
            raise typer.BadParameter(
                f"--lossless has a verifier decide, and {FLAGS['verify_with']} {OFF} has none"
            )
        command(**given, settings=settings)

    # What Typer reads the options from.
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _parameter(name: str, setting: Setting) -> inspect.Parameter:
    """Return the parameter that Typer makes a setting's option of."""
    says = _as_flags(setting.says)
    how: dict[str, Any] = {
        "metavar": setting.metavar or None,
        "rich_help_panel": setting.panel,
        "help": f"{says[0].upper()}{says[1:]}.",
    }
    words = setting.choices if setting.empty in setting.choices else (*setting.choices, OFF)
    kind: Any = {"switch": bool, "count": int, "number": float}.get(setting.kind, str)
    if setting.kind == "count":
        how["parser"] = count
    elif setting.kind == "number":
        how |= {"min": 0, "max": setting.most}
    elif setting.kind == "choice":
        how |= {
            "parser": one_of(words),
            "autocompletion": offering(words),
            "metavar": "|".join(words),
        }
    switch = setting.kind == "switch"
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=False if switch else None,
        annotation=Annotated[kind if switch else kind | None, typer.Option(FLAGS[name], **how)],
    )


def check_here(
    checkpoint: str,
    settings: Mapping[str, Any],
    *,
    lossless: bool = False,
    base: str | None = None,
) -> None:
    """Refuse settings that do not fit to a checkpoint of this machine, before torch is imported.

    Args:
        checkpoint: What was named; of a Hub id or a file, opening it says more.
        settings: By the names of decoding, those that were given.
        lossless: Whether whichever verifier there is is to decide what is written.
        base: Another model that was named to verify.

    Raises:
        typer.BadParameter: They contradict each other or the checkpoint.
    """
    check_base(settings, lossless=lossless, base=base)
    folder = Path(checkpoint)
    if folder.is_dir():
        from dllm_convert.sampling.checking import own_verifier, who_verifies

        with typed():
            own = own_verifier(folder)
            given, other = who_verifies(own, settings, lossless=lossless, base=base)
        check_settings(folder, given, other_verifies=other)


def check_base(settings: Mapping[str, Any], *, lossless: bool, base: str | None) -> None:
    """Refuse a base that verifies nothing, or beside another verifier.

    Raises:
        typer.BadParameter: It is such a one.
    """
    if base is not None and "verify_with" in settings:
        raise typer.BadParameter("--base and --verify-with both name who verifies: leave one out.")
    if base is not None and not lossless:
        raise typer.BadParameter("--base says who verifies drafts: add --lossless.")


def check_settings(
    folder: Path, settings: Mapping[str, Any], *, other_verifies: bool = False
) -> None:
    """Refuse settings that do not fit together, or not to the checkpoint.

    Args:
        folder: The checkpoint, of which no weights are read.
        settings: By the names of decoding, those that were given.
        other_verifies: Whether another model verifies what the checkpoint drafts.

    Raises:
        typer.BadParameter: They contradict each other or the checkpoint.
    """
    from dllm_convert.sampling.checking import check_decoding

    try:
        check_decoding(folder, settings, other_verifies=other_verifies)
    except ValueError as error:
        raise typer.BadParameter(_as_flags(str(error))) from error


@contextmanager
def typed() -> Iterator[None]:
    """As `shared.typed`, with the options in place of the names of decoding.

    Raises:
        typer.BadParameter: What was asked contradicts itself or the checkpoint.
    """
    try:
        with shared.typed():
            yield
    except typer.BadParameter as error:
        error.message = _as_flags(error.message)
        raise


def _as_flags(text: str) -> str:
    """Return a text with the options in place of the names of decoding."""
    return _NAMES.sub(lambda found: FLAGS[found[1]], text)
