"""The calls that the pages and the card show are run, with every family's tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounds_cases import wrapped_source
from factory import FAMILIES, make_source
from pushing import checkpoint
from transformers import AutoTokenizer

from dllm_convert.adapters import get_adapter
from dllm_convert.card.readme import write_card
from dllm_convert.sampling import DEFAULT_PROMPT
from dllm_convert.verification import verify_checkpoint

ROOT = Path(__file__).parent.parent


def _calls(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for code in found if "generate(" in code]


SHOWN = [code for page in ("README.md", "docs/sampling.md") for code in _calls(ROOT / page)]
TYPES = ["input_ids", "token_type_ids", "attention_mask"]


def source_of(folder: Path, family: str, kind: str) -> Path:
    """A tiny checkpoint whose tokenizer has no padding, or gives types, or closes every text."""
    if kind == "closes":
        return wrapped_source(folder, "begin and end")
    make_source(folder, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "no padding":
        tokenizer.pad_token = None
        if family == "mistral":
            tokenizer.unk_token = "<unk>"
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None}))
        path = folder / "generation_config.json"
        if path.is_file():
            kept = json.loads(path.read_text()) | {"pad_token_id": None}
            path.write_text(json.dumps(kept))
    elif kind == "types":
        tokenizer.model_input_names = TYPES
    tokenizer.save_pretrained(folder)
    return folder


CASES = [
    *((family, "as it is") for family in FAMILIES),
    *((family, "no padding") for family in ("llama", "mistral", "qwen2", "roberta")),
    *((family, "types") for family in ("llama", "bert")),
    ("llama", "closes"),
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_is_shown_runs(tmp_path: Path, family: str, kind: str) -> None:
    adapter = get_adapter(family)
    base = source_of(tmp_path / "base", family, kind)
    target = "bd3lm" if "bd3lm" in adapter.targets else "mdlm"
    folder = checkpoint(base, tmp_path / "out", target)
    (card,) = _calls(write_card(folder))
    space: dict[str, Any] = {"prompts": ["The value", "A list of names is"]}
    assert len(SHOWN) == 2
    for code in (*SHOWN, card):
        here = re.sub(r'^(folder|checkpoint) = ".*', rf"\1 = {str(folder)!r}", code, flags=re.M)
        exec(here.replace("AutoModelForCausalLM", adapter.auto_class), space)
        sequences = getattr(space.get("output"), "sequences", space.get("output"))
        if "text" in space:
            sequences = space.pop("text")
        assert not bool((sequences == space["model"].config.mask_token_id).any())
        written = space["tokenizer"].decode(sequences[-1], skip_special_tokens=True)
        start = {"A list", "a list", DEFAULT_PROMPT, DEFAULT_PROMPT.lower()}
        assert written.strip().startswith(tuple(start)), written


@pytest.mark.parametrize(("family", "expected"), [("llama", 1), ("mistral", 2), ("roberta", 1)])
def test_a_padding_token_is_named_where_there_is_none(
    tmp_path: Path, family: str, expected: int
) -> None:
    """The unknown token or one made for it, else the end's; no id of any text changes."""
    base = source_of(tmp_path / "base", family, "no padding")
    target = "bd3lm" if "bd3lm" in get_adapter(family).targets else "mdlm"
    folder = checkpoint(base, tmp_path / "out", target)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base, folder))
    assert before.pad_token is None
    assert after.pad_token_id == expected
    assert after.padding_side == "left"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["pad_token_id"] == expected
    known = before.get_vocab()
    assert {text: row for text, row in after.get_vocab().items() if text in known} == known
    report = verify_checkpoint(folder, against=base, untrained=True, groups=("files", "tokens"))
    assert {probe.name for probe in report.failed} <= {"hashes"}


def test_another_end_pads_before_the_tokenizers_own(tmp_path: Path) -> None:
    base = source_of(tmp_path / "base", "llama", "no padding")
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, 2]}))
    folder = checkpoint(base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|start|>"


def test_a_class_that_pads_by_itself_is_left_alone(tmp_path: Path) -> None:
    base = source_of(tmp_path / "base", "qwen2", "no padding")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / name).is_file():
            settings = json.loads((base / name).read_text())
            settings.pop("pad_token", None)
            (base / name).write_text(json.dumps(settings))
    folder = checkpoint(base, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (base, folder))
    assert before.pad_token == after.pad_token == "<|endoftext|>"
    assert after.padding_side == before.padding_side


def test_the_padding_that_the_configs_name_comes_first(tmp_path: Path) -> None:
    base = source_of(tmp_path / "base", "llama", "no padding")
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 2}))
    folder = checkpoint(base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|start|>"


def test_padding_that_is_there_stays(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("llama", "bert"):
        base = source_cache(family)
        folder = checkpoint(base, tmp_path / family, "mdlm")
        before, after = (AutoTokenizer.from_pretrained(path) for path in (base, folder))
        assert (after.pad_token, after.padding_side) == (before.pad_token, before.padding_side)
        ids = [t(["a", "a b c"], padding=True).input_ids for t in (before, after)]
        assert ids[0] == ids[1]
