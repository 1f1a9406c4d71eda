"""Every registered family is declared completely and has a tiny model in the factory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import factory
import pytest
import transformers

import dllm_convert.adapters as adapters
from dllm_convert.adapters import Adapter, all_adapters, get_adapter
from dllm_convert.errors import UnsupportedError

ALL = all_adapters()
MAX_LINES = 60


def tiny(adapter: Adapter, **config: object) -> transformers.PreTrainedModel:
    tokenizer = factory.TOKENIZERS[adapter.model_type]()
    return factory.make_model(factory.make_config(adapter.model_type, tokenizer, **config))


def test_every_adapter_has_a_tiny_config_and_the_other_way_round() -> None:
    assert (
        {adapter.model_type for adapter in ALL} == set(factory.FAMILIES) == set(factory.TOKENIZERS)
    )


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_the_factory_builds_the_stock_class(adapter: Adapter) -> None:
    assert factory.FAMILIES[adapter.model_type][1] == adapter.stock_class
    assert hasattr(transformers, adapter.stock_class)


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_declared_tensors_exist_in_an_untied_model(adapter: Adapter) -> None:
    state = tiny(adapter, tie_word_embeddings=False).state_dict()
    rows = state[adapter.embedding].shape[0]
    for name in (adapter.embedding, adapter.head, *adapter.head_biases):
        assert state[name].shape[0] == rows
    assert set(adapter.head_required) <= state.keys()
    declared = {adapter.embedding, adapter.head, *adapter.head_biases}
    assert declared == {name for name, tensor in state.items() if tensor.shape[0] == rows}


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_declared_modules_exist(adapter: Adapter) -> None:
    names = [name for name, _ in tiny(adapter).named_modules()]
    modules = (*adapter.lora_targets, *adapter.norm_modules)
    for module in (*modules, adapter.embedding_module, adapter.head_module):
        assert any(name == module or name.endswith(f".{module}") for name in names), module


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_every_norm_is_declared(adapter: Adapter) -> None:
    norms = {
        name.rpartition(".")[2]
        for name, module in tiny(adapter).named_modules()
        if "norm" in type(module).__name__.lower()
    }
    assert norms == set(adapter.norm_modules)


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_the_diffusion_class_exists(adapter: Adapter) -> None:
    import dllm_convert.modeling.published.modeling as modeling

    diffusion_class = getattr(modeling, adapter.diffusion_class)
    assert issubclass(diffusion_class, getattr(transformers, adapter.stock_class))


def test_adapter_files_are_short() -> None:
    for path in Path(adapters.__path__[0]).glob("*.py"):
        if path.name not in {"__init__.py", "base.py", "measured.py", "tensors.py"}:
            assert len(path.read_text().splitlines()) <= MAX_LINES, path.name


def test_unknown_family_names_the_nearest_and_all_supported() -> None:
    with pytest.raises(UnsupportedError) as caught:
        get_adapter("mistrall")
    assert "nearest is 'mistral'" in caught.value.message
    assert all(adapter.model_type in caught.value.message for adapter in ALL)
    assert caught.value.exit_code == 3


def test_family_names_are_not_matched_by_prefix() -> None:
    with pytest.raises(UnsupportedError):
        get_adapter("llama4")


def test_planning_imports_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "peft", "datasets", "huggingface_hub", "matplotlib", "gguf")
    code = (
        "import sys, dllm_convert.source.inspect, dllm_convert.planning.conversion\n"
        "import dllm_convert.planning.mask_token\n"
        "from dllm_convert.adapters import all_adapters; all_adapters()\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
