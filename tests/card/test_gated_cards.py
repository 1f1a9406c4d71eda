"""What is said of a gated conversion, and its snippets run as a stranger would run them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import generic
import pytest
import yaml
from gated import ADAPTER, gated_folder
from hub_server import COMMIT, LoopbackHub, run_python, serve
from pushing import PROBES
from safetensors.torch import load_file, save_file

from dllm_convert.adapters.base import Adapter
from dllm_convert.card.readme import write_card
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import (
    MANIFEST_FILE,
    hash_files,
    read_manifest,
    versions,
    write_manifest,
)
from dllm_convert.planning.conversion import plan_as_dict, source_facts
from dllm_convert.publishing.adapter import adapter_checkpoint, check_adapter

STRANGER = "import sys; sys.modules['dllm_convert'] = None\n"
TRAIN = {
    "method": "lora",
    "steps": 6,
    "tokens": 384,
    "seconds": 2.0,
    "trainable_parameters": 4896,
    "final_loss": 6.0,
    "stopped": "steps",
    "device": "CPU",
    "devices": 1,
    "flops": 1e9,
}
COMPARE = """
import torch
whole = type(model).from_pretrained("me/whole").eval()
noisy = torch.arange(output.shape[1])[None] >= 16
with torch.no_grad():
    one, other = (each.eval()(output, noisy=noisy).logits for each in (whole, model))
print("difference", float((one - other).abs().max()))
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with serve(LoopbackHub()) as running:
        yield running


def documented(base: Path, folder: Path, *, on_hub: bool, measured: Adapter | None = None) -> Path:
    """Write a gated folder with a manifest as `run` writes it, and its card."""
    plan = gated_folder(base, folder, measured=measured)
    source = source_facts(plan) | {"license": "apache-2.0"}
    if on_hub:
        source |= {"kind": "hub", "repo_id": "org/base", "revision": COMMIT}
    manifest = {
        "format_version": 1,
        "created": "2026-11-23T22:30:00+00:00",
        "dllm_convert": "0.1.0",
        "versions": versions(),
        "source": source,
        "recipe": plan.recipe.model_dump(mode="json"),
        "plan": plan_as_dict(plan),
        "stages": [],
        "measurements": {"train": TRAIN},
        "sample": None,
        "verification": {"passed": True, "probes": PROBES, "seconds": 1.0},
        "files": hash_files(folder, exclude=(MANIFEST_FILE, "README.md")),
    }
    write_manifest(folder, json.loads(json.dumps(manifest)))
    write_card(folder)
    return folder


def snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def run(hub: LoopbackHub, home: Path, code: str) -> str:
    env = hub.environment(home) | {"OMP_NUM_THREADS": "1"}
    return run_python(STRANGER + code, env=env, modules=forks.STRANGER_WITH_PEFT)


def test_what_the_card_says(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    folder = documented(source_cache("llama"), tmp_path / "whole", on_hub=True)
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model_relation"] == "adapter"
    assert head["library_name"] == "transformers"
    assert "lora" in head["tags"]
    assert "The weights are the base's, unchanged" in card
    assert "LoRA of rank 4 beside the base" in card
    assert "The first token of a block is the base's own prediction" in card
    for said_of_others in ("merged", "guidance_scale", "must not serve", "refuse", "block-causal"):
        assert said_of_others not in card, said_of_others


def test_what_the_card_says_of_rows_behind_a_cache(
    generic_source: Callable[[str], Path], tmp_path: Path
) -> None:
    base = generic_source("lfm2")
    measured = generic.measured(base).require()
    folder = documented(base, tmp_path / "whole", on_hub=False, measured=measured)
    card = " ".join((folder / "README.md").read_text().split())
    assert "see those before them in their block" in card
    assert "the last ones of their row" in card
    assert "being written see those of it before them and all clean tokens" in card
    assert "no attention is opened" in card
    assert "measured, not written" in card
    assert "see each other" not in card


def test_the_snippets_run_from_the_hub(
    source_cache: Callable[..., Path], hub: LoopbackHub, tmp_path: Path
) -> None:
    base = source_cache("llama")
    whole = documented(base, tmp_path / "whole", on_hub=True)
    adapter_checkpoint(whole, tmp_path / "adapter", Reporter(quiet=True))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    # At the top transformers would put it on the base, on all tokens of it.
    assert "adapter" in names
    assert not {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} & names
    card = write_card(tmp_path / "adapter", repo_id="me/adapter").read_text()
    hub.repos |= {"org/base": base, "me/adapter": tmp_path / "adapter", "me/whole": whole}
    (alone,) = snippets(card)
    assert f'revision="{COMMIT}"' in alone
    (together,) = snippets(write_card(whole, repo_id="me/whole").read_text())
    for number, snippet in enumerate((alone, together)):
        said = run(hub, tmp_path / f"home-{number}", snippet + COMPARE)
        assert float(re.findall(r"difference (\S+)", said)[0]) == 0, said


def test_the_adapter_is_checked_on_its_base(
    source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    whole = documented(source_cache("qwen3"), tmp_path / "whole", on_hub=False)
    adapter_checkpoint(whole, tmp_path / "adapter", Reporter(quiet=True))
    assert read_manifest(tmp_path / "adapter")["adapter_only"] is True
    (tmp_path / "scratch").mkdir()
    probe = check_adapter(tmp_path / "adapter", whole, tmp_path / "scratch", Reporter(quiet=True))
    assert probe["passed"], probe
    # Another adapter is not the one of the folder.
    states = load_file(tmp_path / "adapter" / ADAPTER)
    states = {name: value * 1.5 for name, value in states.items()}
    (tmp_path / "adapter" / ADAPTER).unlink()  # it is linked
    save_file(states, tmp_path / "adapter" / ADAPTER, {"format": "pt"})
    (tmp_path / "again").mkdir()
    probe = check_adapter(tmp_path / "adapter", whole, tmp_path / "again", Reporter(quiet=True))
    assert not probe["passed"]
