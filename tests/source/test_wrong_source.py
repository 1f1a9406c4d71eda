"""What is given for a checkpoint and is none, or not all of one: each cause with its way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError, UnsupportedError
from dllm_convert.pipeline.run import plan_conversion
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.wrong_source import no_config, no_weights

Sources = Callable[..., Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
SINGLE = "model.safetensors"


@pytest.mark.parametrize(
    ("name", "what", "advice"),
    [
        ("paper.pdf", "a PDF document", "folder that holds config.json"),
        ("weights.zip", "an archive", "Unpack it"),
        ("weights.tar.gz", "an archive", "Unpack it"),
        ("texts.jsonl", "text", "--data"),
        ("model.onnx", "an ONNX graph", "folder"),
        ("model.safetensors", "one file of weights", "folder that holds it"),
        ("consolidated.00.pth", "one file of weights", "folder that holds it"),
        ("config.json", "one file of a checkpoint", "folder that holds it"),
        ("noname", "is a file", "folder that holds config.json"),
    ],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, name: str, what: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"%PDF-1.7\n" * 30)
    with pytest.raises(DataError) as caught:
        inspect_source(str(tmp_path / name))
    assert what in caught.value.message and advice in str(caught.value.hint)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model-00001-of-00001.safetensors"], "Rename it to model.safetensors"),
        (["model-00001-of-00002.safetensors"], "Download model.safetensors.index.json too"),
        (["pytorch_model-00001-of-00003.bin"], "Download pytorch_model.bin.index.json too"),
        (["consolidated.safetensors"], "Take the transformers version"),
        (["consolidated.00.pth"], "Take the transformers version"),
        (["adapter_model.safetensors", "adapter_config.json"], "merge it into its base"),
        (["model.Q4_K_M.gguf"], "one of its .gguf files"),
        (["tf_model.h5"], "weights of TensorFlow"),
        (["my-model.safetensors"], "rename it to model.safetensors"),
        (["a.safetensors", "b.safetensors"], "save_pretrained"),
        ([], "Download the weights too"),
    ],
)
def test_no_weights_that_transformers_loads(
    source_factory: Sources, names: list[str], words: str
) -> None:
    folder = source_factory("llama")
    (folder / SINGLE).unlink()
    for name in names:
        (folder / name).touch()
    with pytest.raises(DataError) as caught:
        inspect_source(str(folder))
    assert words in str(caught.value)
    assert str(no_weights("x", names)).count("\n") == 0


def test_a_pipeline_of_diffusers_is_told_as_such() -> None:
    assert "diffusers" in str(no_config("x", ["model_index.json"], None))


@pytest.mark.parametrize(
    "file", [SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"]
)
def test_pointers_of_git_lfs(source_factory: Sources, file: str) -> None:
    folder = source_factory("llama")
    (folder / file).write_text(POINTER)
    with pytest.raises(DataError, match=f"{file} is a git-LFS pointer") as caught:
        inspect_source(str(folder))
    assert "git lfs pull" in str(caught.value.hint)


def test_a_pointer_in_a_shard_and_a_gguf(source_factory: Sources, tmp_path: Path) -> None:
    folder = source_factory("llama", shards=2)
    (folder / "model-00002-of-00002.safetensors").write_text(POINTER)
    (tmp_path / "model.gguf").write_text(POINTER)
    for place in (folder, tmp_path / "model.gguf"):
        with pytest.raises(DataError, match="git-LFS pointer"):
            inspect_source(str(place))


def test_a_family_comes_before_its_tokenizer(source_factory: Sources) -> None:
    folder = source_factory("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen"}))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UnsupportedError, match="model_type 'qwen' has no adapter"):
        inspect_source(str(folder))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_of_sentence_transformers(source_factory: Sources, family: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = source_factory(family)
    (folder / "modules.json").write_text("[]")
    body = {n: t for n, t in load_file(folder / SINGLE).items() if n.startswith(f"{family}.")}
    body = {n.removeprefix(f"{family}."): t for n, t in body.items()}
    save_file(body, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="head would be random") as caught:
        make_plan(Recipe(source="x", target="mdlm"), inspect_source(str(folder)))
    assert "sentence-transformers" in str(caught.value.hint)


def test_a_folder_called_like_a_recipe(
    source_factory: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source_factory("llama").rename(tmp_path / "qwen3-1.7b")
    monkeypatch.chdir(tmp_path)
    none = {"target": "mdlm", "block_size": None, "data.sequence_length": 64}
    none["training.method"] = "none"
    taken = plan_conversion(load_recipe(f"./{folder.name}", overrides=none))
    assert "the folder qwen3-1.7b was taken" in taken.warnings[0]
    # Its source is on the Hub, which is not asked here: the failure says what was not taken.
    with pytest.raises(DllmConvertError) as caught:
        plan_conversion(load_recipe(folder.name, overrides={}))
    assert "./qwen3-1.7b means the folder" in str(caught.value.hint)
