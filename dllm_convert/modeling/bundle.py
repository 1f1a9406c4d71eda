"""Write the published modelling code as one self-contained file.

transformers copies a checkpoint's code file by file and flattens relative imports; one file without
any is what every loader, pinned or offline, handles the same way.
"""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

from dllm_convert.adapters.base import Adapter

MODELING_FILE = "modeling_dllm.py"
MODELING_MODULE = MODELING_FILE.removesuffix(".py")

_MINIMUM = "MIN_TRANSFORMERS"
_PARTS = (
    "masks.py",
    "ends.py",
    "inputs.py",
    "limits.py",
    "options.py",
    "choosing.py",
    "canvas.py",
    "cache.py",
    "rope.py",
    "reading.py",
    "decoding.py",
    "settings.py",
    "streaming.py",
    "output.py",
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


_MEASURED_PART = "measured.py"
_MEASURED_CLASS = '''
class {name}(MeasuredMixin, {stock}):
    """{stock} as a diffusion language model: measured with transformers {version}, not written."""
'''


def _min_transformers(modeling: str) -> str:
    """Return MIN_TRANSFORMERS of the modelling code: importing it would load torch."""
    assigned = (node for node in ast.parse(modeling).body if isinstance(node, ast.Assign))
    (value,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == _MINIMUM)
    return str(ast.literal_eval(value))


def modeling_source(adapter: Adapter | None = None) -> str:
    """Return the text of the published modelling file.

    Args:
        adapter: The family, where it was measured and has no class of its own in `modeling.py`.
    """
    from dllm_convert.common.version import __version__

    root = resources.files("dllm_convert.modeling.published")
    measured = None if adapter is None else adapter.measured
    parts = _PARTS if measured is None else (*_PARTS, _MEASURED_PART)
    sources = [root.joinpath(part).read_text(encoding="utf-8") for part in parts]
    split = [_split(source) for source in sources]
    imports = sorted({line for found, _ in split for line in found})
    bodies = "\n\n\n".join(body for _, body in split)
    oldest = _min_transformers(sources[len(_PARTS) - 1])
    if adapter is not None and measured is not None:
        imports = sorted({*imports, f"from transformers import {adapter.stock_class}"})
        bodies += "\n\n" + _MEASURED_CLASS.format(
            name=adapter.diffusion_class, stock=adapter.stock_class, version=measured.transformers
        ).rstrip("\n")
        # Older ones were not measured with this family.
        newest = adapter.min_transformers
        bodies = bodies.replace(f'{_MINIMUM} = "{oldest}"', f'{_MINIMUM} = "{newest}"')
        oldest = newest
    header = _HEADER.format(version=__version__, transformers=oldest)
    return header + "\n" + "\n".join(imports) + "\n\n" + bodies + "\n"


def auto_map(adapter: Adapter) -> dict[str, str]:
    """Return the `auto_map` of config.json: where transformers finds the diffusion class."""
    return {adapter.auto_class: f"{MODELING_MODULE}.{adapter.diffusion_class}"}


def write_modeling(folder: Path, adapter: Adapter | None = None) -> Path:
    """Write the modelling file into a checkpoint folder and return its path."""
    path = folder / MODELING_FILE
    path.write_text(modeling_source(adapter), encoding="utf-8")
    return path
