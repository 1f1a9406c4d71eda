"""`evaluate --lossless`: the verifier's own score, in text that is written and in likelihoods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from gated import gated_folder

from dllm_convert.common.console import Reporter
from dllm_convert.evaluation.settings import Settings

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
QUIET = Reporter(quiet=True)
TEXTS = [
    ("The value of a name is", " an object that it is bound to"),
    ("The value of a name is", " a"),
    ("A list", " of items in their order, and what follows them " * 3),
]


def asked(kind: str, arguments: tuple[str, ...], number: int) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("task", number, 1))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_likelihood_is_the_base_s(family: str, source_cache: Any, tmp_path: Path) -> None:
    from dllm_convert.evaluation.base import AutoregressiveLM
    from dllm_convert.evaluation.harness import DiffusionLM

    source, folder = source_cache(family), tmp_path / "gated"
    gated_folder(source, folder)
    base = AutoregressiveLM(
        pretrained=str(source), device="cpu", dtype=torch.float32, batch_size=1, reporter=QUIET
    )
    settings = Settings(draws=1, rounds=1, generation={"verify_with": "base"})
    verified = DiffusionLM(str(folder), settings=settings, reporter=QUIET, batch_size=2)
    bound = DiffusionLM(str(folder), settings=Settings(draws=1, rounds=1), reporter=QUIET)
    choices = [asked("loglikelihood", pair, number) for number, pair in enumerate(TEXTS)]
    whole = [asked("loglikelihood_rolling", ("".join(pair),), n) for n, pair in enumerate(TEXTS)]
    for (ours, writes), (its, would) in zip(
        verified.loglikelihood(choices), base.loglikelihood(choices), strict=True
    ):
        assert ours == pytest.approx(its, abs=1e-3)
        assert writes == would
    ours_whole, its_whole = verified.loglikelihood_rolling(whole), base.loglikelihood_rolling(whole)
    if family == "llama":
        # lm-eval puts the mark of a beginning before the one that this tokenizer writes, and scores
        # it: one token more.
        assert all(0 < ours - its < 15 for ours, its in zip(ours_whole, its_whole, strict=True))
    else:
        assert ours_whole == pytest.approx(its_whole, abs=1e-3)
    # The bound of the diffusion is another number, so that this can fail.
    apart = [
        abs(one - other)
        for (one, _), (other, _) in zip(
            bound.loglikelihood(choices), base.loglikelihood(choices), strict=True
        )
    ]
    assert max(apart) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_another_model_verifies_what_an_opened_one_drafts(
    family: str, source_cache: Any, tmp_path: Path
) -> None:
    """Likelihoods and text are those of lm-eval's own model of the base, moved or not."""
    from dllm_convert.evaluation.base import AutoregressiveLM
    from dllm_convert.evaluation.harness import DiffusionLM
    from dllm_convert.source.inspect import inspect_source

    source, folder = source_cache(family), tmp_path / "opened"
    convert(source, folder, "bd3lm", block=8)
    its = AutoregressiveLM(
        pretrained=str(source), device="cpu", dtype=torch.float32, batch_size=1, reporter=QUIET
    )
    settings = Settings(draws=1, rounds=1, generation={"verify_with": "base"})
    ours = DiffusionLM(
        str(folder), settings=settings, reporter=QUIET, batch_size=2,
        verifier=inspect_source(str(source)),
    )  # fmt: skip
    choices = [asked("loglikelihood", pair, number) for number, pair in enumerate(TEXTS)]
    for (one, writes), (other, would) in zip(
        ours.loglikelihood(choices), its.loglikelihood(choices), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-3)
        assert writes == would
    wanted = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    writing = [
        asked("generate_until", (pair[0], dict(wanted)), number)
        for number, pair in enumerate(TEXTS)
    ]
    assert ours.generate_until(writing) == its.generate_until(writing)
    assert ours.effort.forwards > 0


def test_evaluate_settles_who_verifies_as_sample_does(source_cache: Any, tmp_path: Path) -> None:
    import dllm_convert as dc

    source, folder = source_cache("qwen2"), tmp_path / "opened"
    convert(source, folder, "bd3lm", block=8)
    with pytest.raises(dc.DataError, match="says nothing of the base"):
        dc.evaluate(folder, tasks=["dllm_copy"], lossless=True, reporter=QUIET)
    with pytest.raises(dc.RequestError, match="give `lossless` too"):
        dc.evaluate(folder, tasks=["dllm_copy"], base=source, reporter=QUIET)
    found = dc.evaluate(
        folder, tasks=["dllm_copy"], limit=2, lossless=True, base=source, against=source,
        out=tmp_path / "found", reporter=QUIET,
    ).as_dict()  # fmt: skip
    assert found["settings"]["verifier"] == source.name
    assert found["settings"]["generation"]["verify_with"] == "base"
    for row in found["results"]:
        assert row["difference"]["value"] == pytest.approx(0, abs=1e-4)
