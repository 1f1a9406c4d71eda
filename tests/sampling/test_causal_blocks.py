"""Strictly causal blocks: in training, in decoding with a cache, in verification, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from conversion import convert
from tiny_decoders import DECODERS, MASK, WORDS, prompt, ragged, tiny
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.common.manifest import write_manifest
from dllm_convert.diffusion.corruption import Corruption
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.converted_config import read_section
from dllm_convert.modeling.published import modeling
from dllm_convert.planning.layouts.registry import TARGETS
from dllm_convert.planning.servable import servable
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.recorded import recorded_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.verification.run import verify_checkpoint

SIZE = 4


def causal(family: str, *, shift: bool = True, **fields: Any) -> Any:
    model: Any = tiny(family, block=SIZE, shift=shift, **fields)
    model.config.diffusion |= {"context": "causal", "draft": "causal"}
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_nobody_sees_ahead(family: str, attention: str) -> None:
    model = causal(family)
    model.set_attn_implementation(attention)
    ids = prompt(11)
    ids[0, 8:] = MASK
    logits = model(ids, use_cache=False).logits[0]
    for place in range(11):
        other = ids.clone()
        other[0, place] = (other[0, place] + 7) % WORDS
        moved = (model(other, use_cache=False).logits[0] - logits).abs().amax(-1) > 1e-9
        assert moved.tolist() == [at >= place for at in range(11)]
    # In padding, too; the eager softmax is in float32 whatever the model is in.
    close = {"atol": 1e-5, "rtol": 1e-5} if attention == "eager" else {}
    ids, mask = ragged([3, 11, 8])
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for row, length in enumerate((3, 11, 8)):
        alone = model(ids[row : row + 1, -length:], use_cache=False).logits[0]
        torch.testing.assert_close(whole[row, -length:], alone, **close)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_the_two_streams_are_each_block_behind_its_clean_prefix(family: str, shift: bool) -> None:
    """One forward over both streams, against a forward of its own for every block and view."""
    model = causal(family, shift=shift)
    lengths, generator = (13, 6), torch.Generator().manual_seed(4)
    tokens = torch.randint(6, WORDS, (1, 22), generator=generator)
    segments = torch.tensor([[*([0] * 13), *([1] * 6), -1, -1, -1]])
    positions = torch.tensor([[*range(13), *range(6), 0, 0, 0]])
    batch = TextBatch(tokens, segments, positions)
    views = [
        Corruption(
            batch.scorable & (torch.rand(1, 22, generator=generator) < 0.6), torch.ones(1, 22)
        )
        for _ in range(2)
    ]
    objective = Objective("bd3lm", MASK, shift, SIZE, context="causal", draft="causal")
    forward = predict(batch, views, objective, ar_loss=True)
    mask = forward.dense_mask()
    got = model(**forward.inputs, attention_mask=mask, use_cache=False).logits
    expected = []
    for view in views:
        noisy = tokens.masked_fill(view.scored, MASK)
        for first, length in zip((0, 13), lengths, strict=True):
            for start in range(0, length, SIZE):
                end = min(start + SIZE, length)
                text = torch.cat([tokens[:, first : first + start],
                                  noisy[:, first + start : first + end]], 1)  # fmt: skip
                logits = model(text, use_cache=False).logits[0]
                for place in range(start, end):
                    if view.scored[0, first + place]:
                        expected.append(logits[place - shift])
    clean = []
    for first, length in zip((0, 13), lengths, strict=True):
        logits = model(tokens[:, first : first + length], use_cache=False).logits[0]
        clean += list(logits[: length - 1])
    torch.testing.assert_close(got, torch.stack([*expected, *clean]))
    assert len(forward.targets) == len(expected) > 10
    # Blocks as flex attention and as tiles read them are the same rule.
    assert torch.equal(forward.mask.rule.dense(), mask)  # type: ignore[union-attr]


@torch.no_grad()
def reference(model: Any, ids: torch.Tensor, new: int) -> list[int]:
    """Decoding without a cache: everything once more in every step, strictly causally."""
    length, size, shift = ids.shape[1], SIZE, int(model.config.diffusion["token_shift"])
    canvas = ids
    for start in range(length // size * size, length + new, size):
        canvas = torch.cat([canvas, torch.full((1, start + size - canvas.shape[1]), MASK)], 1)
        while (canvas[0, length : length + new] == MASK).any():
            logits = model(canvas, use_cache=False).logits[0]
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            logits[:, MASK] = -torch.inf
            confidence, token = logits.float().softmax(-1).max(-1)
            confidence[canvas[0] != MASK] = -1
            confidence[length + new :] = -1
            best = int(confidence.argmax())
            canvas[0, best] = token[best]
    return list(canvas[0, length : length + new].tolist())


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_decoding_with_a_cache_writes_what_it_does_without(family: str, shift: bool) -> None:
    model, lengths = causal(family, shift=shift), (3, 4, 10)
    ids, mask = ragged(list(lengths))
    got = model.generate(ids, attention_mask=mask, max_new_tokens=13, eos_token_id=None)
    opened = tiny(family, block=SIZE, shift=shift)
    other = opened.generate(ids, attention_mask=mask, max_new_tokens=13, eos_token_id=None)
    assert not torch.equal(got, other)
    for row, length in enumerate(lengths):
        expected = reference(model, ids[row : row + 1, -length:], 13)
        assert got[row, 10:].tolist() == expected


def test_what_it_drafts_is_verified_by_its_own_clean_stream() -> None:
    model = causal("llama")
    ids, mask = ragged([3, 11, 8])
    got = model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=None,
                         verify_with="self")  # fmt: skip
    for row, length in enumerate((3, 11, 8)):
        text = ids[row : row + 1, -length:]
        for _ in range(9):
            with torch.no_grad():
                logits = model(text, use_cache=False).logits[0, -1]
            logits[MASK] = -torch.inf
            text = torch.cat([text, logits.argmax()[None, None]], 1)
        assert got[row, 11:].tolist() == text[0, length:].tolist()


def conversion(base: Path, folder: Path, **fields: Any) -> Any:
    return convert(base, folder, "bd3lm", block=SIZE, block_attention="causal", **fields)


@pytest.mark.parametrize("family", DECODERS)
def test_a_folder_says_it_and_passes_every_probe(
    family: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    base, folder = source_cache(family), tmp_path / "out"
    plan = conversion(base, folder)
    section = DiffusionSection.of(json.loads((folder / "config.json").read_text())["diffusion"])
    assert (section.context, section.draft, section.is_gated) == ("causal", "causal", False)
    assert "stays strictly causal" in " ".join(plan.attention_changes)
    some = {} if family == "llama" else {"groups": ["attention", "training", "decoding"]}
    report = verify_checkpoint(folder, against=base, untrained=True, **some)
    assert [f"{p.name}: {p.measured} {p.detail}" for p in report.failed] == []
    passed = {probe.name for probe in report.probes if probe.passed}
    assert {"attention-sdpa", "attention-layers", "training-mask", "training-influence"} <= passed


def test_a_model_that_looks_ahead_is_found(
    tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = source_cache("llama"), tmp_path / "out"
    conversion(base, folder)
    monkeypatch.setattr(modeling, "has_causal_drafts", lambda config: False)
    report = verify_checkpoint(folder, against=base, untrained=True, groups=["attention"])
    failed = {probe.name: probe.detail for probe in report.failed}
    assert "sees" in failed["attention-sdpa"] and "attention-layers" in failed


@pytest.mark.parametrize("target", list(TARGETS))
def test_no_engine_is_given_what_it_would_read_open(
    target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    base = source_cache("qwen3" if target == "sdar" else "llama")
    plan = conversion(base, tmp_path / "out", token_shift="drop")
    said = " ".join(servable(plan)[target]["refused"])
    assert "strictly causal" in said or (target == "gguf-diffusion" and "it is bd3lm" in said)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no blocks": ({"target": "mdlm", "block_size": None}, "mdlm has no blocks"),
    "annealing": ({"training.attention_annealing_steps": 5}, "nothing is opened"),
    "an engine": ({"serve": "sglang"}, "see each other"),
    "a verifier that was never trained": ({"generation.verify_with": "self"}, "ar_loss_weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_it_is_refused(case: str) -> None:
    fields, said = REFUSED[case]
    known = {"target": "bd3lm", "block_size": SIZE, "block_attention": "causal"}
    known |= fields
    with pytest.raises(IncompatibleError, match=said):
        load_recipe("x/y", overrides={k: v for k, v in known.items() if v is not None})


def test_a_section_that_contradicts_itself_is_refused() -> None:
    section = {"objective": "bd3lm", "block_size": 4, "mask_token_id": 5, "token_shift": True,
               "attention": "block-causal", "draft": "causal"}  # fmt: skip
    with pytest.raises(IncompatibleError, match="context"):
        read_section({"diffusion": section})
    assert read_section({"diffusion": section | {"context": "causal"}}).draft == "causal"


def test_earlier_manifests_call_it_otherwise(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"source": "x", "target": "bd3lm", "block_size": 8})
    dumped = recipe.model_dump(mode="json")
    del dumped["block_attention"]
    dumped["training"]["lora"]["draft"] = "causal"
    write_manifest(tmp_path, {"format_version": 1, "recipe": dumped})
    read = recorded_recipe(tmp_path)
    assert read.block_attention == "causal" and read.training == recipe.training


def test_a_run_trains_one_and_goes_on_from_it(tmp_path: Path, source_cache: SourceFactory) -> None:
    """Full weights and LoRA; what it is stands in the card, and a second conversion inherits it."""
    out = tmp_path / "out"
    line = ["run", str(source_cache("qwen3")), "--preset", "i-dlm", "--data", "pydoc", "--json",
            "--lora", "4", "--steps", "3", "--out", str(out)]  # fmt: skip
    for field in ("data.sequence_length=32", "data.max_documents=30", "training.batch_size=2",
                  "training.gradient_accumulation=1", "training.learning_rate=1e-3",
                  "data.held_out_sequences=4", "generation.max_new_tokens=8"):  # fmt: skip
        line += ["--set", field]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    assert "strictly causal, noisy tokens too" in card
    again = load_recipe(str(out), overrides={"data.sequence_length": 32})
    assert again.block_attention == "causal" and again.block_size == 4
