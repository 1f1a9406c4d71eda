"""Texts longer than the context: refused with both numbers, or warned of, wherever they come in."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion import convert, sample
from factory import FAMILIES
from tiny_decoders import DECODERS, prompt, ragged, tiny
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.published.limits import (
    ContextError,
    ContextWarning,
    context_of,
    has_position_table,
)
from dllm_convert.source.context import too_many_new

SMALL = {"max_position_embeddings": 24}
TABLES = ("bert", "roberta")
"""Families that look positions up; those of the others are rotary."""
ROTARY = [family for family in FAMILIES if family not in TABLES]
FREE: dict[str, Any] = {"eos_token_id": None}


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_has_an_end(family: str) -> None:
    model = tiny(family, **SMALL)
    context = 24 if family == "bert" else 22
    assert context_of(model) == context
    fits = model.generate(prompt(context - 6), max_new_tokens=6, **FREE)
    assert fits.shape == (1, context)
    said = rf"a prompt of {context - 6} tokens and 7 new ones are {context + 1}, .* for {context}"
    with pytest.raises(ContextError, match=said):
        model.generate(prompt(context - 6), max_new_tokens=7, **FREE)
    # The longest row counts, padding does not.
    ids, mask = ragged([3, context - 6])
    wide = torch.nn.functional.pad(ids, (9, 0), value=1), torch.nn.functional.pad(mask, (9, 0))
    assert model.generate(wide[0], attention_mask=wide[1], max_new_tokens=6, **FREE) is not None
    with pytest.raises(ValueError, match="shorten the prompt, or write fewer tokens"):
        model.generate(wide[0], attention_mask=wide[1], max_new_tokens=7, **FREE)


@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("family", DECODERS)
def test_rotary_positions_go_on_with_a_warning(family: str, block: int | None) -> None:
    model = tiny(family, block=block, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContextWarning)
        model.generate(prompt(18), max_new_tokens=6, **FREE)
    with pytest.warns(ContextWarning, match="18 tokens and 7 new ones are 25, more than the .* 24"):
        found = model.generate(prompt(18), max_new_tokens=7, **FREE)
    assert found.shape == (1, 25)


def test_which_models_look_positions_up() -> None:
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"max_position_embeddings": 24, "intermediate_size": 16}
    gpt2 = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    opt = transformers.OPTConfig(**size, ffn_dim=16, word_embed_proj_dim=16)
    table = [
        transformers.GPT2LMHeadModel(gpt2),
        transformers.OPTForCausalLM(opt),
        *(tiny(family, **SMALL) for family in TABLES),
    ]
    assert [has_position_table(model) for model in table] == [True] * len(table)
    # A vocabulary as large as the context is no table of positions.
    rotary = [tiny(family, max_position_embeddings=60) for family in ROTARY]
    assert [has_position_table(model) for model in rotary] == [False] * len(rotary)
    assert [context_of(model) for model in table[:2]] == [24, 24]


@pytest.fixture(scope="module")
def folders(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("context")

    def get(family: str) -> Path:
        if not (root / family).exists():
            source = source_cache(family, max_position_embeddings=66)
            target = "bd3lm" if family in DECODERS else "mdlm"
            convert(source, root / family, target, block=4)
        return root / family

    return get


LONG = "the value of a name " * 30


def test_sample_says_it(folders: Callable[[str], Path]) -> None:
    for family, context in (("bert", 66), ("roberta", 64)):
        found = sample(folders(family), "--prompt", "A name", "--prompt", LONG, code=1)
        assert "Traceback" not in found.stderr
        assert f"positions for {context}" in " ".join(found.stderr.split())
        assert "12 new ones" in found.stderr
        sample(folders(family), "--prompt", "A name")
    found = sample(folders("llama"), "--prompt", LONG, "--json")
    assert found.stderr.count("warning: a prompt of") == 1
    assert "more than the context of 66" in " ".join(found.stderr.split())
    assert json.loads(found.stdout)["new_tokens"] <= 12
    assert "warning" not in sample(folders("llama"), "--prompt", "A name").stderr


@pytest.mark.parametrize(("family", "context"), [("bert", 66), ("roberta", 64), ("llama", 66)])
def test_more_new_tokens_than_a_context_has_are_refused_before_weights_are_read(
    family: str, context: int, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders(family), tmp_path / family))
    (folder / "model.safetensors").unlink()
    for new in (context, 100_000, 2**31 - 1):
        found = sample(folder, "--prompt", "A name", "--max-new-tokens", str(new), code=2)
        said = " ".join(found.stderr.replace("│", " ").split())
        assert f"--max-new-tokens is {new:,}, and the context of this model is {context}" in said
        assert f"write at most {context - 1}" in said
    # What a prompt has to leave room for is not known before it is tokenised.
    found = sample(folder, "--prompt", "A name", "--max-new-tokens", str(context - 1), code=1)
    assert "model.safetensors" in found.stderr


def test_positions_that_stretch_have_no_such_end() -> None:
    for rotary, refused in (
        ({"rope_type": "default"}, True),
        ({"rope_type": "yarn", "factor": 4.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        ({"type": "dynamic", "factor": 2.0}, False),
    ):
        for key in ("rope_parameters", "rope_scaling"):
            assert (too_many_new(300, 256, {key: rotary}) is not None) == refused
    assert too_many_new(10**9, None, {}) is None
    assert too_many_new(255, 256, {}) is None


@pytest.mark.parametrize("new", [256, 100_000])
def test_a_recipe_that_writes_more_than_the_context_is_refused(
    new: int, source_cache: Callable[..., Path]
) -> None:
    source = str(source_cache("llama"))
    result = CliRunner().invoke(app, ["check", source, "--set", f"generation.max_new_tokens={new}"])
    assert result.exit_code == 3
    assert f"generation.max_new_tokens is {new:,}" in result.stderr
    assert "Write at most 255" in result.stderr
    small = str(source_cache("llama", max_position_embeddings=66))
    lengths = ["--set", "data.sequence_length=64"]
    # The default that nobody typed is only warned of.
    result = CliRunner().invoke(app, ["check", small, *lengths])
    assert result.exit_code == 0
    assert "larger than the context of 66" in " ".join(result.stdout.split())


def test_a_runs_own_sample_fits(folders: Callable[[str], Path]) -> None:
    from dllm_convert.modeling.loading import load_checkpoint
    from dllm_convert.sampling import DEFAULT_PROMPT
    from dllm_convert.sampling.run import decode_sample, fit

    loaded = load_checkpoint(folders("bert"))
    model, tokenizer = loaded.model, loaded.tokenizer
    assert fit(model, tokenizer, DEFAULT_PROMPT, 32) == (DEFAULT_PROMPT, 32)
    for context in (40, 20, 12, 5, 2):
        model.config.max_position_embeddings = context
        text, new = fit(model, tokenizer, DEFAULT_PROMPT, 32)
        assert DEFAULT_PROMPT.startswith(text)
        assert new >= 1
        if context >= 12:
            decode_sample(model, tokenizer, text, max_new_tokens=new)
    with pytest.raises(DataError, match="positions for 2"):
        decode_sample(model, tokenizer, DEFAULT_PROMPT, max_new_tokens=4)


class Told(Reporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_evaluation_says_it(folders: Callable[[str], Path]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    from dllm_convert.evaluation.harness import DiffusionLM
    from dllm_convert.evaluation.subject import EvaluatedCheckpoint

    for family in ("bert", "llama"):
        subject, told = EvaluatedCheckpoint.load(folders(family)), Told()
        if family == "bert":
            with pytest.raises(IncompatibleError, match="max_length is 500, and the context is 66"):
                DiffusionLM(subject=subject, max_length=500, reporter=told)
        else:
            DiffusionLM(subject=subject, max_length=500, reporter=told)
            assert told.warnings == [
                "max_length is 500, and the context is 66 tokens: behind it the model was never "
                "trained"
            ]
            told.warnings.clear()
        model = DiffusionLM(subject=subject, reporter=told, rounds=1, draws=1)
        pairs = [("A name", " is"), (LONG, " is"), (LONG, " are")]
        model.loglikelihood([Instance("loglikelihood", {}, p, 0, ("a", 0, 1)) for p in pairs])
        (cut,) = told.warnings
        assert cut.startswith("2 of 3 texts lose their beginning: they are longer than the 66")
        told.warnings.clear()
        options = {"until": [], "max_gen_toks": 4}
        asked = [Instance("generate_until", {}, (t, options), 0, ("a", 0, 1)) for t in ("A", LONG)]
        assert len(model.generate_until(asked)) == 2
        (cut,) = told.warnings
        assert cut.startswith("1 of 2 texts lose their beginning: they are longer than the 62")
