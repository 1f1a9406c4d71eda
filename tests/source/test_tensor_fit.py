"""Names, shapes and types of a checkpoint against its class; what the files say of the config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dllm_convert.adapters import all_adapters, get_adapter
from dllm_convert.common.console import Reporter
from dllm_convert.errors import DllmConvertError, IncompatibleError
from dllm_convert.modeling.loading import load_base
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.source_fit import fit_folder
from dllm_convert.verification import verify_checkpoint
from dllm_convert.verification.bytes import verify_folder
from dllm_convert.weights.run import adapt

Sources = Callable[..., Path]
FAMILIES = [adapter.model_type for adapter in all_adapters()]
DECODERS = [a.model_type for a in all_adapters() if a.attention == "causal"]
ENCODERS = [a.model_type for a in all_adapters() if a.attention == "bidirectional"]


@contextmanager
def rewriting(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Lend the tensors of a folder, and write what became of them."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def plan(folder: Path) -> ConversionPlan:
    recipe = {"source": str(folder), "target": "mdlm", "training": {"method": "none"}}
    return make_plan(Recipe.model_validate(recipe), inspect_source(str(folder)))


def convert(folder: Path, out: Path) -> tuple[ConversionPlan, dict[str, Any]]:
    """Write the conversion, verify its bytes, and load it with nothing missing."""
    made = plan(folder)
    adapt(made, folder, out, Reporter(quiet=True), light=True)
    report = verify_folder(out, folder, Reporter(quiet=True))
    assert report.passed, [p for p in report.probes if p.passed is False]
    cls = getattr(transformers, made.adapter.stock_class)
    model, info = cls.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.tie_word_embeddings in (True, False)
    return made, json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_missing_tensor_is_refused(source_cache: Sources, family: str) -> None:
    info = inspect_source(str(source_cache(family)))
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    twins = get_adapter(family).head_biases
    for name in info.tensors:
        if name in twins:
            continue
        layerless = name.replace(".0.", ".1.") if ".0." in name else name
        kept = {n: t for n, t in info.tensors.items() if n not in (name, layerless)}
        with pytest.raises(IncompatibleError) as caught:
            make_plan(recipe, replace(info, tensors=kept))
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_shape_and_type_is_compared(source_cache: Sources, family: str) -> None:
    info = inspect_source(str(source_cache(family)))
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    for name, tensor in info.tensors.items():
        longer = replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] + 1))
        whole = replace(tensor, dtype="I32")
        for other in (longer, whole):
            with pytest.raises(IncompatibleError):
                make_plan(recipe, replace(info, tensors={**info.tensors, name: other}))


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        ("q_proj.weight", "self_attn.W_pack.weight", r"no layer has .*W_pack\.weight instead"),
        ("mlp.up_proj.weight", "mlp.gate_up_proj.weight", "gate_up_proj"),
        (None, "self_attn.q_norm.weight", "does not compute with"),
        (None, "self_attn.q_proj.bias", "does not compute with"),
        (None, "self_attn.q_proj.lora_A.default.weight", "not merged"),
    ],
)
def test_what_all_layers_lack_or_have_besides(
    source_cache: Sources, drop: str | None, add: str, words: str
) -> None:
    info = inspect_source(str(source_cache("llama")))
    kept = {n: t for n, t in info.tensors.items() if drop is None or not n.endswith(drop)}
    other = info.tensors["model.norm.weight"]
    kept |= {f"model.layers.{number}.{add}": other for number in range(2)}
    with pytest.raises(IncompatibleError, match=words):
        make_plan(
            Recipe.model_validate({"source": "x", "target": "mdlm"}), replace(info, tensors=kept)
        )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "pretrained_model."])
def test_names_of_a_wrapper_are_told_as_such(source_cache: Sources, prefix: str) -> None:
    info = inspect_source(str(source_cache("qwen2")))
    wrapped = {prefix + name: tensor for name, tensor in info.tensors.items()}
    with pytest.raises(IncompatibleError, match="wrapper around the model"):
        make_plan(
            Recipe.model_validate({"source": "x", "target": "mdlm"}), replace(info, tensors=wrapped)
        )


LEFTOVERS = [
    *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    *("model.layers.1.self_attn.masked_bias", "v_head.summary.weight", "score.weight"),
    "multi_modal_projector.linear_1.weight",
]


@pytest.mark.parametrize("family", DECODERS)
def test_leftovers_are_left_out_everywhere(
    source_factory: Sources, tmp_path: Path, family: str
) -> None:
    folder = source_factory(family)
    before = plan(folder).source.parameters
    with rewriting(folder) as tensors:
        tensors |= dict.fromkeys(LEFTOVERS, torch.ones(8))
    made, _ = convert(folder, tmp_path / "out")
    assert sorted(made.tensors_dropped) == sorted(LEFTOVERS)
    assert made.source.parameters == before
    assert any("multi_modal_projector" in warning for warning in made.warnings)
    assert not any("inv_freq" in warning for warning in made.warnings)


@pytest.mark.parametrize("family", ENCODERS)
def test_old_encoders_are_written_under_the_names_of_today(
    source_factory: Sources, tmp_path: Path, family: str
) -> None:
    folder = source_factory(family)
    with rewriting(folder) as tensors:
        for name in [n for n in tensors if "LayerNorm" in n]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors[f"{family}.embeddings.position_ids"] = torch.arange(256)[None]
        tensors[f"{family}.pooler.dense.weight"] = torch.ones(32, 32)
        tensors["cls.seq_relationship.weight"] = torch.ones(2, 32)
    made, _ = convert(folder, tmp_path / "out")
    assert len(made.tensors_dropped) == 3
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("gamma" in name or "position_ids" in name for name in held)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_the_bodys_name_may_be_left_out(
    source_factory: Sources, tmp_path: Path, family: str
) -> None:
    folder = source_factory(family)
    prefix = "bert." if family == "bert" else "model."
    with rewriting(folder) as tensors:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
    convert(folder, tmp_path / "out")
    model = load_base(folder, get_adapter(family))
    assert model.config.model_type == family


class TestTies:
    """Whether head and embedding are one is decided from their bytes."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_head_of_its_own_stays_apart(
        self, source_factory: Sources, tmp_path: Path, family: str
    ) -> None:
        folder = source_factory(family, tied=False)
        set_config(folder, tie_word_embeddings=True)
        made, config = convert(folder, tmp_path / "out")
        adapter = made.adapter
        assert config["tie_word_embeddings"] is False
        assert made.shape is not None and not made.shape.tied
        assert any("though config.json ties them" in note for note in made.notes)
        if made.mask.write_row:
            assert adapter.head in made.tensors_changed
        held = load_file(tmp_path / "out" / "model.safetensors")
        assert not torch.equal(held[adapter.head][:9], held[adapter.embedding][:9])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_head_that_is_stored_twice_is_tied(
        self, source_factory: Sources, tmp_path: Path, family: str
    ) -> None:
        folder = source_factory(family, tied=True)
        adapter = get_adapter(family)
        once = plan(folder).source.parameters
        with rewriting(folder) as tensors:
            tensors[adapter.head] = tensors[adapter.embedding].clone()
        made, config = convert(folder, tmp_path / "out")
        assert config["tie_word_embeddings"] is True
        assert made.source.parameters == once
        assert made.shape is not None and made.shape.tied

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_the_head_alone_is_the_embedding(
        self, source_factory: Sources, tmp_path: Path, family: str
    ) -> None:
        folder = source_factory(family, tied=True)
        adapter = get_adapter(family)
        with rewriting(folder) as tensors:
            tensors[adapter.head] = tensors.pop(adapter.embedding)
        convert(folder, tmp_path / "out")
        report = verify_checkpoint(tmp_path / "out", groups=["base"], against=folder)
        assert report.passed, [probe.detail for probe in report.failed]

    def test_one_differing_number_is_a_difference(self, source_factory: Sources) -> None:
        folder = source_factory("llama", tied=True)
        with rewriting(folder) as tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][-1, -1] += 1
        assert plan(folder).config_updates["tie_word_embeddings"] is False

    def test_a_pickle_is_decided_when_it_is_read(
        self, source_factory: Sources, tmp_path: Path
    ) -> None:
        folder = source_factory("llama", tied=False)
        set_config(folder, tie_word_embeddings=True)
        made = plan(folder)
        unknown = replace(made, config_updates={
            key: value for key, value in made.config_updates.items() if "tie" not in key
        })  # fmt: skip
        adapt(unknown, folder, tmp_path / "out", Reporter(quiet=True), light=True)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["tie_word_embeddings"] is False


