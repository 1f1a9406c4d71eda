"""Write a film into a file, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from dllm_convert.common.disk import write_whole
from dllm_convert.sampling.watch.frames import Film
from dllm_convert.sampling.watch.pieces import TokenText

FORMATS = (".gif", ".html")


def write_recording(path: Path, film: Film, text: TokenText, *, title: str) -> None:
    """Write a film as what its file's suffix names.

    Args:
        path: A file that ends in one of `FORMATS`.
        film: What was recorded.
        text: Texts of tokens.
        title: Heading of a page.

    Raises:
        ValueError: The suffix is another one.
    """
    if path.suffix.lower() == ".gif":
        from dllm_convert.sampling.watch.gif import render_gif

        write_whole(path, render_gif(film, text))
    elif path.suffix.lower() == ".html":
        from dllm_convert.sampling.watch.page import render_page

        write_whole(path, render_page(film, text, title=title))
    else:
        raise ValueError(f"{path} ends in none of {', '.join(FORMATS)}")
