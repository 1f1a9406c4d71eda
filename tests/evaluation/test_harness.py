"""The released lm-eval runs our model: tasks over local files, and each of its requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install dllm-convert[eval]")

from tasks_on_disk import NAMES, answers, evaluate, write_tasks

from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.evaluation.harness import DiffusionLM, item_of
from dllm_convert.evaluation.subject import EvaluatedCheckpoint

QUICK = {"rounds": 2, "draws": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def folders(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for target in ("mdlm", "bd3lm"):
        convert(source_cache("llama"), root / target, target, block=4)
    return {target: root / target for target in ("mdlm", "bd3lm")}


@pytest.fixture(scope="module", params=["mdlm", "bd3lm"])
def subject(request: pytest.FixtureRequest, folders: dict[str, Path]) -> EvaluatedCheckpoint:
    return EvaluatedCheckpoint.load(folders[request.param])


def likelihood(model: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(
        [asked("loglikelihood", pair, number) for number, pair in enumerate(pairs)]
    )
    return found


def written(model: Any, *prompts: str, **options: Any) -> list[str]:
    options = {"max_gen_toks": 6, "until": [], **options}
    requests = [
        asked("generate_until", (prompt, options), number) for number, prompt in enumerate(prompts)
    ]
    texts: list[str] = model.generate_until(requests)
    return texts


def asked(kind: Any, arguments: tuple[Any, ...], number: int, task: str = "a") -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, (task, number, 1))


def test_batch_size_changes_no_score(subject: EvaluatedCheckpoint, tasks: Path) -> None:
    runs = [
        answers(evaluate(DiffusionLM(subject=subject, batch_size=size, **QUICK), tasks)["samples"])
        for size in (1, 3, 8)
    ]
    for other in runs[1:]:
        assert runs[0].keys() == other.keys()
        for (task, number), mine in runs[0].items():
            theirs = other[task, number]
            if task == "capitals":
                assert [writes for _, writes in mine] == [writes for _, writes in theirs]
                mine, theirs = [nats for nats, _ in mine], [nats for nats, _ in theirs]
            if task == "writing":
                assert mine == theirs
            else:
                assert mine == pytest.approx(theirs, abs=1e-4)
    assert {task for task, _ in runs[0]} == set(NAMES)
    assert any(runs[0]["writing", number] != [""] for number in range(3))


@pytest.mark.parametrize(("given", "told"), [("auto", True), ("auto:4", True), (8, False)])
def test_an_automatic_batch_size_says_what_it_is(
    subject: EvaluatedCheckpoint, capsys: pytest.CaptureFixture[str], given: Any, told: bool
) -> None:
    assert DiffusionLM(subject=subject, batch_size=given).batch_size == 8
    assert ("8 texts at once" in capsys.readouterr().err) is told


def test_a_padded_prompt_is_continued_as_if_it_were_alone(subject: EvaluatedCheckpoint) -> None:
    model = DiffusionLM(subject=subject, batch_size=8)
    prompts = ["A", "The value of a name is an object", "A list of " * 6]
    assert written(model, *prompts) == [written(model, prompt)[0] for prompt in prompts]


def test_choices_of_different_length_are_scored_as_if_alone(subject: EvaluatedCheckpoint) -> None:
    model = DiffusionLM(subject=subject, confidence=1.0, **QUICK)
    pairs = [("A list", " of"), ("A list", " of many items in their order"), ("A list", "")]
    together = model.loglikelihood([asked("loglikelihood", pair, 0) for pair in pairs])
    alone = [model.loglikelihood([asked("loglikelihood", pair, 0)])[0] for pair in pairs]
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone], abs=1e-4)
    assert together[2][0] == 0, "an empty continuation costs nothing"
    assert alone[2] == (0.0, True), "and anything writes it"
    assert together[1][0] < together[0][0] < 0


def test_a_prompt_longer_than_the_context_loses_its_beginning(subject: EvaluatedCheckpoint) -> None:
    model = DiffusionLM(subject=subject, **QUICK)
    end = "and the value of a name is"
    long = [f"{start} " * 300 + end for start in ("one", "two")]
    assert len(subject.encode(long[0])) > subject.context
    scores = likelihood(model, (long[0], " an object"))
    assert -200 < scores[0][0] < 0
    texts = written(model, *long, max_gen_toks=4)
    assert len(texts) == 2
    with pytest.raises(IncompatibleError, match="do not fit into 256 tokens"):
        written(model, "A list", max_gen_toks=256)


def test_an_end_token_in_a_prompt_ends_nothing(subject: EvaluatedCheckpoint) -> None:
    """A conversation has one after every turn (dLLM's issue 86 is about what follows there)."""
    model = DiffusionLM(subject=subject, **QUICK)
    end = subject.tokenizer.eos_token
    one, two = (f"A {word}{end}The value of a name" for word in ("list", "number"))
    assert subject.tokenizer.eos_token_id in subject.encode(one)
    found = subject.write([subject.encode(one)], 5, [0], eos_token_id=None)
    assert found.new_tokens == (5,)
    (text,) = written(model, one)
    assert not text.startswith("The value")
    # What stands before the end token is still read.
    scores = [model.loglikelihood([asked("loglikelihood", (p, " is"), 0)])[0] for p in (one, two)]
    assert scores[0][0] != pytest.approx(scores[1][0], abs=1e-6)


def test_rolling_likelihood_is_the_sum_of_its_windows(subject: EvaluatedCheckpoint) -> None:
    model = DiffusionLM(subject=subject, max_length=24, **QUICK)
    text = "The value of a name is an object. A list holds items in their order. " * 3
    (whole,) = model.loglikelihood_rolling([asked("loglikelihood_rolling", (text,), 0)])
    tokens = subject.encode(text, special=False)
    windows = list(model._windows(tokens))
    assert len(windows) > 2
    assert [token for _, scored in windows for token in scored] == tokens
    assert all(len(given) + len(scored) <= 24 for given, scored in windows)
    assert whole == pytest.approx(_sum_of(model, text, windows), abs=1e-3)


def _sum_of(model: DiffusionLM, text: str, windows: list[tuple[list[int], list[int]]]) -> float:
    from dllm_convert.evaluation.continuation import Continuation
    from dllm_convert.evaluation.harness import item_number

    return -sum(
        float(
            model._score(
                [Continuation((*given, *scored), len(given), item_number(f"{place} {text}"))], None
            ).nats[0]
        )
        for place, (given, scored) in enumerate(windows)
    )


def full_vocabulary(make: Any, family: str) -> Path:
    """A source whose conversion grows by the mask's row alone: one short of a multiple of 64."""
    from transformers import AutoTokenizer

    length = len(AutoTokenizer.from_pretrained(make(family)))
    missing = (63 - length) % 64
    folder: Path = make(family, vocab_padding=missing)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<unused {number}>" for number in range(missing)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_blocks_of_one_have_the_likelihood_of_the_base(
    family: str, source_factory: Any, tmp_path: Path
) -> None:
    """Of an untrained conversion; the mask, which is never written, has a row of its own."""
    from lm_eval.models.huggingface import HFLM

    source = full_vocabulary(source_factory, family)
    plan = convert(source, tmp_path / "one", "bd3lm", block=4)
    assert plan.mask.rows_after == plan.mask.rows_before + 1
    model = DiffusionLM(str(tmp_path / "one"), block_size=1, rounds=1, draws=1)
    config = model.subject.model.config
    stated = (config.block_size, config.diffusion["block_size"])
    assert {*stated, model.subject.model.generation_config.block_size} == {1}
    base = HFLM(pretrained=str(source), dtype="float32", device="cpu", batch_size=2)
    pairs = [
        ("The value of a name", " is an object"),
        ("A list", " holds items"),
        ("Text " * 20, " ends"),
        ("", "The"),
    ]
    requests = [asked("loglikelihood", pair, number) for number, pair in enumerate(pairs)]
    exact = base.loglikelihood(requests, disable_tqdm=True)
    found = model.loglikelihood(requests)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in exact], abs=1e-4)
    assert [writes for _, writes in found] == [writes for _, writes in exact]


