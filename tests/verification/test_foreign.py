"""Third-party layouts: recognised, read without their code, and faults in them are caught."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from foreign_cases import A2D, NAMES, WEIGHTS, edit_json, make_foreign, own_code
from hub_server import LoopbackHub, run_python, serve
from safetensors.torch import load_file, save_file

from dllm_convert.errors import DataError, IncompatibleError, UnsupportedError
from dllm_convert.verification import GROUPS, Probe, verify_checkpoint
from dllm_convert.verification.foreign import all_layouts, find_layout

SourceFactory = Callable[..., Path]
OWN_CODE = {"own-code-attention", "own-code-logits"}
COMPUTED = {
    *("claim", "weights", "index", "dtypes", "finite"),
    *("mask-id", "mask-row", "mask-text", "tokenizer", "generation-config"),
    *("attention-sdpa", "attention-eager", "attention-layers", "attention-flex"),
    *("gradient", "gradient-layers", "training-mask", "training-influence", "packed"),
    *("padding-left", "padding-right", "batch", "implementations"),
    *("generate", "generate-end", "generate-batch", "block-one"),
}


def verify(folder: Path, groups: Collection[str] = GROUPS, **options: Any) -> dict[str, Probe]:
    report = verify_checkpoint(folder, groups=groups, **options)
    return {probe.name: probe for probe in report.probes}


def failed(probes: dict[str, Probe]) -> dict[str, str]:
    return {p.name: f"{p.measured}; {p.detail}" for p in probes.values() if p.passed is False}


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_instance_passes_and_its_code_stays_asleep(
    source_factory: SourceFactory, name: str
) -> None:
    folder = make_foreign(source_factory, name)
    marker = own_code(folder, name)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    probes = verify(folder)

    assert failed(probes) == {}
    passed = {probe.name for probe in probes.values() if probe.passed}
    assert passed == COMPUTED | ({"cache", "cache-clean"} if name == "SDAR" else set())
    assert not marker.exists()
    assert all(probes[probe].passed is None for probe in OWN_CODE)
    assert "--trust-remote-code" in probes["own-code-attention"].detail
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["Dream", "LLaDA", "SDAR"])
def test_its_own_code_runs_when_it_is_trusted_and_agrees_with_ours(
    source_factory: SourceFactory, name: str
) -> None:
    folder = make_foreign(source_factory, name)
    marker = own_code(folder, name)

    probes = verify(folder, ["files", "tokens", "portability"], trust_remote_code=True)

    assert failed(probes) == {}
    assert all(probes[probe].passed for probe in OWN_CODE)
    assert marker.exists()


def test_blocks_that_only_the_user_knows_of(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "a2d-llama")
    own_code(folder, "a2d-llama")

    probes = verify(
        folder,
        ["files", "tokens", "attention", "cache", "generate", "portability"],
        block_size=5,
        trust_remote_code=True,
    )

    assert failed(probes) == {}
    assert "blocks of 5 (--block)" in probes["claim"].measured
    assert probes["cache"].passed and probes["own-code-attention"].passed


@pytest.mark.parametrize(("name", "family"), [("a2d-qwen3", "qwen3"), ("Dream", "qwen2")])
def test_against_the_base_it_was_made_from(
    source_factory: SourceFactory, source_cache: SourceFactory, name: str, family: str
) -> None:
    folder = make_foreign(source_factory, name)
    base = source_cache(family, vocab_padding=24)

    probes = verify(folder, ["files", "tokens", "base"], against=base, untrained=True)

    assert failed(probes) == {}
    assert probes["base-tensors"].passed and probes["base-logits"].passed


def test_block_size_of_the_config_is_the_claim(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "SDAR")
    assert "blocks of 4 (its sampler's default" in verify(folder, ["files"])["claim"].measured
    edit_json(folder / "config.json", lambda config: config.update(block_size=8))
    assert "blocks of 8 (config.json)" in verify(folder, ["files"])["claim"].measured
    with pytest.raises(IncompatibleError, match="--block 4"):
        verify(folder, block_size=4)


def test_blocks_for_a_layout_without_them(source_factory: SourceFactory) -> None:
    with pytest.raises(IncompatibleError, match="Leave --block out"):
        verify(make_foreign(source_factory, "Dream"), block_size=4)


# Faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", A2D)
def test_mask_token_added_behind_the_last_row(source_factory: SourceFactory, name: str) -> None:
    """dLLM on Llama 3: the tokenizer grows to 128257 tokens, the embedding stays at 128256 rows."""
    folder = make_foreign(source_factory, name)
    tensors = load_file(folder / WEIGHTS)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    rows = max(token["id"] for token in tokenizer["added_tokens"])
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:rows].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=rows))

    wrong = failed(verify(folder, ["files", "tokens"]))

    assert wrong.keys() == {"claim", "mask-id", "mask-row", "tokenizer"}
    assert f"mask id {rows} is outside the embedding of {rows} rows" in wrong["claim"]


def test_tokenizer_without_a_mask_token(
    source_factory: SourceFactory, source_cache: SourceFactory
) -> None:
    folder = make_foreign(source_factory, "a2d-qwen2")
    base = source_cache("qwen2", vocab_padding=24)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((base / file).read_bytes())

    wrong = failed(verify(folder, ["files", "tokens"]))

    assert wrong.keys() == {"claim", "mask-id", "tokenizer"}
    assert "no mask token" in wrong["claim"]


def test_mask_ids_that_disagree(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "SDAR")
    edit_json(folder / "config.json", lambda c: c.update(mask_token_id=c["mask_token_id"] - 1))
    wrong = failed(verify(folder, ["files", "tokens"]))
    assert {"claim", "mask-id"} <= wrong.keys()
    assert "the tokenizer has mask id" in wrong["claim"]


def test_causal_code_under_a_diffusion_label(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "a2d-llama")
    own_code(folder, "a2d-llama", causal=True)

    wrong = failed(verify(folder, ["files", "portability"], trust_remote_code=True))

    assert wrong.keys() == OWN_CODE
    assert "position 0 does not see token" in wrong["own-code-attention"]


def test_causal_config_under_a_diffusion_label(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "Dream")
    edit_json(folder / "config.json", lambda config: config.update(is_causal=True))
    assert "is_causal true" in failed(verify(folder, ["files"]))["claim"]


@pytest.mark.parametrize("name", ["LLaDA", "SDAR"])
def test_missing_and_broken_weights(source_factory: SourceFactory, name: str) -> None:
    folder = make_foreign(source_factory, name)
    tensors = load_file(folder / WEIGHTS)
    dropped = next(key for key in tensors if key.endswith("up_proj.weight"))
    save_file({k: t for k, t in tensors.items() if k != dropped}, folder / WEIGHTS)
    assert "up_proj.weight is missing" in failed(verify(folder, ["files"]))["weights"]

    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    assert failed(verify(folder)).keys() == {"weights"}


def test_value_that_is_not_finite(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "LLaDA")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.transformer.ln_f.weight"][3] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert failed(verify(folder, ["files"])).keys() == {"finite"}


def test_own_code_that_does_not_run(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "a2d-qwen2")
    own_code(folder, "a2d-qwen2")
    path = folder / "modeling_own.py"
    path.write_text(path.read_text() + "\nraise RuntimeError('written for another release')\n")
    wrong = failed(verify(folder, ["files", "tokens", "portability"], trust_remote_code=True))
    assert wrong.keys() == {"own-code-attention"}
    assert "written for another release" in wrong["own-code-attention"]


def test_own_code_that_needs_what_is_not_installed(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "SDAR")
    own_code(folder, "SDAR")
    path = folder / "modeling_own.py"
    path.write_text("import flash_attn_of_nobody\n" + path.read_text())
    probes = verify(folder, ["files", "tokens", "portability"], trust_remote_code=True)
    assert failed(probes) == {}
    assert all("flash_attn_of_nobody" in probes[probe].detail for probe in OWN_CODE)


# What no class computes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"block_type": "sequential"}, {"include_bias": True}, {"rope": 1}]
)
def test_llada_with_other_blocks_is_read_and_not_computed(
    source_factory: SourceFactory, change: dict[str, Any]
) -> None:
    folder = make_foreign(source_factory, "LLaDA")
    edit_json(folder / "config.json", lambda config: config.update(change))

    probes = verify(folder)

    assert failed(probes) == {}
    passed = {probe.name for probe in probes.values() if probe.passed}
    assert passed == {
        *("claim", "weights", "index", "dtypes", "finite"),
        *("mask-id", "mask-row", "mask-text", "tokenizer", "generation-config"),
    }
    key = next(iter(change))
    assert all(key in probes[g].detail for g in ("attention", "base", "cache", "generate"))


def test_own_code_of_what_no_class_computes(source_factory: SourceFactory) -> None:
    folder = make_foreign(source_factory, "LLaDA")
    own_code(folder, "LLaDA")
    edit_json(folder / "config.json", lambda config: config.update(block_group_size=2))

    probes = verify(folder, ["files", "tokens", "portability"], trust_remote_code=True)

    assert failed(probes) == {}
    assert probes["own-code-attention"].passed
    assert "block_group_size is 2" in probes["own-code-logits"].detail


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "a2d-qwen3"}, "a2d-qwen3"),
        ({"model_type": "Dream", "architectures": ["DreamModel"]}, "Dream"),
        ({"model_type": "Dream", "architectures": ["DreamForCausalLM"]}, None),
        ({"model_type": "llada", "architectures": ["LLaDAModelLM"]}, "LLaDA"),
        ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "LLaDA-MoE"),
        ({"model_type": "llada2_moe"}, "LLaDA 2"),
        ({"model_type": "sdar"}, "SDAR"),
        ({"model_type": "sdar_moe"}, "SDAR-MoE"),
        ({"model_type": "llama"}, None),
        ({}, None),
    ],
)
def test_recognition(config: dict[str, Any], name: str | None) -> None:
    found = find_layout(config)
    assert (found and found.name) == name


def test_layouts_are_distinct_and_documented() -> None:
    names = [layout.name for layout in all_layouts()]
    assert len(set(names)) == len(names)
    page = (Path(__file__).parents[2] / "docs" / "third-party.md").read_text()
    assert [name for name in names if f"| {name} |" not in page] == []


def test_unknown_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobodys-diffusion"}))
    with pytest.raises(UnsupportedError, match="nobodys-diffusion"):
        verify(tmp_path)


# Hub ids -------------------------------------------------------------------------------------

COMMAND = "import sys; from dllm_convert.cli.app import main; sys.exit(main())"
REFUSED = """
import sys
from dllm_convert.errors import DllmConvertError
from dllm_convert.verification import verify_checkpoint
for checkpoint, revision in (("someone/sdar", "no-such"), ("someone/nothing", None)):
    try:
        verify_checkpoint(checkpoint, revision=revision)
    except DllmConvertError as error:
        print(type(error).__name__, error.exit_code, error)
