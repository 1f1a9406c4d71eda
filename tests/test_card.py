"""The model card: true, complete, well formed, and its snippet runs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conversion import convert
from huggingface_hub import ModelCard

from dllm_convert.card import render_card, write_card
from dllm_convert.errors import DataError
from dllm_convert.manifest import versions, write_manifest
from dllm_convert.plan import ConversionPlan, plan_as_dict

Manifest = dict[str, Any]

ALWAYS = ["Use", "The model", "Training", "Limits", "Reproduce", "Licence", "Citation"]
TRAINED = [
    *("Use", "The model", "Training", "Measured on held-out text", "A sample", "Verification"),
    *("Limits", "Reproduce", "Licence", "Citation"),
]


def manifest_of(plan: ConversionPlan, **changes: Any) -> Manifest:
    """Return what an untrained run would record."""
    source = plan.source
    manifest = {
        "format_version": 1,
        "created": "2026-11-23T22:30:00+00:00",
        "dllm_convert": "0.1.0",
        "versions": versions(),
        "source": {
            "given": source.given,
            "kind": source.kind,
            "repo_id": source.repo_id,
            "revision": source.revision,
            "license": source.license,
            "model_type": source.model_type,
            "parameters": source.parameters,
            "fingerprint": dict(source.fingerprint),
        },
        "recipe": plan.recipe.model_dump(mode="json"),
        "plan": plan_as_dict(plan),
        "stages": [],
        "measurements": {},
        "sample": None,
    }
    return json.loads(json.dumps({**manifest, **changes}))  # type: ignore[no-any-return]


def trained(manifest: Manifest, method: str = "full") -> Manifest:
    """Add what training, measuring and verifying record."""
    result = copy.deepcopy(manifest)
    result["recipe"]["training"]["method"] = method
    result["measurements"] = {
        "data": {
            "source": "pydoc",
            "documents": 70,
            "held_out_documents": 7,
            "train_tokens": 51234,
            "held_out_tokens": 1987,
        },
        "nelbo_before": {"nats_per_token": 8.25, "stderr": 0.125, "tokens": 1987},
        "nelbo_after": {"nats_per_token": 5.5, "stderr": 0.0625, "tokens": 1987},
        "ar_nll": {"nats_per_token": 3.25, "stderr": 0.03125, "tokens": 1987},
        "train": {
            "method": method,
            "steps": 40,
            "tokens": 20480,
            "seconds": 131.4,
            "trainable_parameters": 134515008,
            "final_loss": 5.43,
            "stopped": "steps",
        },
    }
    result["sample"] = {
        "prompt": "A name is",
        "text": " bound | to `an` object.\n```\n",
        "new_tokens": 9,
        "forwards": 4,
        "tokens_per_forward": 2.25,
        "seconds": 0.5,
    }
    result["verification"] = {
        "passed": True,
        "seconds": 41.0,
        "probes": [
            probe("weights", True, "0 of 21 tensors wrong", "0 missing"),
            probe("base-logits", None, "not measured", "0", "the weights were trained"),
            probe("cache", True, "a | b", "at most 0.0001"),
        ],
    }
    return result


def probe(
    name: str, passed: bool | None, measured: str, required: str, detail: str = ""
) -> dict[str, Any]:
    return {
        "name": name,
        "passed": passed,
        "measured": measured,
        "required": required,
        "detail": detail,
    }


@pytest.fixture(scope="session")
def conversions(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, ConversionPlan]]:
    root = tmp_path_factory.mktemp("cards")
    built: dict[tuple[str, str], tuple[Path, ConversionPlan]] = {}

    def get(family: str, target: str) -> tuple[Path, ConversionPlan]:
        if (family, target) not in built:
            folder = root / f"{family}-{target}"
            built[family, target] = folder, convert(source_cache(family), folder, target)
        return built[family, target]

    return get


@pytest.fixture(params=[("llama", "bd3lm"), ("qwen3", "mdlm"), ("bert", "mdlm")], ids="-".join)
def case(request: pytest.FixtureRequest, conversions: Any) -> tuple[Path, Manifest]:
    folder, plan = conversions(*request.param)
    return folder, manifest_of(plan)


@pytest.fixture
def llama(conversions: Any) -> tuple[Path, Manifest]:
    folder, plan = conversions("llama", "bd3lm")
    return folder, manifest_of(plan)


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def without_code(card: str) -> str:
    return re.sub(r"^(`{3,}).*?^\1$", "", body(card), flags=re.MULTILINE | re.DOTALL)


def sections(card: str) -> dict[str, str]:
    prose = re.sub(
        r"^(`{3,}).*?^\1$",
        lambda found: found.group().replace("\n#", "\n "),
        body(card),
        flags=re.MULTILINE | re.DOTALL,
    )
    parts = re.split(r"^## (.+)$", prose, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def front(card: str) -> Manifest:
    return dict(yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n")))


def snippet(card: str) -> str:
    found = re.search(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def check_form(card: str) -> None:
    """What holds for every card, whatever its facts."""
    assert card.startswith("---\n")
    assert card.endswith("\n")
    assert "\n\n\n" not in card
    assert not re.search(r"[ \t]+$", without_code(card), re.MULTILINE)
    for word in ("None", "nan", "TODO", "More Information", "{{", "{%", "undefined", "True of"):
        assert word not in without_code(card), word
    for name, text in sections(card).items():
        assert len(text.split()) > 3, f"section {name} is empty"
    for table in re.findall(r"(?:^\|.*\n)+", without_code(card), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)]*)\)", without_code(card)):
        assert text
        assert re.fullmatch(r"https://[\w./:-]+|[\w.-]+", link), link
    assert without_code(card).count("](") == len(re.findall(r"\[[^\]]*\]\(", without_code(card)))
    metadata = ModelCard(card).data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert all(value not in (None, "", []) for value in metadata.values())


def test_untrained_card_is_well_formed(case: tuple[Path, Manifest]) -> None:
    card = render_card(*case)
    check_form(card)
    assert list(sections(card)) == ALWAYS
    assert "not trained" in card
    assert "Not verified" in card


def test_trained_card_is_well_formed(case: tuple[Path, Manifest]) -> None:
    folder, manifest = case
    card = render_card(folder, trained(manifest))
    check_form(card)
    assert list(sections(card)) == TRAINED
    assert "Not verified" not in card
    assert "Verification failed" not in card


def test_numbers_are_those_of_the_run(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    card = render_card(folder, trained(manifest))
    assert "| NELBO before training | 8.25 ± 0.12 | 3828 | 1,987 |" in card
    assert "| NELBO after training | 5.5 ± 0.062 | 244.7 | 1,987 |" in card
    assert "| NLL of the base, autoregressive | 3.25 ± 0.031 | 25.79 | 1,987 |" in card
    assert "40 optimizer steps, 20,480 tokens, 2 min 11 s" in card
    assert "2.25 nats per token above the base's" in card
    assert "2 of 3 checks passed, 1 not run" in card
    assert "id 384" in sections(card)["The model"]


def test_encoder_has_no_autoregressive_baseline(conversions: Any) -> None:
    folder, plan = conversions("bert", "mdlm")
    manifest = trained(manifest_of(plan))
    del manifest["measurements"]["ar_nll"]
    card = render_card(folder, manifest)
    check_form(card)
    assert "autoregressive |" not in card
    assert front(card)["pipeline_tag"] == "fill-mask"


def test_front_matter_of_a_hub_source(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    manifest["source"] |= {
        "kind": "hub",
        "given": "org/Base-1B",
        "repo_id": "org/Base-1B",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "license": "apache-2.0",
        "language": ["en"],
    }
    manifest["recipe"]["source"] = "org/Base-1B"
    manifest = trained(manifest)
    manifest["measurements"]["data"] |= {"source": "org/some-text", "kind": "hub"}
    card = render_card(folder, manifest)
    check_form(card)
    assert front(card) == {
        "language": ["en"],
        "license": "apache-2.0",
        "base_model": "org/Base-1B",
        "base_model_relation": "finetune",
        "datasets": ["org/some-text"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dllm-convert", "diffusion", "block-diffusion", "bd3lm", "custom_code"],
    }
    assert "# Base-1B-bd3lm-8" in card
    assert "0123456789abcdef" in card


def test_local_source_names_no_base_model_and_no_path(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    manifest = trained(manifest)
    manifest["recipe"]["data"]["source"] = "/home/somebody/texts/a.txt,/home/somebody/b.md"
    manifest["measurements"]["data"]["source"] = "/home/somebody/texts/a.txt,/home/somebody/b.md"
    card = render_card(folder, manifest)
    check_form(card)
    assert not {"base_model", "base_model_relation", "datasets", "license"} & front(card).keys()
    assert "somebody" not in card
    assert str(Path(manifest["source"]["given"]).parent) not in card
    assert "`a.txt`, `b.md`" in card
    assert "not recorded" in sections(card)["Licence"]
    assert "[LICENSE](LICENSE)" in sections(card)["Licence"]


def test_gguf_source(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    manifest["source"] |= {
        "kind": "gguf",
        "given": "/downloads/SmolLM2-135M-Instruct.Q4_1.gguf",
        "license": "apache-2.0",
        "fingerprint": {"sha256": "b179c952" * 8},
    }
    manifest["recipe"]["source"] = "/downloads/SmolLM2-135M-Instruct.Q4_1.gguf"
    card = render_card(folder, trained(manifest))
    check_form(card)
    assert "# SmolLM2-135M-Instruct.Q4_1-bd3lm-8" in card
    assert "b179c952" in card
    assert "/downloads" not in card
    assert front(card)["license"] == "apache-2.0"


def test_failed_verification_comes_first(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    manifest = trained(manifest)
    manifest["verification"]["passed"] = False
    manifest["verification"]["probes"].append(
        probe("attention-eager", False, "3 of 400 pairs wrong", "0 pairs", "position 1 sees 2")
    )
    card = render_card(folder, manifest)
    check_form(card)
    first = body(card).split("\n\n")[1]
    assert first.startswith("\n> **Verification failed.**") or first.startswith("> **Verification")
    assert "3 of 400 pairs wrong" in first
    assert "position 1 sees 2" in first
    assert "1 failed" in sections(card)["Verification"]


def test_lora_is_named_and_cited(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    card = render_card(folder, trained(manifest, "lora"))
    assert "LoRA of rank 64" in card
    assert "2106.09685" in card
    assert "2106.09685" not in render_card(folder, trained(manifest))


def test_training_cut_short_says_so(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    manifest = trained(manifest)
    manifest["measurements"]["train"]["stopped"] = "time"
    assert "stopped by the time limit" in render_card(folder, manifest)


@pytest.mark.parametrize("stderr", [None, float("inf")])
def test_unknown_spread_is_left_out(llama: tuple[Path, Manifest], stderr: float | None) -> None:
    folder, manifest = llama
    manifest = trained(manifest)
    for name in ("nelbo_before", "nelbo_after", "ar_nll"):
        manifest["measurements"][name]["stderr"] = stderr
    card = render_card(folder, manifest)
    check_form(card)
    assert "±" not in card
    assert "inf" not in without_code(card).split("## Limits")[0].split("Measured")[1][:300]


def test_methods_are_cited(conversions: Any) -> None:
    for (family, target), both in ((("llama", "bd3lm"), True), (("qwen3", "mdlm"), False)):
        folder, plan = conversions(family, target)
        cited = sections(render_card(folder, manifest_of(plan)))["Citation"]
        assert "https://arxiv.org/abs/2406.07524" in cited
        assert ("https://arxiv.org/abs/2503.09573" in cited) == both


def test_recipe_in_the_card_loads(llama: tuple[Path, Manifest], tmp_path: Path) -> None:
    from dllm_convert.recipe import load_recipe

    folder, manifest = llama
    card = render_card(folder, manifest)
    found = re.search(r"^```yaml\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert found
    path = tmp_path / "recipe.yaml"
    path.write_text(found[1])
    recipe = load_recipe(str(path), overrides={})
    expected = manifest["recipe"] | {"source": Path(manifest["source"]["given"]).name}
    assert {**recipe.model_dump(mode="json"), "name": None} == expected


def test_text_cannot_break_out_of_its_block(llama: tuple[Path, Manifest]) -> None:
    folder, manifest = llama
    manifest = trained(manifest)
    manifest["sample"]["text"] = "\n```\n## Not a section\n````\n| a |"
    manifest["sample"]["prompt"] = 'say "hi" \\ to {{ me }}'
    card = render_card(folder, manifest)
    assert list(sections(card)) == TRAINED
    compile(snippet(card), "snippet", "exec")
    assert 'say "hi" \\\\ to {{ me }}' in snippet(card)


def test_written_card(llama: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = llama
    write_manifest(tmp_path, manifest)
    path = write_card(tmp_path)
    assert path == tmp_path / "README.md"
    path.write_text("mine")
    assert write_card(tmp_path, overwrite=False).read_text() == "mine"
    assert write_card(tmp_path).read_text().startswith("---\n")
    assert {item.name for item in tmp_path.iterdir()} == {"README.md", "dllm_convert.json"}


def test_no_card_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dllm_convert\.json"):
        write_card(tmp_path)


@pytest.mark.parametrize("key", ["plan", "source", "recipe"])
def test_incomplete_manifest(llama: tuple[Path, Manifest], tmp_path: Path, key: str) -> None:
    _, manifest = llama
    del manifest[key]
    write_manifest(tmp_path, manifest)
    with pytest.raises(DataError, match=key):
        write_card(tmp_path)


def test_snippet_runs_without_the_package(case: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = case
    blocked = "import sys; sys.modules['dllm_convert'] = None\n"
    script = tmp_path / "snippet.py"
    script.write_text(blocked + snippet(render_card(folder, manifest)))
    result = subprocess.run(
        [sys.executable, "-I", str(script)],
        cwd=folder,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) > 3