def test_a_question_is_its_task_and_place() -> None:
    """BLiMP asks everything without a context; WinoGrande asks one question with two contexts."""
    same = [item_of(asked("loglikelihood", ("", text), 0)) for text in ("one", "two")]
    assert same[0] == same[1]
    assert item_of(asked("loglikelihood", ("", "one"), 1)) != same[0]
    assert item_of(asked("loglikelihood", ("", "one"), 0, "b")) != same[0]
    contexts = [item_of(asked("loglikelihood", (text, "x"), 0)) for text in ("he", "she")]
    assert contexts[0] == contexts[1] != same[0]


def test_requests_that_are_repeated(folders: dict[str, Path]) -> None:
    """Scores are the same and cost nothing; texts are drawn anew, reproducibly."""
    model = DiffusionLM(subject=EvaluatedCheckpoint.load(folders["bd3lm"]), **QUICK)
    pair = asked("loglikelihood", ("A list", " of items"), 0)
    first, second = model.loglikelihood([pair, pair])
    assert first == second
    assert model.effort.draws == model.effort.most_draws == 4
    options = {"max_gen_toks": 8, "until": [], "do_sample": True, "temperature": 1.0}
    requests = [asked("generate_until", ("A list", options), 0)] * 3
    texts = model.generate_until(requests)
    assert len(set(texts)) == 3
    assert model.generate_until(requests) == texts


