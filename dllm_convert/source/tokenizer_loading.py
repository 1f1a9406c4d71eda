"""Load a tokenizer that somebody else wrote, and say in one line why it does not load."""

from __future__ import annotations

from contextlib import AbstractContextManager
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from dllm_convert.common.shown_text import shown
from dllm_convert.errors import DataError

_KNOWN = (
    *(OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, IndexError),
    # A number that Rust has no room for; a slow class that is asked what only fast ones know.
    *(RecursionError, OverflowError, NotImplementedError),
)
_BY_NAME = frozenset({"StrictDataclassError"})
"""What huggingface_hub raises of a config.json that is read on the way; importing it takes long."""
_TEKKEN, _WHOLE = "tekken.json", "tokenizer.json"


class TokenizerErrors(AbstractContextManager[None]):
    """Turns what a broken tokenizer raises into a DataError, and nothing else.

    The Rust library raises `Exception` itself for a file it does not understand, and a panic, which
    is no Exception at all, for one that breaks its assumptions. A clause for either would swallow
    every bug of ours, so the class is compared and not its ancestors.

    Args:
        failure: What did not work, as the beginning of the message.
        hint: What to do about it.
    """

    known: ClassVar[tuple[type[BaseException], ...]] = _KNOWN

    def __init__(
        self,
        failure: str = "transformers cannot load the tokenizer",
        hint: str | None = None,
    ) -> None:
        self._failure, self._hint = failure, hint

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or error is None:
            return
        from_rust = kind is Exception or kind.__name__ == "PanicException"
        named = any(ancestor.__name__ in _BY_NAME for ancestor in kind.__mro__)
        if from_rust or named or issubclass(kind, self.known):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else kind.__name__
            raise DataError(f"{self._failure} ({reason})", hint=self._hint) from error


class RustErrors(TokenizerErrors):
    """The same of what the Rust library alone raises: around code that raises errors of its own."""

    known = ()


def load_tokenizer(given: Path | str, rows: int | None = None) -> Any:
    """Load a tokenizer as a user would, without any code of the folder.

    Mistral's tekken.json is converted where it is alone. Beside a tokenizer.json it is passed over:
    with mistral-common installed, transformers would take it for the whole tokenizer, and neither
    the mask nor the chat template is in it.

    Args:
        given: Folder or Hub id.
        rows: Rows of the embedding that it is used with, if it has to fit one.

    Raises:
        DataError: transformers cannot load it, a setting of it is of another kind, or it has tokens
            without a row.
    """
    import transformers

    folder = Path(given)
    with TokenizerErrors(
        f"transformers cannot load the tokenizer in {given}",
        "Save it as tokenizer.json with save_pretrained",
    ):
        if not (folder / _TEKKEN).is_file():
            loaded = transformers.AutoTokenizer.from_pretrained(given, trust_remote_code=False)
        elif (folder / _WHOLE).is_file():
            loaded = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            loaded = _convert_tekken(folder)
        loaded.all_special_ids  # noqa: B018 - a class that lacks one of its tokens fails only here
    _check_settings(loaded, given)
    highest = max(loaded.get_vocab().items(), key=itemgetter(1), default=None) if rows else None
    if rows and highest is not None and highest[1] >= rows:
        raise DataError(
            f"the tokenizer in {given} has the token {shown(highest[0])} with id {highest[1]}, and "
            f"the embedding has {rows} rows",
            hint="Put back the tokenizer files that dllm-convert run wrote",
        )
    return loaded


def _check_settings(tokenizer: Any, given: Path | str) -> None:
    """Check what transformers takes from tokenizer_config.json as it stands, and computes with.

    Raises:
        DataError: A setting is of another kind.
    """
    limit, template = tokenizer.model_max_length, tokenizer.chat_template
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit > 0:
        raise _wrong(given, "model_max_length", limit, "a number above 0")
    if template is not None and not isinstance(template, str | dict):
        raise _wrong(given, "chat_template", template, "a text")


def _wrong(given: Path | str, name: str, value: object, expected: str) -> DataError:
    return DataError(
        f"tokenizer_config.json of {given}: {name} is {shown(value)}, expected {expected}",
        hint="Correct it, or save the tokenizer again with save_pretrained",
    )


def _convert_tekken(folder: Path) -> Any:
    from transformers.integrations.mistral import tokenizer as mistral

    made: Any = mistral.convert_tekken_tokenizer(str(folder / _TEKKEN))
    # Every text that these models were trained on begins with <s>.
    made.add_bos_token = True
    return made
