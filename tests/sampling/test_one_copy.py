"""A conversion whose adapter was kept drafts for its base with one copy of the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from gated import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_convert.adapters import adapter_of
from dllm_convert.common.console import Reporter
from dllm_convert.modeling.loading import load_base, load_checkpoint, load_model
from dllm_convert.sampling.one_copy import share_weights
from dllm_convert.sampling.packing import _KEPT, packed_linears
from dllm_convert.sampling.pairing import load_verifier
from dllm_convert.sampling.run import decode_samples, run_sample
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.setup import make_trainable
from dllm_convert.training.writing import write_trained

PROMPT = "The value of a name is"
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def merged(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Return a conversion whose LoRA moved all it trains, its adapter kept, and its base."""
    root, made = tmp_path_factory.mktemp("one"), dict[str, tuple[Path, Path]]()

    def get(family: str, embeddings: str = "mask_row") -> tuple[Path, Path]:
        place = f"{family}-{embeddings}"
        if place not in made:
            base, plain = source_cache(family, vocab_padding=8), root / f"{place}-untrained"
            lora = {"rank": 4, "embeddings": embeddings, "norms": embeddings == "full"}
            training = {"method": "lora", "keep_adapter": True, "lora": lora}
            plan = convert(base, plain, "bd3lm", training=training)
            model = make_trainable(
                load_model(plain, plan.adapter), plan.adapter, plan.recipe.training
            )
            draws = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight += 0.05 * torch.randn(weight.shape, generator=draws)
            write_trained(model, plain, root / place, plan)
            made[place] = root / place, base
        return made[place]

    return get


def held(*models: Any) -> int:
    """Bytes of all weights, each once."""
    sizes = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for model in models
        for weight in model.parameters()
    }
    return sum(sizes.values())


def stock_text(source: Path, new: int) -> str:
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = base.generate(ids, max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("embeddings", ["mask_row", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_bases_with_the_adapter_off(
    family: str, embeddings: str, merged: Callable[..., tuple[Path, Path]]
) -> None:
    folder, base = merged(family, embeddings)
    loaded, alone = load_checkpoint(folder), load_checkpoint(folder)
    source = inspect_source(str(base))
    verifier = load_verifier(loaded.model, loaded.tokenizer, source, QUIET, folder)
    one, apart = held(loaded.model, verifier), held(alone.model, verifier)
    matrices = sum(
        layer.weight.nbytes
        for name, layer in verifier.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    )
    assert apart - one >= matrices > 0
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # It drafts as it did, and who verifies is not touched.
        expected = alone.model(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected, atol=2e-3, rtol=1e-3)
        stock = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
        assert torch.equal(verifier(ids).logits, stock)
        assert (expected - stock)[..., :300].abs().max() > 0.1
    found = decode_samples(
        loaded.model, loaded.tokenizer, [PROMPT], verifier=verifier, max_new_tokens=24
    )
    assert found[0].text == stock_text(base, 24)
    (said,) = run_sample(folder, [PROMPT], QUIET, verifier=source, max_new_tokens=24)
    assert said.text == found[0].text


def test_packed_weights_are_held_once_too(merged: Callable[..., tuple[Path, Path]]) -> None:
    folder, base = merged("llama")
    loaded = load_checkpoint(folder)
    verifier = load_verifier(
        loaded.model, loaded.tokenizer, inspect_source(str(base)), QUIET, folder
    )
    with packed_linears(loaded.model), packed_linears(verifier):
        packed = [
            {id(part) for part in _KEPT[model]._packed.values()}
            for model in (loaded.model, verifier)
        ]
    if not packed[0]:
        pytest.skip("this torch packs nothing")
    # All but a head, whose mask's row was trained.
    assert len(packed[0] - packed[1]) <= 1 < len(packed[0] & packed[1])


def test_another_base_or_no_adapter_leaves_two(
    merged: Callable[..., tuple[Path, Path]], source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    folder, base = merged("llama")
    model, adapter = load_checkpoint(folder).model, adapter_of(model_config(folder))
    before = model(torch.arange(5, 20)[None]).logits
    other = load_base(base, adapter)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    assert not share_weights(model, other, folder)
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    shutil.rmtree(plain / "adapter")
    assert not share_weights(model, load_base(base, adapter), plain)
    assert torch.equal(model(torch.arange(5, 20)[None]).logits, before)


def model_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = load_checkpoint(folder).model.config.to_dict()
    return config
