"""Learning from the base by what the model writes itself: states, lessons, optimum, going on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from moved import trainer_of
from test_distillation import QUIET, WAYS, prepared, rows
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey
from dllm_convert.diffusion.distillation import Distillation, Lesson
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.published.modeling import DiffusionLlamaForCausalLM
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.planning.costs import flops_per_token, peak_memory
from dllm_convert.planning.launch import Launch
from dllm_convert.planning.sharing import Sharing
from dllm_convert.planning.streams import writing
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.on_policy import OnPolicy, beginnings
from dllm_convert.training.parts import LossWeights
from dllm_convert.training.run import train
from dllm_convert.training.trainer import DiffusionTrainer
from dllm_convert.weights.run import adapt

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LEARNS = tuple(way for way in WAYS if way != "drafts")
FIELD = "training.on_policy"


def conversion(
    source: Path, folder: Path, way: str = "full", target: str = "bd3lm", **fields: Any
) -> ConversionPlan:
    own = {"share": 1.0, "prompt_tokens": 6, "new_tokens": 13, **fields.pop("on_policy", {})}
    training = {
        "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32",
        "lr_schedule": "constant_with_warmup", "warmup_ratio": 0, "on_policy": own,
        **WAYS[way], **fields.pop("training", {}),
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "noise": {"draw": "count", "complementary": True},
            "data": {"source": "pydoc", "sequence_length": 32, "max_documents": 40},
            "generation": {"temperature": 1.0, "confidence_threshold": 0.2},
            "training": training,
            **fields,
        }
    )
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, folder, QUIET)
    return plan


@pytest.mark.parametrize(
    ("family", "way", "target"),
    [
        *((family, way, "bd3lm") for family in FAMILIES for way in LEARNS),
        *(("llama", way, "mdlm") for way in ("full", "lora", "mask-row")),
    ],
)
def test_the_base_scores_what_the_model_wrote(
    family: str,
    way: str,
    target: str,
    tmp_path: Path,
    source_cache: SourceFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own text, by the stock class over the untouched source, at masks it wrote through."""
    source = source_cache(family, tied=family in ("qwen2", "llama"))
    plan = conversion(source, tmp_path / "c", way, target)
    trainer = trainer_of(plan, tmp_path / "c")
    model = trainer.model
    size, attention = model.config.block_size if target == "bd3lm" else None, None
    attention = model.config._attn_implementation
    model.train()
    drawn = torch.get_rng_state()
    batches, _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    assert torch.equal(drawn, torch.get_rng_state())  # What is drawn is drawn by number.
    assert model.training and model.config._attn_implementation == attention
    assert getattr(model.config, "block_size", None) == size
    noise = batches[0]["noise"]
    batch, (view,) = noise.batch, noise.views
    assert noise.own and batch.loss is not None and batch.loss.any(1).all()
    # The same by hand: prompts are beginnings of the documents, the rest is decoded behind them.
    policy = trainer._noise._writer.how  # type: ignore[union-attr]
    key = NoiseKey(0, 0, 0, len(batch.tokens))
    prompts = beginnings(TextBatch(*(rows()[name] for name in
        ("input_ids", "segment_ids", "position_ids", "loss_mask"))), policy, key,
        model.config.mask_token_id, ())  # fmt: skip
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.eval()
    for row, prompt in enumerate(prompts):
        seed = key.generator(row, 5).initial_seed()
        alone = inner.generate(prompt[None], max_new_tokens=13, seed=[seed])[0]
        count = int(batch.loss[row].sum())
        assert torch.equal(batch.tokens[row, : len(prompt)], prompt)
        assert torch.equal(batch.tokens[row, : len(prompt) + count], alone[: len(prompt) + count])
    model.train()
    lessons: list[Lesson] = []
    lay_out = trainer._lay_out

    def kept(*given: Any) -> Any:
        found = lay_out(*given)
        lessons.append(found[2])
        return found

    monkeypatch.setattr(trainer, "_lay_out", kept)
    prepared_model = trainer.accelerator.prepare_model(model)
    loss = trainer.training_step(prepared_model, batches[0])
    assert loss.isfinite() and loss > 0
    (lesson,) = lessons
    assert lesson.how.weight == 1  # Nothing is learnt of its own words.
    scored = view.scored
    if way == "gated":
        scored = scored & (batch.positions % 8 != 0)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = []
    for row in range(len(batch.tokens)):
        end = int(batch.loss[row].nonzero()[-1]) + 1
        with torch.no_grad():
            logits = base(batch.tokens[row, :end][None]).logits[0]
        expected.append(logits[scored[row].nonzero().squeeze(-1) - 1])
    expected_logits = torch.cat(expected)
    logits = lesson.of(slice(0, len(lesson))).states[:, : expected_logits.shape[1]]
    assert len(lesson) == len(expected_logits) > 4
    torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("way", "target"), [("full", "mdlm"), ("lora", "bd3lm"),
                                             ("gated", "bd3lm")])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(
    way: str, target: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    """Every second step is on-policy; what is written depends on weights and numbers alone."""
    source, outcomes = source_cache("llama"), []
    more = {"save_steps": 3, "distillation": {"weight": 0.5}, "keep_checkpoints": 9}
    fields = {"on_policy": {"share": 0.5}, "training": more}
    plan = conversion(source, tmp_path / "a", way, target, **fields)
    data = prepared(plan, tmp_path / "a")
    for name in ("whole", "resumed"):
        train(plan, data, tmp_path / "a", tmp_path / name, tmp_path / "work", QUIET)
        files = {f.name: f.read_bytes() for f in (tmp_path / name).rglob("*.safetensors")}
        kept = ("loss", "nelbo", "divergence", "own_divergence")
        curve = [
            {k: v for k, v in line.items() if k in kept} for line in lines_of(tmp_path / "work")
        ]
        outcomes.append((curve, files))
        shutil.rmtree(tmp_path / "work/trainer/checkpoint-6")
    assert outcomes[0] == outcomes[1] and outcomes[0][1]
    for step, line in enumerate(outcomes[0][0]):
        # Of what it wrote itself there is no bound.
        own = bool(step % 2)
        assert ("own_divergence" in line, "nelbo" in line, "divergence" in line) == (
            own, not own, not own,
        )  # fmt: skip


def test_what_is_written_does_not_depend_on_how_rows_are_shared_out(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan = conversion(source_cache("llama"), tmp_path / "c")
    trainer = trainer_of(plan, tmp_path / "c")
    (whole,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
    count = len(rows()["input_ids"])
    parts = [{name: part[row : row + 1] for name, part in rows().items()} for row in range(count)]
    alone, _ = trainer.get_batch_samples(iter(parts), count, torch.device("cpu"))
    for row, one in enumerate(alone):
        mine, other = one["noise"].batch, whole["noise"].batch
        width = int((mine.segments[0] >= 0).sum())
        assert torch.equal(mine.tokens[0, :width], other.tokens[row, :width])
        mine, other = one["noise"].views[0], whole["noise"].views[0]
        assert torch.equal(mine.scored[0, :width], other.scored[row, :width])
    assert alone[0]["noise"].items == whole["noise"].items


def test_blocks_that_grow_are_written_at_their_size(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    growth = {"block_growth": {"steps": 4, "sizes": [2, 4]}}
    plan = conversion(source_cache("llama"), tmp_path / "c", training=growth)
    trainer = trainer_of(plan, tmp_path / "c")
    for step, size in ((0, 2), (3, 4), (5, 8)):
        trainer.state.global_step = step
        (inputs,), _ = trainer.get_batch_samples(iter([rows()]), 1, torch.device("cpu"))
        noise = inputs["noise"]
        assert noise.objective.size == size
        # Each row ends with its last block.
        ends = (noise.batch.segments >= 0).sum(1)
        assert bool((ends % size == 0).all())
        assert trainer.model.config.block_size == 8
        loss = trainer.compute_loss(trainer.model.train(), inputs)
        assert loss.isfinite()


# A vocabulary of a handful of words: 0 to 3 are said, 4 is the mask.
WORDS, MASK_ID, A, C, D = 5, 4, 0, 2, 3


class MarkovBase(torch.nn.Module):
    """A base that looks the next word up by the last one."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.full((WORDS, WORDS), 1e-4)
        table[A, A] = table[A, C] = 0.5
        table[C, D], table[D, A] = 1.0, 1.0
        table[1] = table[MASK_ID] = 0.25
        table[:, MASK_ID] = 1e-9
        self.register_buffer("logits", (table / table.sum(1, keepdim=True)).log())

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, logits_at: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids.flatten()[logits_at]])


def toy(target: str, on_policy: OnPolicy | None, folder: Path, steps: int) -> Any:
    """Train on a text that says nothing but one word, to say what the table does."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, is_causal=False,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.mask_token_id, config.block_size = MASK_ID, 2 if target == "bd3lm" else None
    config.diffusion = {"token_shift": True, "objective": target, "mask_token_id": MASK_ID}
    torch.manual_seed(0)
    model = DiffusionLlamaForCausalLM(config)
    model.generation_config.temperature, model.generation_config.do_sample = 1.0, True
    if target == "mdlm":
        # From left to right, so that few states are to be learnt.
        model.generation_config.block_length = 1
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16,
        learning_rate=2e-2, lr_scheduler_type="linear", use_cpu=True, report_to=[],
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", logging_steps=steps,
    )  # fmt: skip
    text = [{"input_ids": torch.full((12,), A)} for _ in range(16)]
    objective = Objective(target, MASK_ID, True, config.block_size)  # type: ignore[arg-type]
    trainer = DiffusionTrainer(
        model, arguments, objective=objective, process=ForwardProcess(draw="count"),
        weights=LossWeights("uniform", distillation=Distillation(1.0)), on_policy=on_policy,
        base=MarkovBase(), train_dataset=text,
    )  # fmt: skip
    trainer.train()
    return trainer.model.eval()


@torch.no_grad()
def said_after(model: Any, text: list[int]) -> torch.Tensor:
    """What the model says at the first mask behind a text, (words,)."""
    # Without blocks there are as many masks as could be written.
    masks = 1 if model.config.block_size else 6 - len(text)
    ids = torch.tensor([[*text, *([MASK_ID] * masks)]])
    logits = model(ids, logits_at=torch.tensor([len(text) - 1])).logits[0]
    logits[MASK_ID] = -torch.inf
    return torch.softmax(logits, -1)


@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
def test_only_what_is_written_leads_where_decoding_goes(target: str, tmp_path: Path) -> None:
    """The text has only one word; decoding, taught by the table, soon says others, and goes on.

    The table is known, so the optimum is: behind each word what the table says. Learnt from the
    text alone, what follows a word that the text never has stays what it was by chance.
    """
    # A text without blocks is in one state at a time, of which one mask stands behind a word.
    views = 1 if target == "bd3lm" else 6
    new = 8 if target == "bd3lm" else 4
    policy = OnPolicy(share=1.0, prompt_tokens=2, new_tokens=new, views=views)
    table = MarkovBase().logits.exp()
    steps = 80 if target == "bd3lm" else 160
    off, on = (toy(target, how, tmp_path / str(how is None), steps) for how in (None, policy))
    # Both have learnt what follows the one word of the text.
    for model in (off, on):
        torch.testing.assert_close(said_after(model, [A, A, A]), table[A], atol=0.12, rtol=0)
    for text, word in (([A, A, C], C), ([A, A, C, D], D)):
        assert float((said_after(on, text) - table[word]).abs().sum() / 2) < 0.1, text
    missed = [
        float((said_after(off, text) - table[word]).abs().sum() / 2)
        for text, word in (([A, A, C], C), ([A, A, C, D], D))
    ]
    assert max(missed) > 0.4, missed


def test_steps_are_spread_evenly_and_told_by_their_number() -> None:
    for share, of in ((1.0, 1), (0.5, 2), (0.25, 4), (0.1, 10), (0.3, 10), (0.29, 100)):
        how = OnPolicy(share, 1, 1)
        found = [how.writes(step) for step in range(5 * of)]
        assert sum(found) == round(5 * of * share), share
        assert found[:of] == found[of : 2 * of]


def chats() -> TextBatch:
    tokens = torch.arange(5, 29).view(1, 24)
    segments = torch.zeros_like(tokens)
    segments[:, 12:] = 1
    segments[:, 22:] = -1
    positions = torch.cat([torch.arange(12), torch.arange(12)])[None]
    loss = torch.zeros_like(tokens, dtype=torch.bool)
    loss[:, 4:7] = loss[:, 10:12] = True  # Two answers of the first; the second is a text.
    loss[:, 12:22] = True
    return TextBatch(tokens, segments, positions, loss)


def test_beginnings_are_of_documents_and_end_before_the_answer() -> None:
    batch, how = chats(), OnPolicy(1.0, prompt_tokens=5, new_tokens=10)
    found = {
        tuple(beginnings(batch, how, NoiseKey(0, step, 0, 1), 999, ())[0].tolist())
        for step in range(20)
    }
    assert found == {(5, 6, 7, 8), (17, 18, 19, 20, 21)}
    # Room for the new ones is kept; an end of a text, and what fills a block, is not gone on from.
    short = replace(how, new_tokens=22)
    for step in range(6):
        assert len(beginnings(batch, short, NoiseKey(0, step, 0, 1), 999, ())[0]) == 2
        (cut,) = beginnings(batch, how, NoiseKey(0, step, 0, 1), 7, (21,))
        assert cut.tolist() in ([5, 6], [17, 18, 19, 20])
    empty = TextBatch(batch.tokens, torch.full_like(batch.segments, -1), batch.positions)
    assert beginnings(empty, how, NoiseKey(0, 0, 0, 1), 999, ())[0].tolist() == [5]


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "an encoder": (("bert", "mdlm"), "reads both sides of every token"),
    "a learnt schedule": (
        ("llama", "mdlm", "noise.schedule=learned", "noise.classes=2", "noise.draw=time",
         "noise.exponent_rate=0.01", "noise.complementary=false"),
        "no bound that exponents",
    ),
    "the uniform kernel": (
        ("llama", "bd3lm", "noise.kernel=uniform", "noise.discrete_steps=100"), "masks none",
    ),
    "drafts": (("llama", "kept", "noise.draw=draft"), "the base's own text"),
    "annealing": (("llama", "bd3lm", "training.attention_annealing_steps=5"), "ends with"),
    "compile": (("llama", "bd3lm", "training.compile=true"), "have every width"),
    "remasking": (("llama", "bd3lm", "generation.remasking=random"), "for good"),
    "no training": (("llama", "bd3lm", "training.method=none"), "nothing is trained"),
    "too long": (
        ("llama", "bd3lm", f"{FIELD}.new_tokens=60", "data.sequence_length=64"),
        "more than data.sequence_length 64",
    ),
    "nothing": (
        ("llama", "bd3lm", f"{FIELD}.share=0", f"{FIELD}.new_tokens=5"), "does nothing while",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_so_is_refused_beforehand(
    case: str, source_cache: SourceFactory
) -> None:
    (family, target, *more), said = REFUSED[case]
    kept = ["--lora", "4", "--keep-base"] if target == "kept" else []
    block = [] if target == "mdlm" else ["--block", "8"]
    on = () if any("share" in one for one in more) else (f"{FIELD}.share=1",)
    sets = [part for one in (*on, *more) for part in ("--set", one)]
    to = "mdlm" if target == "mdlm" else "bd3lm"
    line = ["check", str(source_cache(family)), "--to", to, *block, *kept, *sets]
    result = CliRunner().invoke(app, line)
    assert result.exit_code in (2, 3), result.output
    assert said in " ".join(result.output.split())


def test_no_process_writes_alone_where_weights_are_gathered_by_all(
    source_cache: SourceFactory, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(
        {"source": "x", "target": "mdlm", "training": {"on_policy": {"share": 1}}}
    )
    source = inspect_source(str(source_cache("llama")))
    for strategy, stage, said in (("zero", 3, "ZeRO-3"), ("fsdp1", 3, "FSDP do"), ("zero", 2, ""),
                                  ("ddp", 0, ""), ("fsdp2", 3, "")):  # fmt: skip
        launch = Launch(processes=2, strategy=strategy, stage=stage)
        if not said:
            assert make_plan(recipe, source, launch=launch).recipe.training.learns_from_base
            continue
        with pytest.raises(IncompatibleError, match=said) as caught:
            make_plan(recipe, source, launch=launch)
        assert "fsdp2.yaml" in str(caught.value.hint)


def test_the_plan_counts_what_is_written(source_cache: SourceFactory) -> None:
    source = inspect_source(str(source_cache("llama")))

    def of(target: str, share: float, **generation: Any) -> tuple[float, Any, Recipe]:
        recipe = Recipe.model_validate(
            {
                "source": "x",
                "target": target,
                "block_size": 8 if target == "bd3lm" else None,
                "data": {"sequence_length": 96},
                "training": {"on_policy": {"share": share, "new_tokens": 60} if share else {},
                             "distillation": {"weight": 0.5}},
                "generation": generation,
            }
        )  # fmt: skip
        shape = make_plan(recipe, source).shape
        assert shape is not None
        memory = peak_memory(shape, recipe, gpu=True, bf16=True, flex=True,
                             sharing=Sharing.all_by(2))  # fmt: skip
        return flops_per_token(shape, recipe, sparse=True), memory, recipe

    for target, forwards, few in (("bd3lm", 8 * 9, 8 * 3), ("mdlm", 60, 2)):
        none, without, _ = of(target, 0)
        half, memory, recipe = of(target, 0.5)
        whole, _, _ = of(target, 1.0)
        assert writing(recipe).forwards == forwards
        assert writing(of(target, 1.0, max_denoising_steps=2)[2]).forwards == few
        # Half of the steps take half of the writing, which all forwards of a text make dear.
        assert whole - half == pytest.approx(half - none) and whole > 1.3 * none
        assert without.writing == 0 < memory.writing and memory.total >= without.total
        assert memory.writing > 2 * source.parameters  # All of what two devices share.


def test_check_says_how_often_and_how_much(source_cache: SourceFactory) -> None:
    line = ["check", str(source_cache("llama")), "--to", "bd3lm", "--block", "8", "--steps", "40",
            "--set", f"{FIELD}.share=0.25"]  # fmt: skip
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.output
    assert (
        "in 10 of them the model writes its text: 64 tokens behind 32 (of a chat, what stands "
        "before its answer), in at most 72 forwards" in (" ".join(shown.output.split()))
    )
    plan = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)
    assert plan["on_policy"] == {"steps": 10, "prompt_tokens": 32, "new_tokens": 64, "forwards": 72}


def test_the_preset_is_a_recipe(source_cache: SourceFactory) -> None:
    line = ["check", str(source_cache("qwen3")), "--preset", "opdlm", "--json",
            "--set", "data.sequence_length=64", "--set", f"{FIELD}.new_tokens=32"]  # fmt: skip
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert plan["on_policy"]["steps"] == plan["training"]["steps"] == 2400
    assert plan["training"]["distillation"]["top_k"] == 16 and plan["block_size"] == 4
