"""Write the code that is published beside the weights: a few files, joined from many modules.

Somebody who opens `modeling_dllm.py` finds the model first, then its masks, the decoding loops and
their forward passes. What it imports relatively travels with it: transformers copies such files out
of a folder and fetches them from the Hub. Older releases copy only what the modelling file itself
names, so it has to name all of them.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib import resources
from pathlib import Path

from dllm_convert.adapters.base import Adapter

MODELING_FILE = "modeling_dllm.py"
CODE_FILES = {
    MODELING_FILE: (
        "modeling.py",
        "masks.py",
        "limits.py",
        "decoding.py",
    ),
    "reading_dllm.py": ("reading.py", "paired.py"),
    "gated_dllm.py": ("gate.py", "gated.py", "moving.py", "noising.py", "stopping.py", "ends.py"),
    "behind_dllm.py": ("behind.py", "drafting.py"),
    "decoding_dllm.py": (
        "canvas.py",
        "cache.py",
        "rope.py",
        "streaming.py",
    ),
    "choosing_dllm.py": ("choosing.py", "ancestral.py", "inputs.py"),
    "device_dllm.py": ("queued.py", "lockstep.py", "regions.py", "draws.py", "graphs.py"),
    "lossless_dllm.py": ("lossless.py", "output.py"),
    # What others are made of at once stands first.
    "settings_dllm.py": (
        "rules.py",
        "options.py",
        "asked.py",
        "settings.py",
    ),
}
"""Files beside the weights, and the modules of `published/` that each is joined from, in order."""
MODELING_MODULE = MODELING_FILE.removesuffix(".py")

_MEASURED_PART = "measured.py"
_MEASURED_CLASS = '''class {name}(MeasuredMixin, {stock}):
    """A stock class opened: measured with transformers {version}, not written."""
'''
_MINIMUM = 'MIN_TRANSFORMERS = "'
_DOCS = {
    MODELING_FILE: """Diffusion language model classes, written by dllm-convert {version}.

Needs torch and transformers >= {transformers} only. Load with `trust_remote_code=True`, which runs
the other `*_dllm.py`, too; without it the same weights load as the stock class, whose masks and
denoising are then the caller's business.
""",
    "reading_dllm.py": """Forward passes of decoding, written by dllm-convert {version}.

What is run, behind which cache, and where logits are taken; and drafts for another model, which
verifies them in forwards of its own.
""",
    "gated_dllm.py": """An adapter that acts on noisy tokens, written by dllm-convert {version}.

Of a model whose config says `acts_on: noisy`: the weights are its base's, and lie beside it.
And how small numbers reach a device without a wait; how much noise a text holds at a time; what
ends a text early.
""",
    "behind_dllm.py": """Noisy tokens behind a copy of the base's cache, by dllm-convert {version}.

Of a model whose config says `behind: cache`: no attention of its base is opened. And what a
lossless forward holds, of any model.
""",
    "decoding_dllm.py": """What a denoising step works with, written by dllm-convert {version}.

The text so far, and the cache behind it; `modeling_dllm.py` runs the steps.
""",
    "choosing_dllm.py": """What a denoising step decides, written by dllm-convert {version}.

Tokens, which of them become final, which are taken back; or what the reverse of the noise draws.
And prompts, as `generate` is given them.
""",
    "device_dllm.py": """Decoding on a GPU, written by dllm-convert {version}.

The same steps, queued one behind the other without a look at what became of them.
""",
    "lossless_dllm.py": """Decoding whose text is the verifier's own, by dllm-convert {version}.

Drafts are denoised, and kept as far as autoregressive decoding would write the same. And what
`generate` returns, of any model.
""",
    "settings_dllm.py": """Settings of decoding, written by dllm-convert {version}.

