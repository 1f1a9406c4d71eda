"""Write the published modelling code as one self-contained file.

transformers copies a checkpoint's code file by file and flattens relative imports; one file without
any is what every loader, pinned or offline, handles the same way.
"""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

MODELING_FILE = "modeling_dllm.py"

_MINIMUM = "MIN_TRANSFORMERS"
_PARTS = (
    "attention.py",
    "sampling/options.py",
    "sampling/choosing.py",
    "sampling/canvas.py",
    "sampling/cache.py",
    "sampling/reading.py",
    "sampling/decoding.py",
    "sampling/settings.py",
    "sampling/streaming.py",
    "sampling/output.py",
    "modeling.py",
)
_HEADER = '''"""Diffusion language model classes, written by dllm-convert {version}.

Self-contained: needs torch and transformers >= {transformers} only. Load with
`trust_remote_code=True`; without it the same weights load as the stock class, whose block-causal
masks and denoising are then the caller's business.
"""

from __future__ import annotations
'''


def _split(source: str) -> tuple[list[str], str]:
    """Return a module's top-level absolute imports and the rest without docstring."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    imports: list[str] = []
    drop: set[int] = set()
    for position, node in enumerate(tree.body):
        span = range(node.lineno - 1, node.end_lineno or node.lineno)
        is_docstring = position == 0 and isinstance(node, ast.Expr)
        if isinstance(node, ast.Import | ast.ImportFrom):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            if not relative and not future:
                imports.append(ast.unparse(node))
            drop.update(span)
        elif is_docstring:
            drop.update(span)
    body = "".join(line for number, line in enumerate(lines) if number not in drop)
    return imports, body.strip("\n")


def _min_transformers(modeling: str) -> str:
    """Return MIN_TRANSFORMERS of the modelling code: importing it would load torch."""
    assigned = (node for node in ast.parse(modeling).body if isinstance(node, ast.Assign))
    (value,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == _MINIMUM)
    return str(ast.literal_eval(value))


def modeling_source() -> str:
    """Return the text of the published modelling file."""
    from dllm_convert import __version__

    root = resources.files("dllm_convert")
    sources = [root.joinpath(part).read_text(encoding="utf-8") for part in _PARTS]
    parts = [_split(source) for source in sources]
    imports = sorted({line for found, _ in parts for line in found})
    bodies = "\n\n\n".join(body for _, body in parts)
    header = _HEADER.format(version=__version__, transformers=_min_transformers(sources[-1]))
    return header + "\n" + "\n".join(imports) + "\n\n" + bodies + "\n"


def write_modeling(folder: Path) -> Path:
    """Write the modelling file into a checkpoint folder and return its path."""
    path = folder / MODELING_FILE
    path.write_text(modeling_source(), encoding="utf-8")
    return path
