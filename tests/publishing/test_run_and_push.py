"""From one repository of the Hub to another: `run SOURCE --push-to-hub REPO_ID`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import yaml
from hub_faults import Fault, FaultPlan
from hub_server import COMMIT, LoopbackHub, run_python, serve
from pushing import TOKEN, Done, command

BASE, REPO = "someone/tiny-llama", "me/tiny-llama-bd3lm"


@pytest.fixture
def hub(source_cache: Callable[..., Path], tmp_path: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path / "hub")
    hub.add_user("me", TOKEN)
    base = Path(shutil.copytree(source_cache("llama"), tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, fr]\n---\n# Base\n")
    hub.repos[BASE] = base
    with serve(hub):
        yield hub


@pytest.fixture
def run(hub: LoopbackHub, tmp_path: Path) -> Callable[..., Done]:
    def call(*arguments: str, **options: Any) -> Done:
        fixed = ["run", BASE, "--to", "bd3lm", "--block", "8", "--no-train", "--out"]
        settings = ["--set", "data.sequence_length=64"]
        out = str(tmp_path / "out")
        return command(hub, tmp_path / "home", *fixed, out, *settings, *arguments, **options)

    return call


STRANGER = """
import sys
sys.modules["dllm_convert"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.manual_seed(0)
name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
stock = AutoModelForCausalLM.from_pretrained(name)
text = model.generate(**tokenizer("A name is", return_tensors="pt"), max_new_tokens=9)
print(type(model).__name__, type(stock).__name__, text.shape[1], tokenizer.mask_token_id in text)
"""


def test_from_hub_to_hub(hub: LoopbackHub, run: Callable[..., Done], tmp_path: Path) -> None:
    # The preflight asks who pushes before any work; the upload fails, the work is kept.
    hub.faults = FaultPlan([Fault("status", "POST", "preupload", 1, 403)])
    failed = run("--push-to-hub", REPO)
    assert failed.code == 1 and "no rights" in failed.stderr, failed.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    done = run("--push-to-hub", REPO, "--json")
    assert done.code == 0, done.stderr
    assert done.json["published"]["private"] is True
    assert "adapt" not in done.stderr

    commit = hub.store.repos[REPO].find("main")
    assert commit is not None and commit.oid == done.json["published"]["commit"]
    card = commit.files["README.md"].read().decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == (BASE, "finetune")
    assert (front["license"], front["language"]) == ("apache-2.0", ["en", "fr"])
    assert COMMIT in card
    env = hub.environment(tmp_path / "stranger", TOKEN)
    said = run_python(STRANGER, REPO, env=env, modules=forks.STRANGER)
    length = said.split()[2]
    assert said.split() == ["DiffusionLlamaForCausalLM", "LlamaForCausalLM", length, "False"]


def test_an_adapter_alone(hub: LoopbackHub, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = [f"Sentence {n} says that {n} follows {n - 1}." for n in range(1, 400)]
    text.write_text("\n\n".join(words))
    home, out = tmp_path / "home", str(tmp_path / "out")
    done = command(
        *(hub, home, "run", BASE, "--to", "mdlm", "--lora", "4", "--keep-adapter", "--steps", "2"),
        *("--data", str(text), "--set", "data.sequence_length=64", "--out", out, "--quiet"),
    )
    # Two steps may leave the bound where it was: what is published does not depend on it.
    assert done.code in (0, 4), done.stderr
    force = ["--force-unverified"] if done.code else []
    pushed = command(hub, home, "push", out, "me/tiny-lora", "--adapter-only", "--json", *force)
    assert pushed.code == 0, pushed.stderr
    (probe,) = pushed.json["confirmed"]["probes"]
    assert (probe["name"], probe["passed"]) == ("adapter", True), probe
    commit = hub.store.repos["me/tiny-lora"].find("main")
    assert commit is not None and "model.safetensors" not in commit.files
    front = yaml.safe_load(commit.files["README.md"].read().decode().split("---\n")[1])
    assert (front["library_name"], front["base_model_relation"]) == ("peft", "adapter")
    code = commit.files["README.md"].read().decode().split("```python\n")[1].split("```")[0]
    blocked = "import sys\nsys.modules['dllm_convert'] = None\n"
    env = hub.environment(tmp_path / "stranger", TOKEN)
    said = run_python(blocked + code, env=env, modules=forks.STRANGER_WITH_PEFT)
    assert said.startswith("The meaning of a name")


def test_nothing_is_done_for_somebody_who_cannot_push(
    hub: LoopbackHub, run: Callable[..., Done], tmp_path: Path
) -> None:
    done = run("--push-to-hub", REPO, token=None)
    assert done.code == 1 and "not logged in" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_licence_wants(
    hub: LoopbackHub, run: Callable[..., Done], tmp_path: Path
) -> None:
    shown = run("--push-to-hub", REPO, "--public", "--dry-run", "--json", token=None)
    assert shown.json["publication"]["repository"] == REPO
    assert shown.json["publication"]["visibility"] == "public"
    card = hub.repos[BASE] / "README.md"
    card.write_text("---\nlicense: llama3.2\n---\n# Base\n")
    refused = run("--push-to-hub", REPO, "--dry-run", token=None)
    assert refused.code == 3 and "Push to me/Llama-" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("--revision", "x"), ("--public",), ("--private",), ("--create-pr",)]
)
def test_publishing_options_need_a_repository(
    run: Callable[..., Done], arguments: tuple[str, ...]
) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert "needs --push-to-hub" in " ".join(done.stderr.replace("│", " ").split())