What can be asked for, of a text and of transformers' `generate`; and which of a call, a generation
config and a default wins.
""",
}

Imported = tuple[tuple[str, str], ...]
"""Modules as a whole, `("torch", "")`, and names from modules; those beside have a dot first."""


@cache
def _read(name: str) -> tuple[Imported, str]:
    """Return what a module of `published/` imports, and the rest of it under a heading."""
    root = resources.files("dllm_convert.modeling.published")
    source = root.joinpath(name).read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported: list[tuple[str, str]] = []
    drop: set[int] = set()
    for position, node in enumerate(tree.body):
        if isinstance(node, ast.Import):
            imported += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            imported += [(module, alias.name) for alias in node.names]
        elif position:  # the first is the docstring
            continue
        drop.update(range(node.lineno - 1, node.end_lineno or node.lineno))
    lines = source.splitlines(keepends=True)
    body = "".join(line for number, line in enumerate(lines) if number not in drop).strip("\n")
    said = (ast.get_docstring(tree) or "").splitlines()
    heading = "\n".join(f"# {line}".rstrip() for line in said)
    return tuple(imported), f"{heading}\n\n\n{body}"


def _import_lines(imported: Imported) -> str:
    """Return imports as formatters have them: of Python, of packages, of the files beside."""
    named: dict[tuple[bool, str], set[str]] = {}
    for module, name in imported:
        named.setdefault((bool(name), module), set()).add(name)
    groups: tuple[list[str], ...] = ([], [], [])
    for (by_name, module), names in sorted(named.items()):
        line = f"from {module} import {', '.join(sorted(names))}" if by_name else f"import {module}"
        if len(line) > 100:
            listed = "".join(f"    {name},\n" for name in sorted(names))
            line = f"from {module} import (\n{listed})"
        root = module.partition(".")[0]
        groups[int(root not in sys.stdlib_module_names) if root else 2].append(line)
    return "\n\n".join("\n".join(lines) for lines in groups if lines)


def _join(file: str, parts: list[tuple[Imported, str]], doc: str) -> str:
    """Return the text of a file; what its parts import from other files is imported from those."""
    home = {f".{Path(part).stem}": other for other, held in CODE_FILES.items() for part in held}
    wanted = tuple(
        (f".{Path(home[module]).stem}" if module in home else module, name)
        for imported, _ in parts
        for module, name in imported
        if module != "__future__" and home.get(module) != file
    )
    start = f'"""{doc}"""\n\nfrom __future__ import annotations\n\n{_import_lines(wanted)}\n\n'
    return start + "\n\n\n".join(body for _, body in parts) + "\n"


def published_code(adapter: Adapter | None = None) -> dict[str, str]:
    """Return the text of the files that are published beside the weights, by name.

    Args:
        adapter: The family, where it was measured and has no class of its own in `modeling.py`.
    """
    from dllm_convert.common.version import __version__

    files = {file: [_read(part) for part in held] for file, held in CODE_FILES.items()}
    model = files[MODELING_FILE]
    imported, body = model[0]
    oldest = body.partition(_MINIMUM)[2].partition('"')[0]
    if adapter is not None and adapter.measured is not None:
        # Older ones were not measured with this family.
        body = body.replace(f"{_MINIMUM}{oldest}", f"{_MINIMUM}{adapter.min_transformers}")
        oldest, stock = adapter.min_transformers, adapter.stock_class
        mixin_imported, mixin = _read(_MEASURED_PART)
        own = _MEASURED_CLASS.format(
            name=adapter.diffusion_class, stock=stock, version=adapter.measured.transformers
        )
        measured = (*mixin_imported, ("transformers", stock)), f"{mixin}\n\n\n{own}".rstrip()
        # Behind the classes it derives from, in front of what they call.
        model[:1] = (imported, body), measured
    facts = {"version": __version__, "transformers": oldest}
    return {file: _join(file, files[file], _DOCS[file].format(**facts)) for file in CODE_FILES}


def auto_map(adapter: Adapter) -> dict[str, str]:
    """Return the `auto_map` of config.json: where transformers finds the diffusion class."""
    return {adapter.auto_class: f"{MODELING_MODULE}.{adapter.diffusion_class}"}


def write_code(folder: Path, adapter: Adapter | None = None) -> None:
    """Write the published files into a checkpoint folder."""
    for name, text in published_code(adapter).items():
        (folder / name).write_text(text, encoding="utf-8")
