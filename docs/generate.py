"""Write docs/cli.md and docs/recipes.md from the application and the schema; --check compares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from dllm_convert.cli.app import EXIT_CODES, app
from dllm_convert.pipeline.listed import listed_rows
from dllm_convert.recipe.fields import all_fields
from dllm_convert.recipe.loading import data_dir, list_recipes
from dllm_convert.recipe.yaml_text import parse_mapping

HERE = Path(__file__).parent
NOTICE = "<!-- Written by docs/generate.py (make docs); do not edit. -->\n"

RECIPES_TEXT = """\
A recipe says what a conversion does. `dllm-convert run SOURCE` takes the name of a shipped recipe,
a recipe file of your own, or a checkpoint without one, to which the preset `small-budget` applies.

```yaml
# mine.yaml: dllm-convert run mine.yaml
source: ./my-checkpoint       # Hub id, folder or .gguf file; paths start at the working directory
inherits: [fast-dllm-v2]      # presets, recipes, or paths of .yaml files beside this one
training:
  steps: 500
```

What comes later wins: presets in the order of `inherits`, then the file, then `--preset NAME`, then
flags and `--set` (`--set training.learning_rate=2e-5`); two of these that contradict each other are
refused. Only `references` add up. Where one field says another more narrowly, what comes later wins
as well: a typed `training.learning_rate` makes an inherited `training.lora.learning_rate` void,
`--steps` an inherited `max_minutes` or `tokens`, `--data` the subset and split of other data.
`--tokens`, `--max-time` and `--global-batch` say how long to train in other units; the plan shows
what came of them. A budget in tokens (`training.tokens`, which the presets for GPUs have) is kept
whatever the batch and however many processes train: the number of steps follows from it. What would
change nothing, such as `--keep-adapter` without LoRA, is refused. A source that is a conversion
itself, in a folder or on the Hub, hands down its target, block size, noise and token shift: they
win over presets, and what is written in the file or typed wins over them.

Files are read as YAML 1.2: `no` and `on` are texts, `2e-5` is a number. `dllm-convert recipes NAME`
shows what a recipe resolves to, and every run writes that as `recipe.yaml` beside the weights; it
is a recipe itself.
"""

CLI_TEXT = """\
Data goes to stdout, everything else to stderr. With `--json`, stdout holds exactly one JSON
document; of a known failure it is `{"error": {"kind", "message", "hint"}, "exit_code"}`.
`HF_DEBUG=1` shows the traceback of a known failure. `dllm-convert --version` prints the version,
`--install-completion` sets up completion for your shell.
"""

BASE_TEXT = """\
Base models, because training on plain text would undo an instruction tuning. Each file in
`recipes/` says where its numbers come from. Hours are rough: from the size of the base and the
recipe's device alone, of which a fifth of the peak is assumed; `check` reads the checkpoint's
headers and says them of every device.
"""


def cli_page() -> str:
    """Return the command reference."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line\n",
        NOTICE,
        f"{group.help}\n",
        CLI_TEXT,
        "## Exit codes\n",
        _table(("code", "meaning"), [(f"{code}", text) for code, text in EXIT_CODES.items()]),
    ]
    for name, command in group.commands.items():
        parts += [f"## {name}\n", f"{command.help}\n", _parameters(name, command)]
    return "\n".join(parts)


def _parameters(name: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join([f"dllm-convert {name}", *(one.metavar for one in arguments), "[OPTIONS]"])
    rows = [(f"`{one.metavar}`", one.help) for one in arguments]
    rows += [(_spelling(one), one.help) for one in options]
    return f"```\n{usage}\n```\n\n{_table(('argument or option', 'meaning'), rows)}"


def _spelling(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    # Every option that takes a value names it; what names nothing is a flag.
    return f"{names} {option.metavar or ''}".rstrip()


def recipes_page() -> str:
    """Return the reference of recipes: fields, presets, recipes."""
    fields = [
        (f"`{one.path}`", one.allowed, "required" if one.required else _default(one.default),
         one.description)
        for one in all_fields().values()
    ]  # fmt: skip
    presets = sorted((data_dir("recipes") / "presets").glob("*.yaml"))
    preset_rows = [(f"`{path.stem}`", *_preset_facts(path)) for path in presets]
    header, recipe_rows = listed_rows(list_recipes())
    return "\n".join(
        [
            "# Recipes\n",
            NOTICE,
            RECIPES_TEXT,
            "## Fields\n",
            _table(("field", "values", "default", "meaning"), fields),
            "## Presets\n",
            _table(("preset", "what it is", "source"), preset_rows),
            "## Shipped recipes\n",
            BASE_TEXT,
            _table(header, recipe_rows),
        ]
    )


def _preset_facts(path: Path) -> tuple[str, str]:
    fields: Mapping[str, Any] = parse_mapping(path.read_text(encoding="utf-8"), str(path))
    return fields["description"], "; ".join(fields["references"])


def _default(value: Any) -> str:
    return "" if value is None or value == [] else f"`{json.dumps(value)}`"


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli_page, "recipes.md": recipes_page}


def main() -> int:
    """Write the pages, or with --check return 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 on a difference"
    )
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
