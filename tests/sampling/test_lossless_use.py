"""Lossless decoding as people ask for it: `sample --lossless`, Python, settings of a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversion import convert, sample
from gated import gated_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_convert as dc
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest, write_manifest
from dllm_convert.errors import DllmConvertError, IncompatibleError, RequestError
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.sampling.checking import check_settings
from dllm_convert.sampling.pairing import check_tokens, verifying_source
from dllm_convert.source.inspect import inspect_source

PROMPT = "The block in which a name is bound"


@pytest.fixture(scope="module")
def gated(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossless") / "gated"
    gated_folder(source_cache("qwen3"), folder)
    return folder


def base_text(folder: Path, new: int) -> str:
    """What the folder writes greedily without our code."""
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = base.generate(ids, max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_the_command_writes_the_bases_text(gated: Path) -> None:
    given = ("--prompt", PROMPT, "--max-new-tokens", "24", "--json")
    found = json.loads(sample(gated, *given, "--lossless").stdout)
    assert found["text"] == base_text(gated, 24)
    assert found["close"] == 0
    assert (
        json.loads(sample(gated, *given, "--verify-with", "base").stdout)["text"] == found["text"]
    )
    denoised = json.loads(sample(gated, *given).stdout)
    assert denoised["text"] != found["text"]
    assert denoised["close"] is None


def test_what_a_checkpoint_has_saved_is_switched_off(gated: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gated, tmp_path / "saved"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "verify_with": "base"}))
    given = ("--prompt", PROMPT, "--max-new-tokens", "24", "--json")
    denoised = json.loads(sample(gated, *given).stdout)["text"]
    assert json.loads(sample(folder, *given).stdout)["text"] == base_text(folder, 24) != denoised
    found = json.loads(sample(folder, *given, "--verify-with", "off").stdout)
    assert (found["text"], found["close"]) == (denoised, None)
    refused = sample(folder, *given, "--lossless", "--verify-with", "off", code=2)
    assert "has none" in " ".join(refused.output.replace("│", " ").split())

    written = dc.sample(folder, PROMPT, max_new_tokens=24, verify_with=None)
    assert written.text == denoised
    model, tokenizer = dc.load(folder)
    assert (
        dc.sample((model, tokenizer), PROMPT, max_new_tokens=24, verify_with=None).text == denoised
    )


def test_python_writes_the_same(gated: Path) -> None:
    one = dc.sample(gated, PROMPT, max_new_tokens=24, lossless=True)
    two = dc.sample(dc.load(gated), [PROMPT], max_new_tokens=24, lossless=True)
    assert one.text == two[0].text == base_text(gated, 24)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--threshold", "0.9"), "--threshold does nothing beside --verify-with"),
        (("--steps", "4"), "--steps does nothing beside --verify-with"),
        (("--remasking", "random"), "leave"),
        (("--verify-with", "self", "--infill", "block"), "left to right"),
    ],
)
def test_what_does_not_go_with_it_is_refused(gated: Path, more: tuple[str, ...], said: str) -> None:
    refused = sample(gated, "--prompt", PROMPT, "--lossless", *more, code=2)
    assert said in " ".join(refused.output.replace("│", " ").split())


def test_a_model_without_a_verifier_says_so(source_cache: Any, tmp_path: Path) -> None:
    convert(source_cache("llama"), tmp_path / "open", "bd3lm", block=8)
    refused = sample(tmp_path / "open", "--lossless", code=1)
    assert "--base" in " ".join(refused.output.replace("│", " ").split())
    refused = sample(tmp_path / "open", "--verify-with", "self", code=2)
    assert "strictly causally" in " ".join(refused.output.replace("│", " ").split())
    # The base wherever it lies; this folder does not say where.
    with pytest.raises(DllmConvertError, match="says nothing of the base"):
        dc.sample(tmp_path / "open", PROMPT, verify_with="base")
    convert(source_cache("llama"), tmp_path / "whole", "mdlm")
    refused = sample(tmp_path / "whole", "--lossless", code=2)
    assert "read the whole text anew" in " ".join(refused.output.replace("│", " ").split())


def test_a_recipe_asks_for_the_verifier_that_it_trains() -> None:
    given: dict[str, Any] = {"target": "bd3lm", "block_size": 8, "generation.verify_with": "self"}
    with pytest.raises(DllmConvertError, match="goes on from clean tokens by itself"):
        load_recipe("smollm2-135m", overrides=given)
    trained = load_recipe("smollm2-135m", overrides={**given, "training.ar_loss_weight": 1.0})
    assert trained.generation.verify_with == "self"
    with pytest.raises(DllmConvertError, match="keep-base"):
        load_recipe("smollm2-135m", overrides={**given, "generation.verify_with": "base"})


@pytest.fixture(scope="module")
def opened(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A conversion whose clean tokens were opened, as `run` writes it, and its base."""
    source = source_cache("qwen3")
    folder = tmp_path_factory.mktemp("two") / "opened"
    quiet = Reporter(quiet=True)
    dc.convert(source, folder, to="bd3lm", block=8, train=False, verify="files", reporter=quiet)
    return folder, source