class TestFlags:
    """Other flags of config.json that the files contradict."""

    @pytest.mark.parametrize(
        ("family", "flag"),
        [("llama", "attention_bias"), ("llama", "mlp_bias"), ("qwen3", "attention_bias")],
    )
    @pytest.mark.parametrize("stored", [True, False])
    def test_biases_are_what_the_files_hold(
        self, source_factory: Sources, tmp_path: Path, family: str, flag: str, stored: bool
    ) -> None:
        folder = source_factory(family, **{flag: stored})
        set_config(folder, **{flag: not stored})
        made, config = convert(folder, tmp_path / "out")
        assert config[flag] is stored
        assert any(flag in note for note in made.notes)
        base = load_base(folder, made.adapter)
        held = [name for name, _ in base.named_parameters() if name.endswith("_proj.bias")]
        assert bool(held) is stored

    def test_the_type_that_is_stored_is_declared(
        self, source_factory: Sources, tmp_path: Path
    ) -> None:
        folder = source_factory("llama", dtype=torch.bfloat16)
        set_config(folder, dtype="float16", torch_dtype="float16")
        _, config = convert(folder, tmp_path / "out")
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("num_key_value_heads", 4), ("num_attention_heads", 2), ("head_dim", 16)),
            *(("hidden_size", 64), ("intermediate_size", 32), ("num_hidden_layers", 1)),
            ("vocab_size", 100),
        ],
    )
    def test_sizes_that_the_files_contradict_are_refused(
        self, source_factory: Sources, key: str, value: int
    ) -> None:
        folder = source_factory("llama")
        set_config(folder, **{key: value})
        with pytest.raises(IncompatibleError):
            plan(folder)


def test_the_base_of_another_layout_fails(source_factory: Sources, tmp_path: Path) -> None:
    folder, other = source_factory("llama"), source_factory("llama", tied=False)
    convert(folder, tmp_path / "out")
    with rewriting(other) as tensors:
        del tensors["model.norm.weight"]
    with pytest.raises(DllmConvertError):
        fit_folder(other, get_adapter("llama"))
    report = verify_folder(tmp_path / "out", other, Reporter(quiet=True))
    assert [p.name for p in report.probes if p.passed is False] == ["base-tensors"]


def test_a_checkpoint_that_lost_a_tensor_fails_by_its_files_alone(
    source_factory: Sources, tmp_path: Path
) -> None:
    folder = source_factory("llama")
    convert(folder, tmp_path / "out")
    with rewriting(tmp_path / "out") as tensors:
        del tensors["model.norm.weight"]
    report = verify_folder(tmp_path / "out", None, Reporter(quiet=True))
    assert [probe.name for probe in report.probes if probe.passed is False][:1] == ["weights"]
