"""What stands around the commands in the help: their groups, examples, pages, what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

DOCS = "docs/"
"""Where the pages are: of a checkout, or an address."""

CONVERT, USE, SHARE, LOOK = "Convert", "Use and judge", "Share", "Look things up"

OTHER_NAMES = {
    "convert": "run",
    "train": "run",
    "plan": "check",
    "eval": "evaluate",
    "lm_eval": "lm-eval",
    "generate": "sample",
    "talk": "chat",
    "upload": "push",
    "publish": "push",
    "test": "verify",
    "validate": "verify",
    "list": "recipes",
    "models": "architectures",
    "families": "architectures",
    "version": "env",
    "info": "env",
}
"""What commands are called elsewhere."""


@dataclass(frozen=True)
class Guide:
    """What the help of a command says besides its options.

    Attributes:
        group: Panel of the list of commands.
        page: Page that says more.
        examples: Lines to type.
    """

    group: str
    page: str
    examples: tuple[str, ...]

    @property
    def epilog(self) -> str:
        """The foot of the help; an empty line is a line end there."""
        lines = [f"  dllm-convert {line}" for line in self.examples]
        return "\n\n".join(["Examples:", *lines, f"More: {DOCS}{self.page}"])


GUIDES = {
    "run": Guide(
        CONVERT,
        "training.md",
        (
            "run qwen2.5-1.5b --to bd3lm --block 32",
            "run my-checkpoint --to mdlm --lora 16 --data 'texts/*.jsonl' --max-time 2h",
        ),
    ),
    "check": Guide(
        CONVERT,
        "check.md",
        ("check qwen3-4b --to bd3lm", "check my-checkpoint --to mdlm --tokens 5M --json"),
    ),
    "verify": Guide(
        USE,
        "verify.md",
        (
            "verify out",
            "verify out --against base --report out.html",
            "verify out --files",
        ),
    ),
    "evaluate": Guide(
        USE,
        "evaluate.md",
        ("evaluate out --tasks arc_easy --against my-checkpoint --limit 200",),
    ),
    "sample": Guide(
        USE,
        "sampling.md",
        (
            'sample out --prompt "A list is" --threshold 0.9',
            'sample out --prompt "Hello" --chat --record film.gif',
        ),
    ),
    "chat": Guide(USE, "sampling.md", ("chat out", "chat someone/model-bd3lm --temperature 0.7")),
    "serve": Guide(USE, "serve.md", ("serve out", "serve someone/model-bd3lm --port 9000")),
    "card": Guide(SHARE, "report.md", ("card out",)),
    "export": Guide(SHARE, "serve.md", ("export out --to sdar --prove", "export out --to gguf")),
    "push": Guide(SHARE, "publish.md", ("push out my-name/my-model --public",)),
    "recipes": Guide(LOOK, "recipes.md", ("recipes", "recipes qwen3-4b")),
    "architectures": Guide(LOOK, "add-a-family.md", ("architectures",)),
    "env": Guide(LOOK, "cli.md", ("env", "env --json")),
    "lm-eval": Guide(
        USE, "evaluate.md", ("lm-eval ls tasks", "lm-eval --model dllm-convert --tasks arc_easy")
    ),
}
"""Every command, in the order of the help."""


def meant(name: str, known: Collection[str]) -> str | None:
    """Return the name that was meant by one that there is not, None if none is near."""
    other = OTHER_NAMES.get(name.lower())
    if other in known:
        return other
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return near[0] if near else None