"""


def test_a_hub_id_is_downloaded_and_probed(source_factory: SourceFactory, tmp_path: Path) -> None:
    folder = make_foreign(source_factory, "SDAR")
    marker = own_code(folder, "SDAR")
    with serve(LoopbackHub(repos={"someone/sdar": folder})) as hub:
        env = hub.environment(tmp_path / "home")
        arguments = (COMMAND, "verify", "someone/sdar", "--json")
        report = json.loads(run_python(*arguments, env=env, modules=forks.PACKAGE))
        refused = run_python(REFUSED, env=env, modules=forks.PACKAGE).splitlines()

    assert report["passed"]
    probes = {probe["name"]: probe for probe in report["probes"]}
    assert probes["claim"]["passed"] and probes["attention-sdpa"]["passed"]
    assert not marker.exists()
    assert "modeling_own.py was not run" in probes["own-code-attention"]["detail"]
    assert refused[0].startswith("HubError 1 someone/sdar has no revision 'no-such'")
    assert refused[1].startswith("HubError 1 someone/nothing is not on the Hub")


def test_revision_of_a_folder(source_factory: SourceFactory) -> None:
    with pytest.raises(DataError, match="is a folder, which has no revision"):
        verify(make_foreign(source_factory, "SDAR"), revision="main")


@pytest.mark.parametrize("given", ["nowhere", "./nowhere", "/no/where", "a//b", "../a"])
def test_what_is_neither_a_folder_nor_a_hub_id(given: str) -> None:
    with pytest.raises(DataError, match="not a folder, and is not a Hub id"):
        verify_checkpoint(given)
