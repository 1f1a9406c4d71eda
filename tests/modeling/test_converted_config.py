"""What decoding and evaluation believe of config.json is checked before it is computed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from conversion import convert, converted_once, sample
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.json_files import load_json
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.converted_config import check_converted_config
from dllm_convert.source.chat_rendering import chat_text
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.tokenizer_loading import load_tokenizer

TARGETS = {"llama": "bd3lm", "bert": "mdlm"}


@pytest.fixture(scope="module")
def converted(
    source_cache: SourceFactory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    return converted_once(source_cache, tmp_path_factory.mktemp, TARGETS)


def edited(folder: Path, to: Path, path: str, value: Any, file: str = "config.json") -> Path:
    """Copy a folder with one field changed; `...` takes it out."""
    shutil.copytree(folder, to)
    content = json.loads((to / file).read_text())
    *parents, leaf = path.split("/")
    node = content
    for parent in parents:
        node = node[parent]
    node.pop(leaf, None)
    if value is not ...:
        node[leaf] = value
    (to / file).write_text(json.dumps(content))
    return to


@pytest.mark.parametrize("family", TARGETS)
def test_what_a_conversion_writes_is_sound(converted: Callable[[str], Path], family: str) -> None:
    config = json.loads((converted(family) / "config.json").read_text())
    assert check_converted_config(config, converted(family)).model_type == family


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("diffusion/objective", ["bd3lm"]),
        ("diffusion/objective", "ar"),
        ("diffusion/block_size", "8"),
        ("diffusion/block_size", 0),
        ("diffusion/block_size", True),
        ("diffusion/mask_token_id", 448),
        ("diffusion/mask_token_id", -1),
        ("diffusion/mask_token_id", ...),
        ("diffusion/token_shift", 1),
        ("diffusion/attention", "bidirectional"),
        ("diffusion/noise_schedule", {}),
        ("diffusion/noise_kernel", "gaussian"),
        ("diffusion/noise_jumps", 2.0),
        ("diffusion/noise_exponents", [1.0]),
        ("diffusion/noise_classes", [[3]]),
        ("diffusion/context", 5),
        ("mask_token_id", 3),
        ("mask_token_id", True),
        ("block_size", 16),
        ("block_size", ...),
        ("is_causal", True),
        ("is_causal", ...),
        ("vocab_size", ...),
        ("vocab_size", [448]),
        ("hidden_size", 32.0),
        ("eos_token_id", ""),
        ("chunk_size_feed_forward", 3),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "command", [["sample"], ["evaluate", "--data", "pydoc"]], ids=lambda c: c[0]
)
def test_what_contradicts_is_refused(
    converted: Callable[[str], Path], tmp_path: Path, command: list[str], path: str, value: Any
) -> None:
    folder = edited(converted("llama"), tmp_path / "out", path, value)
    found = CliRunner().invoke(app, [command[0], str(folder), *command[1:]])
    assert found.exit_code == 3, found.output
    assert f"config.json: {path.replace('/', '.')} is " in " ".join(found.stderr.split())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe", 5),
        ("recipe/training/method", ["none"]),
        ("plan/mask/write_row", "yes"),
        ("source/given", None),
        ("versions/torch", 2),
        ("verification", []),
        ("verification/probes", {}),
        ("measurements", 0.5),
        ("created", {"a": 1}),
    ],
    ids=str,
)
def test_a_manifest_of_another_form_is_told_by_its_field(
    source_cache: SourceFactory, tmp_path: Path, path: str, value: Any
) -> None:
    from pushing import checkpoint

    checkpoint(source_cache("llama"), tmp_path / "made")
    folder = edited(tmp_path / "made", tmp_path / "out", path, value, "dllm_convert.json")
    for command in (["card"], ["verify", "--files"], ["evaluate", "--data", "pydoc"]):
        found = CliRunner().invoke(app, [command[0], str(folder), *command[1:]])
        assert found.exit_code == 1, (command, found.output)
        assert f"dllm_convert.json: {path.replace('/', '.')} is " in " ".join(found.stderr.split())


def test_a_prompt_with_half_a_character_is_refused(converted: Callable[[str], Path]) -> None:
    found = sample(converted("llama"), "--prompt", "a\udc80b", code=1)
    assert "the prompt is not UTF-8: its character 2 is '\\udc80'" in found.stderr


@pytest.mark.parametrize(
    "options",
    [["--temperature", "1e308", "--min-p", "0.5"], ["--temperature", "1e308"]],
    ids=str,
)
def test_the_hottest_temperature_is_one(
    converted: Callable[[str], Path], options: list[str]
) -> None:
    sample(converted("llama"), "--prompt", "A list", *options)


def test_guidance_that_no_number_holds_is_refused(converted: Callable[[str], Path]) -> None:
    found = sample(converted("llama"), "--prompt", "A", "--guidance-scale", "1e30", code=2)
    assert "0 to 1000" in found.stderr


@pytest.mark.parametrize(
    "template",
    ["{{ 1/0 }}", "{{ messages.x.y }}", "{% for", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
     "{% for i in range(10**9) %}x{% endfor %}", "{{ raise_exception('no') }}",
     "{% break %}", "{% continue %}", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
     "{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{% include 'x' %}"],
)  # fmt: skip
def test_a_template_that_fails_is_told_as_such(source_cache: SourceFactory, template: str) -> None:
    tokenizer = load_tokenizer(source_cache("llama"))
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"the chat template refuses the prompt \(.+\)"):
        chat_text(tokenizer, [{"role": "user", "content": "a"}], "the prompt", "Correct it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token", 5),
        ("bos_token", []),
        ("cls_token", {"lstrip": True}),
        ("model_max_length", "512"),
        ("model_max_length", 0),
        ("split_special_tokens", "x"),
        ("tokenizer_class", 2.0),
        ("additional_special_tokens", 5),
    ],
)
def test_settings_of_a_tokenizer_are_refused_by_the_plan(
    source_factory: SourceFactory, name: str, value: Any
) -> None:
    folder = source_factory("llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(DataError, match=f"tokenizer_config.json: {name} is .*, expected "):
        inspect_source(str(folder))


def test_half_a_character_in_a_file_of_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert load_json(path) == {"a": "\N{GRINNING FACE}"}
    path.write_text('{"a": "\\ud83d"}')
    with pytest.raises(DataError, match=r"config\.json: not valid JSON .*surrogates"):
        load_json(path)


def test_a_token_without_a_row_is_refused(converted: Callable[[str], Path], tmp_path: Path) -> None:
    added = "no token of the vocabulary"
    args = (tmp_path / "out", "sep_token", added, "tokenizer_config.json")
    folder = edited(converted("bert"), *args)
    found = sample(folder, "--prompt", "A list", code=1)
    assert "and the embedding has 400 rows" in " ".join(found.stderr.split())


def test_references_that_are_no_texts_are_a_wrong_recipe(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    text = f"source: {source_cache('llama')}\ninherits: small-budget\nreferences: [[a]]\n"
    path.write_text(text)
    found = CliRunner().invoke(app, ["check", str(path), "--to", "mdlm"])
    assert found.exit_code == IncompatibleError.exit_code
    assert "references" in found.stderr


def test_tuples_in_a_config_are_no_matter(source_factory: SourceFactory, tmp_path: Path) -> None:
    folder = source_factory("bert")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "return_dict": False}))
    convert(folder, tmp_path / "out", "mdlm")
    sample(tmp_path / "out", "--prompt", "A list")


@pytest.mark.parametrize(
    ("exponents", "words", "said"),
    [
        ([], [], "noise_exponents"),
        ([0.0], [], "noise_exponents"),
        ([True], [], "noise_exponents"),
        ("1.0", [], "noise_exponents"),
        ([1.0, 2.0], [], "noise_classes"),
        ([1.0, 2.0], [[3, 3]], "noise_classes"),
        ([1.0, 2.0], [3], "noise_classes"),
        ([1.0, 2.0], [["3"]], "noise_classes"),
        ([1.0, 2.0], [[1 << 20]], "noise_classes"),
        ([1.0], None, "noise_classes"),
    ],
    ids=str,
)
def test_classes_that_are_none_are_refused(
    converted: Callable[[str], Path], tmp_path: Path, exponents: Any, words: Any, said: str
) -> None:
    folder = edited(converted("llama"), tmp_path / "out", "diffusion/noise_schedule", "learned")
    folder = edited(folder, tmp_path / "more", "diffusion/noise_exponents", exponents)
    folder = edited(folder, tmp_path / "all", "diffusion/noise_classes", words)
    found = CliRunner().invoke(app, ["sample", str(folder)])
    assert found.exit_code == 3, found.output
    assert f"config.json: diffusion.{said} is " in " ".join(found.stderr.split())
