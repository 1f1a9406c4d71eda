"""Settings of decoding from where a person gives them: the command line, and a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from conversion import convert, converted_once, sample

from dllm_convert.cli.commands import decoding
from dllm_convert.modeling.published.options import ORDERS, REMASKING, SAMPLERS, DecodingOptions
from dllm_convert.recipe.decoding import Order, Remasking, Sampler
from dllm_convert.recipe.fields import fields_of
from dllm_convert.sampling.checking import check_decoding

CASES = {"llama": "bd3lm", "mistral": "mdlm", "bert": "mdlm", "roberta": "mdlm"}
DRAWN = ("--temperature", "1", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3")
SETTINGS = {
    "drawn": (DRAWN, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
    "margin": (
        ("--unmasking", "margin", "--entropy-bound", "2", "--guidance-scale", "2"),
        {"unmasking": "margin", "entropy_bound": 2.0, "guidance_scale": 2.0},
    ),
    "remasked": (
        ("--remasking", "random", "--remasking-ratio", "0.5", "--steps", "6", "--seed", "3"),
        {"remasking": "random", "remasking_ratio": 0.5, "max_denoising_steps": 6},
    ),
    "ancestral": (
        ("--sampler", "ancestral", "--temperature", "1", "--steps", "4", "--seed", "3"),
        {"sampler": "ancestral", "temperature": 1.0, "max_denoising_steps": 4},
    ),
    "windows": (
        ("--block-length", "4", "--approximate-cache"),
        {"block_length": 4, "approximate_cache": True},
    ),
}

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Get:
    return converted_once(source_cache, tmp_path_factory.mktemp, CASES)


def test_names_are_those_of_decoding() -> None:
    assert get_args(Order) == ORDERS
    assert get_args(Remasking) == REMASKING
    assert get_args(Sampler) == SAMPLERS
    inside = {"mask_token_id", "block_size", "token_shift", "eos_token_ids", "pad_token_id"}
    inside |= {"seeds", "noise_tokens", "noising", "causal_context", "suppress_tokens"}
    inside |= {"num_return_sequences", "rules", "stops"}
    settings = {field.name for field in fields(DecodingOptions)} - inside
    assert decoding.FLAGS.keys() == settings
    assert set(fields_of("generation")) == settings


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        *(("llama", "drawn"), ("llama", "remasked"), ("llama", "windows"), ("mistral", "drawn")),
        *(("llama", "ancestral"), ("bert", "ancestral")),
        *(("mistral", "margin"), ("bert", "remasked"), ("bert", "windows"), ("roberta", "margin")),
    ],
)
def test_every_option_reaches_the_model(checkpoint: Get, family: str, setting: str) -> None:
    from dllm_convert.modeling.loading import load_checkpoint
    from dllm_convert.sampling.run import decode_sample

    options, settings = SETTINGS[setting]
    folder = checkpoint(family)
    if CASES[family] == "bd3lm" and setting == "windows":
        assert "--block-length and --approximate-cache are for MDLM" in " ".join(
            sample(folder, *options, code=2).stderr.replace("│", "").split()
        )
        return
    found = json.loads(sample(folder, "--prompt", "A name", *options, "--json").stdout)
    loaded = load_checkpoint(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    given: dict[str, Any] = {"seed": 3 if "--seed" in options else None, "max_new_tokens": 12}
    right = decode_sample(model, tokenizer, "A name", **given, **settings)
    assert found | {"seconds": 0} == right.as_dict() | {"seconds": 0}
    plain = decode_sample(model, tokenizer, "A name", **given)
    assert (plain.text, plain.forwards) != (right.text, right.forwards)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", ["--top-p", "0.5"], "--top-p does nothing without a --temperature above 0"),
        ("llama", ["--top-k", "3", "--temperature", "0"], "--top-k does nothing"),
        ("bert", ["--approximate-cache"], "--approximate-cache needs --block-length"),
        ("bert", ["--remasking-ratio", "0.2"], "--remasking-ratio does nothing without"),
        ("bert", ["--remasking", "random", "--remasking-ratio", "1"], "--remasking-ratio is 1.0"),
        ("bert", ["--remasking", "random", "--block-length", "4"], "do not go together"),
        ("llama", ["--unmasking", "best"], "Invalid value for '--unmasking'"),
        ("llama", ["--sampler", "ancestral"], "--sampler draws every token: give a --temperature"),
        (
            "llama",
            ["--sampler", "ancestral", "--temperature", "1", "--threshold", "0.9"],
            "--threshold does nothing beside --sampler",
        ),
        (
            "bert",
            ["--sampler", "ancestral", "--temperature", "1", "--remasking", "random"],
            "--remasking and --sampler do not go together",
        ),
        ("llama", ["--top-k", "0"], "Invalid value for '--top-k'"),
        ("llama", ["--min-p", "1.5"], "Invalid value for '--min-p'"),
        ("llama", ["--entropy-bound", "-1"], "Invalid value for '--entropy-bound'"),
    ],
)
def test_contradictions_end_before_weights_are_read(
    checkpoint: Get,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: list[str],
    said: str,
) -> None:
    from dllm_convert.sampling import run

    monkeypatch.setattr(run, "run_sample", lambda *_, **__: pytest.fail("it was loaded"))
    folder = checkpoint(family)
    stderr = sample(folder, *options, code=2).stderr
    assert said in " ".join(stderr.replace("│", "").split())


def test_what_a_checkpoint_saved_counts(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    """A temperature in generation_config.json makes `--top-p` mean something."""
    convert(source_cache("llama"), tmp_path / "out", "bd3lm", generation={"temperature": 0.5})
    assert check_decoding(tmp_path / "out", {"top_p": 0.5}) is not None
    with pytest.raises(ValueError, match="top_p does nothing"):
        check_decoding(tmp_path / "out", {"top_p": 0.5, "temperature": 0.0})
    assert check_decoding(tmp_path, {"top_p": 0.5}) is None, "no checkpoint"


SWITCHED_OFF: list[tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = [
    (
        {"sub_block_size": 4},
        {"sampler": "ancestral", "temperature": 1.0},
        "sub_block_size=8 is none",
        {"sub_block_size": 8},
    ),
    ({"sub_block_size": 4}, {"remasking": "random"}, "sub_block_size=8 is", {"sub_block_size": 99}),
    (
        {"remasking": "random"},
        {"sampler": "ancestral", "temperature": 1.0},
        "remasking_ratio=0 is none",
        {"remasking_ratio": 0},
    ),
]


@pytest.mark.parametrize(("saved", "given", "said", "off"), SWITCHED_OFF, ids=str)
def test_what_is_saved_is_switched_off_as_the_refusal_says(
    saved: dict[str, Any],
    given: dict[str, Any],
    said: str,
    off: dict[str, Any],
    source_cache: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    convert(source_cache("llama"), folder, "bd3lm", block=8, generation=saved)
    with pytest.raises(ValueError, match=said):
        check_decoding(folder, given)
    options = check_decoding(folder, {**given, **off})
    assert options is not None
    assert all(getattr(options, name) == value for name, value in given.items())
    assert all(getattr(options, name) is None for name in saved)


@pytest.mark.parametrize("family", ["mistral", "bert", "roberta"])
def test_marks_in_a_prompt_are_written(checkpoint: Get, family: str) -> None:
    folder = checkpoint(family)
    text = "The value of a ___ is bound to the block"
    found = json.loads(sample(folder, "--prompt", text, "--infill", "___", "--json").stdout)
    assert "___" not in found["prompt"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert str(tokenizer.mask_token) not in found["prompt"]
    given = tokenizer.decode(
        tokenizer(text.partition(" ___")[0], add_special_tokens=False).input_ids
    )
    assert found["prompt"].startswith(given)
    assert found["prompt"].endswith("is bound to the block")


def test_a_mark_is_in_the_prompt_and_not_before_everything(
    checkpoint: Get, source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    missing = sample(checkpoint("llama"), "--prompt", "A name", "--infill", "___", code=1)
    assert "the prompt has no '___' to be written" in missing.stderr
    folder = tmp_path / "out"
    convert(source_cache("qwen2"), folder, "bd3lm")  # without a token that begins a text
    first = sample(folder, "--prompt", "___ is a name", "--infill", "___", code=1)
    assert "begins with a mask" in first.stderr


SAVED = {
    "bd3lm": {
        "entropy_bound": 0.5,
        "unmasking": "margin",
        "remasking": "low_confidence",
        "remasking_ratio": 0.25,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.75,
        "min_p": 0.125,
        "guidance_scale": 1.5,
    },
    "mdlm": {"block_length": 8, "approximate_cache": True, "unmasking": "entropy"},
}


@pytest.mark.parametrize(("family", "target"), [("llama", "bd3lm"), ("qwen2", "mdlm")])
def test_a_recipe_saves_them_in_the_checkpoint(
    source_cache: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    from transformers import GenerationConfig

    from dllm_convert.modeling.loading import load_checkpoint

    folder = tmp_path / "out"
    convert(source_cache(family), folder, target, generation=SAVED[target])
    written = json.loads((folder / "generation_config.json").read_text())
    assert SAVED[target].items() <= written.items()
    assert None not in written.values()
    options = check_decoding(folder, {})
    assert {name: getattr(options, name) for name in SAVED[target]} == SAVED[target]
    read = GenerationConfig.from_pretrained(folder)
    read.validate(strict=True)
    assert {name: getattr(read, name) for name in SAVED[target]} == SAVED[target]
    model = load_checkpoint(folder).model
    assert model.generation_config.unmasking == SAVED[target]["unmasking"]
