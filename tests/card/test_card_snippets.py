"""The snippets of a card are run, as a stranger would: from the Hub, without this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
import torch
from conversion import convert
from hub_server import COMMIT, LoopbackHub, run_python, serve
from pushing import checkpoint

from dllm_convert.card.readme import write_card
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, read_manifest, write_manifest
from dllm_convert.publishing.adapter import adapter_checkpoint
from dllm_convert.sampling import DEFAULT_PROMPT

STRANGER = "import sys; sys.modules['dllm_convert'] = None\n"
Sources = Callable[..., Path]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with serve(LoopbackHub()) as running:
        yield running


def snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def run(hub: LoopbackHub, home: Path, code: str, *arguments: str) -> str:
    env = hub.environment(home) | {"OMP_NUM_THREADS": "1"}
    return run_python(STRANGER + code, *arguments, env=env, modules=forks.STRANGER_WITH_PEFT)


COMPARE = """
import transformers
auto = getattr(transformers, sys.argv[1])
whole = auto.from_pretrained(checkpoint, trust_remote_code=True).eval()
with torch.no_grad():
    print("difference", float((whole(tokens).logits - logits).abs().max()))
"""


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "bd3lm"), ("qwen3", "mdlm"), ("bert", "mdlm")]
)
def test_both_snippets(
    source_cache: Sources, hub: LoopbackHub, tmp_path: Path, family: str, target: str
) -> None:
    folder = checkpoint(source_cache(family), tmp_path / "converted", target)
    hub.repos["me/converted"] = folder
    card = write_card(folder, repo_id="me/converted").read_text()
    own, stock = snippets(card)
    assert run(hub, tmp_path / "home", own).lower().startswith(DEFAULT_PROMPT.lower())
    auto = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM"
    printed = run(hub, tmp_path / "home", stock + COMPARE, auto)
    (length,) = re.findall(r"tokens \(1, (\d+)\)", printed)
    (logits,) = re.findall(r"logits \(1, (\d+), \d+\)", printed)
    assert int(length) == int(logits) > 8
    assert ("mask (1, 1, " in printed) == (target == "bd3lm")
    assert "first guess at the masked tokens:" in printed
    assert float(printed.split("difference")[1]) < 1e-5


def lora_checkpoint(base: Path, folder: Path, *, embeddings: str) -> Path:
    """Write a checkpoint trained with LoRA, its adapter beside the merged weights."""
    from dllm_convert.modeling.loading import load_model
    from dllm_convert.training.setup import make_trainable
    from dllm_convert.training.writing import write_trained

    training = {
        "method": "lora",
        "keep_adapter": True,
        "lora": {"rank": 4, "embeddings": embeddings},
    }
    made = checkpoint(base, folder.with_name("untrained"), "bd3lm")
    plan = convert(base, folder.with_name("again"), "bd3lm", training=training)
    model = make_trainable(load_model(made, plan.adapter), plan.adapter, plan.recipe.training)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    write_trained(model, made, folder, plan)
    manifest = read_manifest(folder)
    source = manifest["source"] | {"kind": "hub", "repo_id": "org/base", "revision": COMMIT}
    files = hash_files(folder, exclude=(MANIFEST_FILE, "README.md"))
    write_manifest(folder, manifest | {"source": source, "files": files})
    return folder


COMPARE_ADAPTER = """
import torch
whole = diffusion.from_pretrained("me/whole").eval()
with torch.no_grad():
    print("difference", float((whole(output).logits - model(output).logits).abs().max()))
same = whole.generate(prompt, max_new_tokens=32)
print("same text", torch.equal(same, output))
"""


@pytest.mark.parametrize(
    ("family", "embeddings", "options"),
    [("llama", "full", {}), ("llama", "mask_row", {"tied": True}), ("qwen3", "full", {})],
)
def test_the_snippet_of_an_adapter(
    source_cache: Sources,
    hub: LoopbackHub,
    tmp_path: Path,
    family: str,
    embeddings: str,
    options: dict[str, bool],
) -> None:
    base = source_cache(family, **options)
    whole = lora_checkpoint(base, tmp_path / "whole", embeddings=embeddings)
    adapter_checkpoint(whole, tmp_path / "adapter", Reporter(quiet=True))
    card = write_card(tmp_path / "adapter", repo_id="me/adapter").read_text()
    hub.repos |= {"org/base": base, "me/adapter": tmp_path / "adapter", "me/whole": whole}
    (snippet,) = snippets(card)
    assert f'revision="{COMMIT}"' in snippet
    output = run(hub, tmp_path / "home", snippet + COMPARE_ADAPTER)
    assert float(re.findall(r"difference (\S+)", output)[0]) < 1e-5
    assert "same text True" in output
