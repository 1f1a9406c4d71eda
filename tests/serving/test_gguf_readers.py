"""Decoding on an engine without masks, where torch stands in for llama.cpp: no engine is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SourceFactory
from gguf_cases import Make, maker

import dllm_convert as dc
from dllm_convert.errors import RequestError
from dllm_convert.modeling.published.reading import BlockReader, CanvasReader
from dllm_convert.serving.gguf_model import LlamaCppModel


class TorchCache:
    """What `LlamaCache` is: what one call holds sees itself and all that is kept."""

    def __init__(self, model: Any, columns: int, at_once: int, rows: int) -> None:
        self.model, self.columns, self.at_once = model, columns, at_once
        # Of each row what was kept, call by call: tokens, and whether each saw those before only.
        self.kept: list[list[tuple[list[int], bool]]] = [[] for _ in range(rows)]

    def run(
        self,
        row: int,
        tokens: Sequence[int],
        first: int,
        wanted: Sequence[int] = (),
        *,
        causal: bool = False,
    ) -> np.ndarray[Any, Any]:
        before = self._length(row)
        assert first == before, "positions go on where they ended"
        assert causal or len(tokens) <= self.at_once, "what sees each other is one part"
        assert len(set(wanted)) == len(wanted)
        assert before + len(tokens) <= self.columns
        self.kept[row].append((list(tokens), causal))
        last: list[int] = []
        for call, ordered in self.kept[row]:
            start = len(last)
            last += [start + at if ordered else start + len(call) - 1 for at in range(len(call))]
        sees = torch.arange(len(last)) <= torch.tensor(last)[:, None]
        ids = torch.tensor([[token for call, _ in self.kept[row] for token in call]])
        with torch.no_grad():
            logits = self.model(ids, attention_mask=sees[None, None], use_cache=False).logits[0]
        places = torch.tensor([before + place for place in wanted], dtype=torch.long)
        found: np.ndarray[Any, Any] = logits[places].numpy()
        return found

    def forget(self, row: int, first: int) -> None:
        while self._length(row) > first:
            self.kept[row].pop()

    def _length(self, row: int) -> int:
        return sum(len(call) for call, _ in self.kept[row])


class TorchEngine:
    """What `LlamaCpp` is, around a model of torch."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, model.config.vocab_size

    def cache(self, columns: int, at_once: int, rows: int = 1) -> Any:
        return TorchCache(self.model, columns, at_once, rows)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source_cache: SourceFactory) -> Make:
    """Return a maker of tiny conversions, each made once."""
    return maker(tmp_path_factory.mktemp("converted"), source_cache)


def around(folder: Path) -> tuple[Any, LlamaCppModel]:
    """Return a model of torch, and the same as an engine runs it."""
    model, _ = dc.load(folder, device="cpu", dtype="float32")
    engine: Any = TorchEngine(model)
    return model, LlamaCppModel(engine, model.config, model.generation_config)


@pytest.mark.parametrize("names", [True, False], ids=["named", "alone"])
def test_it_drafts_for_no_other_model(
    names: bool, converted: Make, source_cache: SourceFactory
) -> None:
    folder = converted("llama", target="bd3lm", shift="keep")
    _, theirs = around(folder)
    _, tokenizer = dc.load(folder, device="cpu")
    base = source_cache("llama") if names else None
    with pytest.raises(RequestError, match="give the folder that was exported"):
        dc.sample((theirs, tokenizer), "A list", lossless=True, base=base, max_new_tokens=4)


HOW: dict[str, dict[str, Any]] = {
    "one by one": {},
    "guided": {"guidance_scale": 2.0},
    "drawn": {"temperature": 1.0, "seed": 5},
    "taken back": {
        "max_denoising_steps": 3,
        "remasking": "random",
        "remasking_ratio": 0.4,
        "seed": 1,
    },
    "by threshold": {"confidence_threshold": 0.02},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
@pytest.mark.parametrize("shift", ["keep", "drop"])
def test_rows_of_all_lengths_are_written_as_in_torch(
    shift: str, target: str, how: str, converted: Make
) -> None:
    model, theirs = around(converted("llama", target=target, shift=shift))
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 380, (4, 11), generator=draw)
    ids[1, 4] = ids[2, 9] = model.config.mask_token_id
    seen = torch.tensor([[1] * 11, [1] * 8 + [0] * 3, [0] * 1 + [1] * 10, [1] * 3 + [0] * 8])
    settings = {
        "attention_mask": seen,
        "max_new_tokens": 10,
        "eos_token_id": list(range(30)),
        "return_dict_in_generate": True,
        "output_order": True,
        **HOW[how],
    }
    ours, other = model.generate(ids, **settings), theirs.generate(ids, **settings)
    assert torch.equal(ours.sequences, other.sequences)
    assert torch.equal(ours.order > 0, other.order > 0)


def test_a_context_that_was_trained_causally_is_read_so(converted: Make) -> None:
    folder = converted("qwen3", recipe={"training": {"method": "none", "ar_loss_weight": 0.5}})
    model, theirs = around(folder)
    assert model.config.diffusion["context"] == "causal"
    ids = torch.tensor([[5, 9, 77, 12, 8, 30]])
    one, other = (each.generate(ids, max_new_tokens=9) for each in (model, theirs))
    assert torch.equal(one, other)


def test_what_the_cache_cannot_hold_is_refused(converted: Make) -> None:
    _, theirs = around(converted("llama", target="mdlm"))
    with pytest.raises(RequestError, match="at its end only"):
        theirs.generate(torch.tensor([[5, 9]]), block_length=4, approximate_cache=True)


@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
def test_a_model_may_name_who_runs_its_forwards(target: str, converted: Make) -> None:
    model, _ = dc.load(converted("llama", target=target), device="cpu", dtype="float32")
    ids, read = torch.tensor([[5, 9, 77]]), []
    expected = model.generate(ids, max_new_tokens=5)
    plain: Any = BlockReader if target == "bd3lm" else CanvasReader

    class Counting(plain):
        def read(self, *given: Any) -> Any:
            read.append(1)
            return super().read(*given)

    model.reader = Counting
    assert torch.equal(model.generate(ids, max_new_tokens=5), expected)
    assert read
