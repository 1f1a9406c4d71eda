"""What the site needs beyond the pages: README as its first page, and links that leave docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Take README.md for the first page; its links are written from the root."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_LINK.sub(_from_root, text)))
    return files


def _from_root(found: re.Match[str]) -> str:
    target = found[1]
    return f"]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Have links to files outside of docs/ lead to the repository."""

    def outside(found: re.Match[str]) -> str:
        target = found[1]
        if not target.startswith("../"):
            return found[0]
        name = target.removeprefix("../")
        if not (ROOT / name).exists():
            raise ValueError(f"{page.file.src_uri} links to {target}, which is not there")
        kind = "tree" if (ROOT / name).is_dir() else "blob"
        return f"]({config['repo_url'].rstrip('/')}/{kind}/main/{name}"

    return _LINK.sub(outside, markdown)
