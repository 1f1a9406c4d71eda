"""Keep other libraries' bars and notes out of ours while a command runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def debugging() -> bool:
    """Whether the ecosystem's `HF_DEBUG` is set: tracebacks are shown, libraries stay loud."""
    return os.environ.get("HF_DEBUG", "").lower() in ("1", "true", "yes", "on")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers, datasets and PEFT below errors; `HF_DEBUG=1` leaves them loud.

    Their settings are put back when the block ends.
    """
    if debugging():
        yield
        return
    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for module in ("transformers", "peft", "torch", "accelerate"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not dataset_bars:
            datasets.enable_progress_bars()