def stock_text(source: Path, new: int) -> str:
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = base.generate(ids, max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_an_opened_conversion_drafts_for_its_base(opened: tuple[Path, Path]) -> None:
    """The base of the manifest where none is named; by its folder; as a model that is loaded."""
    folder, source = opened
    expected = stock_text(source, 24)
    given = ("--prompt", PROMPT, "--max-new-tokens", "24", "--lossless")
    for base in ((), ("--base", str(source))):
        found = json.loads(sample(folder, *given, *base, "--json").stdout)
        assert found["text"] == expected
        assert 0 < found["verifier_forwards"] <= found["forwards"]
    shown = sample(folder, *given)
    assert f"of {found['forwards']} forwards were its own" in shown.stderr
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    loaded = dc.load(folder)
    for checkpoint in (folder, loaded):
        for base in (model, source):
            one = dc.sample(checkpoint, PROMPT, max_new_tokens=24, lossless=True, base=base)
            assert one.text == expected
    # Thresholds and steps are of the drafts, and leave the text as it is.
    kept = dc.sample(
        folder, PROMPT, max_new_tokens=24, lossless=True, confidence_threshold=0.9,
        max_denoising_steps=2,
    )  # fmt: skip
    assert kept.text == expected


def test_bases_that_do_not_verify_are_refused(
    opened: tuple[Path, Path], gated: Path, source_cache: Any, tmp_path: Path
) -> None:
    folder, source = opened
    given = ("--prompt", PROMPT, "--max-new-tokens", "4")
    cases: list[tuple[Path, tuple[str, ...], int, str]] = [
        (folder, ("--base", str(source)), 2, "--lossless"),
        (
            folder,
            ("--base", str(source), "--lossless", "--verify-with", "self"),
            2,
            "--verify-with",
        ),
        (gated, ("--base", str(source), "--lossless"), 2, "holds its base"),
        (folder, ("--base", str(folder), "--lossless"), 3, "is a diffusion model"),
        (folder, ("--base", str(source_cache("bert")), "--lossless"), 3, "both sides"),
        (folder, ("--base", str(tmp_path / "none"), "--lossless"), 2, "does not exist"),
    ]
    for checkpoint, more, code, said in cases:
        refused = sample(checkpoint, *given, *more, code=code)
        assert said in " ".join(refused.output.replace("│", " ").split()), said
    with pytest.raises(RequestError, match="holds no verifier"):
        dc.sample(dc.load(folder), PROMPT, lossless=True)
    for checkpoint in (folder, dc.load(folder)):
        with pytest.raises(RequestError, match="base is int, expected a folder"):
            dc.sample(checkpoint, PROMPT, lossless=True, base=123)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_pickled_base_is_read_where_the_conversion_was_allowed_to(
    allowed: bool, opened: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its recipe says so for the base that it records; of one that is named nothing does."""
    _, source = opened
    base, folder = tmp_path / "base", tmp_path / "converted"
    shutil.copytree(source, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    shutil.copytree(opened[0], folder)
    manifest = read_manifest(folder)
    manifest["source"] |= {"given": str(base), "repo_id": None, "fingerprint": {}}
    manifest["recipe"]["allow_pickle"] = allowed
    write_manifest(folder, manifest)
    with pytest.raises(IncompatibleError, match="are a pickle") as refused:
        verifying_source(folder, str(base))
    assert "safetensors version of it with --base" in str(refused.value.hint)
    if allowed:
        assert verifying_source(folder, None).files == inspect_source(str(base)).files
    else:
        with pytest.raises(IncompatibleError, match="are a pickle"):
            verifying_source(folder, None)


BESIDE_ANOTHER: list[tuple[dict[str, Any], str]] = [
    ({"unmasking": "margin"}, "unmasking does nothing where another model verifies"),
    ({"entropy_bound": 0.5}, "entropy_bound does nothing where another"),
    ({"sub_block_size": 4}, "sub_block_size does nothing where another"),
    ({"sampler": "ancestral", "temperature": 1.0}, "sampler makes another text"),
    ({"remasking": "random"}, "remasking makes another text"),
    ({"guidance_scale": 2.0}, "guidance_scale makes another text"),
]


@pytest.mark.parametrize("names", [True, False], ids=["named", "recorded"])
@pytest.mark.parametrize(("given", "said"), BESIDE_ANOTHER, ids=lambda value: str(value)[:20])
def test_what_does_nothing_beside_another_model_is_refused(
    opened: tuple[Path, Path],
    given: dict[str, Any],
    said: str,
    names: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As beside the checkpoint's own verifier, and before a model is loaded."""
    from dllm_convert.cli.commands.decoding import FLAGS
    from dllm_convert.sampling import run

    monkeypatch.setattr(run, "load_checkpoint", lambda *_, **__: pytest.fail("it was loaded"))
    folder, source = opened
    base = source if names else None
    with pytest.raises(RequestError, match=said):
        dc.sample(folder, PROMPT, lossless=True, base=base, **given)
    name = said.partition(" ")[0]
    flags = [text for key, value in given.items() for text in (FLAGS[key], str(value))]
    more = () if base is None else ("--base", str(base))
    refused = sample(folder, "--prompt", PROMPT, "--lossless", *more, *flags, code=2)
    shown = " ".join(refused.output.replace("│", " ").split())
    assert said.replace(name, FLAGS[name]) in shown


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"unmasking": "margin", "entropy_bound": 0.5, "verify_with": "self"}, None),
        ({"sampler": "ancestral", "temperature": 1.0}, "sampler makes another text"),
        ({"remasking": "random"}, "remasking makes another text"),
    ],
)
def test_what_a_checkpoint_has_saved_beside_another_model(
    opened: tuple[Path, Path], saved: dict[str, Any], said: str | None
) -> None:
    """What does nothing is left aside; what would make another text is refused."""
    model, _ = dc.load(opened[0])
    config = model.config.to_dict()
    if said is None:
        assert not check_settings(config, saved, {}, other_verifies=True).verify_with
    else:
        with pytest.raises(ValueError, match=said):
            check_settings(config, saved, {}, other_verifies=True)


@pytest.mark.parametrize(
    ("theirs", "fits"),
    [
        ({"a": 0, "b": 1}, True),
        ({"a": 0, "b": 2}, False),
        ({"a": 0, "other": 1}, False),
    ],
)
def test_who_verifies_has_the_same_tokens(theirs: dict[str, int], fits: bool) -> None:
    def knows(words: dict[str, int]) -> Any:
        return SimpleNamespace(get_vocab=lambda: words)

    source: Any = SimpleNamespace(given="other")
    own = knows({"a": 0, "b": 1, "<mask>": 2})
    if fits:
        check_tokens(own, knows(theirs), source)
        return
    with pytest.raises(DllmConvertError, match="another tokenizer"):
        check_tokens(own, knows(theirs), source)
