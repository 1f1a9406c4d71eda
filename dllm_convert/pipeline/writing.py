"""The stage in which the base writes what is trained on, shared by all processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dllm_convert.pipeline.context import Run, Stage
from dllm_convert.pipeline.measures import measured_in
from dllm_convert.pipeline.results import Recorded
from dllm_convert.pipeline.stages import MATERIALISE


def prepare_writing(run: Run) -> None:
    """Write down what the base is asked; the first process's work, before the others join."""
    from dllm_convert.training.base_text import prepare_prompts

    data = run.plan.recipe.data
    with run.reporter.task(f"find prompts in {data.source}"):
        prepare_prompts(data, run.tokenizer, run.written)


def _write(run: Run) -> Recorded:
    """Have the base write; of several processes each has to call it."""
    from dllm_convert.training.base_text import Writing, gather, prepare_prompts, write_share
    from dllm_convert.training.consensus import barrier

    recipe, adapter = run.plan.recipe, run.plan.adapter
    asked = recipe.data.write_with_base
    count = prepare_prompts(recipe.data, run.tokenizer, run.written)
    how = Writing(
        *(asked.max_new_tokens, asked.temperature, asked.top_p, asked.batch_size),
        recipe.training.seed,
        _ends(run.untrained),
    )

    def base() -> Any:
        from dllm_convert.modeling.loading import load_base

        settings = measured_in(run)
        if run.place.world > 1 and settings["device"] != "cpu":
            from accelerate import PartialState

            settings |= {"device": str(PartialState().device)}
        fetched = run.found(MATERIALISE)
        return load_base(
            Path(fetched.folder) if fetched else run.source.folder, adapter, **settings
        )

    with run.reporter.task("the base writes", total=-(-count // run.place.world)) as task:
        write_share(base, run.tokenizer, run.written, how, run.place, task.advance)
    barrier()
    if not run.place.main:
        return Recorded({})
    facts = gather(run.written, how)
    share = facts["ended"] / facts["prompts"]
    run.reporter.line(
        f"the base wrote {facts['rows']:,} texts, {facts['tokens']:,} tokens; {share:.0%} came to "
        f"an end within {asked.max_new_tokens} tokens"
    )
    return Recorded(facts)


def _ends(untrained: Path) -> tuple[int, ...]:
    """Return the tokens that end a text, as the conversion's decoding knows them."""
    path = untrained / "generation_config.json"
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)


WRITE = Stage("write", Recorded, _write, loads=True)
