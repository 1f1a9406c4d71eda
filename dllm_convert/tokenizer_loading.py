"""Load a tokenizer that somebody else wrote, and say in one line why it does not load."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from dllm_convert.errors import DataError

_KNOWN = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)


class TokenizerErrors(AbstractContextManager[None]):
    """Turns what a broken tokenizer raises into a DataError, and nothing else.

    The Rust library raises `Exception` itself for a file it does not understand, and a panic, which
    is no Exception at all, for one that breaks its assumptions. A clause for either would swallow
    every bug of ours, so the class is compared and not its ancestors.

    Args:
        failure: What did not work, as the beginning of the message.
    """

    def __init__(self, failure: str = "transformers cannot load the tokenizer") -> None:
        self._failure = failure

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or error is None:
            return
        from_rust = kind is Exception or kind.__name__ == "PanicException"
        if from_rust or issubclass(kind, _KNOWN):
            reason = str(error).splitlines()[0] if str(error) else kind.__name__
            raise DataError(f"{self._failure} ({reason})") from error


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer as a user would, without any code of the folder.

    Raises:
        DataError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with TokenizerErrors():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