def test_chat_template(folders: dict[str, Path], source_cache: Any, tmp_path: Path) -> None:
    from factory import CHAT_TEMPLATE

    subject = EvaluatedCheckpoint.load(folders["mdlm"])
    model = DiffusionLM(subject=subject)
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    if not subject.tokenizer.chat_template:
        with pytest.raises(DataError, match="has no chat template"):
            model.apply_chat_template(turns)
        subject.tokenizer.chat_template = CHAT_TEMPLATE
    text = model.apply_chat_template(turns)
    assert text.endswith("Three?<|end|>\n<|start|>assistant\n")
    assert model.chat_template(True) == subject.tokenizer.chat_template
    assert model.chat_template(False) is None
    ids = subject.encode(text)
    assert ids.count(subject.tokenizer.bos_token_id) <= 1


def test_answers_are_cached(
    folders: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, cache = EvaluatedCheckpoint.load(folders["bd3lm"]), str(tmp_path / "cache")
    model = DiffusionLM(subject=subject, **QUICK)
    first = answers(evaluate(model, tasks, use_cache=cache)["samples"])

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(DiffusionLM, "_score", never)
    monkeypatch.setattr(DiffusionLM, "_write", never)
    assert answers(evaluate(model, tasks, use_cache=cache)["samples"]) == first


def _logged(out: Path) -> dict[tuple[str, int], Any]:
    samples = {
        path.name.split("_")[1]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.rglob("samples_*.jsonl"))
    }
    return answers(samples)


@pytest.mark.slow
def test_lm_eval_on_two_processes(folders: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    """Its own command line, started by Accelerate's launcher, has this one process's numbers."""
    from dllm_convert.pipeline.launch import launcher_arguments
    from dllm_convert.planning.launch import Launch

    two = Launch(processes=2, strategy="ddp")
    names = ("capitals", "writing")
    launch = ["-m", "accelerate.commands.launch", *launcher_arguments(two)]
    result = subprocess.run(
        [
            *(sys.executable, *launch, "-m", "dllm_convert", "lm-eval", "--model", "dllm-convert"),
            *("--model_args", f"pretrained={folders['bd3lm']},rounds=2,draws=2"),
            *("--tasks", ",".join(names), "--include_path", str(tasks), "--batch_size", "2"),
            *("--device", "cpu", "--output_path", str(tmp_path), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    model = DiffusionLM(str(folders["bd3lm"]), device="cpu", batch_size=8, **QUICK)
    here = answers(evaluate(model, tasks, names)["samples"])
    there = _logged(tmp_path)
    assert there.keys() == here.keys()
    for key, mine in here.items():
        if key[0] == "writing":
            assert there[key] == mine
        else:
            found = [float(nats) for nats, _ in there[key]]
            assert found == pytest.approx([nats for nats, _ in mine], abs=1e-4)
