"""What runs on a GPU, on the pretend one: how often the host waits, and how much is launched.

    python -m benchmarks.walk                    # all of it, a line of JSON per case
    python -m benchmarks.walk decode train       # some of it

Tiny models with random weights, blocks of 8. `waits` and `kernels` are of one step of training
behind the first ones, or of one call. Of decoding they are of one forward more: what a longer text
takes beyond a shorter one; `once` is the rest. Kernels that the stock model launches are left out
there, its head's stays in. `late` are copies to the host that it did not wait for.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch

from benchmarks import pretend
from dllm_convert.adapters import get_adapter
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.modeling.loading import load_model

MODELS = (("qwen2", "bd3lm"), ("qwen2", "mdlm"), ("bert", "mdlm"))
NEW = (32, 64)
"""Tokens of the shorter text and of the longer one."""
DECODING: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {}),
    "greedy, 4 rows": (4, {}),
    "steps, 4 rows": (4, {"max_denoising_steps": 4}),
    "threshold": (1, {"confidence_threshold": 0.05}),
    "threshold, 4 rows": (4, {"confidence_threshold": 0.05}),
    "temperature and seed": (1, {"temperature": 1.0, "seed": 3}),
    "temperature and seed, 4 rows": (4, {"temperature": 1.0, "seed": 3}),
    "temperature, top-p, 4 rows": (4, {"temperature": 0.7, "top_p": 0.9}),
    "entropy bound, 4 rows": (4, {"entropy_bound": 0.5}),
    "random order and seed, 4 rows": (4, {"unmasking": "random", "seed": 1}),
    "guidance, 4 rows": (4, {"guidance_scale": 1.5}),
    "remasking, 4 rows": (4, {"remasking": "low_confidence", "max_denoising_steps": 8}),
}
WHOLE: dict[str, tuple[int, dict[str, Any]]] = {
    name: DECODING[name]
    for name in ("greedy", "greedy, 4 rows", "threshold, 4 rows", "temperature and seed, 4 rows")
} | {
    "windows, 4 rows": (4, {"block_length": 8}),
    "windows and threshold, 4 rows": (4, {"block_length": 8, "confidence_threshold": 0.05}),
    "windows, approximate cache, 4 rows": (4, {"block_length": 8, "approximate_cache": True}),
}
TRAINING: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("qwen2", "bd3lm", "full", {}),
    ("qwen2", "bd3lm", "uniform weights", {"training.loss_weight": "uniform"}),
    ("qwen2", "bd3lm", "complementary views", {"noise.complementary": True, "noise.views": 2}),
    ("qwen2", "bd3lm", "counts, bias", {"noise.draw": "count", "noise.position_bias": 0.1}),
    (
        "qwen2",
        "bd3lm",
        "uniform kernel",
        {
            "noise.kernel": "uniform",
            "noise.discrete_steps": 8,
            "noise.draw": "time",
            "noise.complementary": False,
        },
    ),
    ("qwen2", "bd3lm", "checkpointing off", {"training.gradient_checkpointing": "off"}),
    ("qwen2", "bd3lm", "checkpointing full", {"training.gradient_checkpointing": "full"}),
    ("qwen2", "bd3lm", "lora", {"training.method": "lora"}),
    (
        "qwen2",
        "bd3lm",
        "lora, mask row",
        {"training.method": "lora", "training.lora.embeddings": "mask_row"},
    ),
    ("qwen2", "mdlm", "full", {}),
    (
        "qwen2",
        "mdlm",
        "annealing, mask noise",
        {
            "training.attention_annealing_steps": 10,
            "training.mask_noise_std": 0.1,
            "training.mask_noise_steps": 10,
        },
    ),
    ("bert", "mdlm", "full", {}),
)


class Checkpoints:
    """Tiny conversions, loaded on the CPU; `moved` ones are on the device."""

    def __init__(self, root: Path) -> None:
        from conversion import convert
        from factory import make_source

        self.root, self.folders, self.plain = root, {}, {}
        for family, target in MODELS:
            base = make_source(root / f"base-{family}-{target}", family)
            folder = root / f"out-{family}-{target}"
            convert(base, folder, target)
            self.folders[family, target] = folder
            self.plain[family, target] = load_model(folder, get_adapter(family))

    def copy(self, family: str, target: str) -> Any:
        """A model that may be trained or moved."""
        return copy.deepcopy(self.plain[family, target])

    def moved(self, family: str, target: str) -> Any:
        """A model on the device."""
        return pretend.move(self.copy(family, target))


def tokens(rows: int, length: int) -> torch.Tensor:
    """The same random tokens in every run."""
    return torch.randint(5, 30, (rows, length), generator=torch.Generator().manual_seed(1))


@contextmanager
def forwards_apart(model: Any) -> Iterator[pretend.Seen]:
    """Have what the stock model launches counted apart, not by whoever watches."""
    apart, base = pretend.Seen(), model.base_model
    forward = base.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with pretend.watching() as seen:
            output = forward(*args, **kwargs)
        apart.waits.update(seen.waits)
        apart.kernels.update(seen.kernels)
        return output

    base.forward = run
    try:
        yield apart
    finally:
        del base.forward


def line(group: str, name: str, seen: pretend.Seen, units: int, **more: Any) -> dict[str, Any]:
    """What was seen, per unit, and which lines waited."""
    return {
        "group": group,
        "name": name,
        "waits": seen.waits.total() / units,
        "kernels": seen.kernels.total() / units,
        "late": seen.late.total() / units,
        **more,
        "waited": {f"{kind} at {where}": n for (kind, where), n in seen.waits.most_common() if n},
    }


def decode(made: Checkpoints) -> Iterator[dict[str, Any]]:
    """Every way to decode: the tokens of the CPU where nothing is drawn."""
    for target in ("bd3lm", "mdlm"):
        model, plain = made.moved("qwen2", target), made.plain["qwen2", target]
        cases = DECODING if target == "bd3lm" else WHOLE
        for name, (rows, options) in cases.items():
            yield _decoded(model, plain, f"{target}: {name}", rows, options)
    yield _decoded(made.moved("bert", "mdlm"), made.plain["bert", "mdlm"], "bert: greedy", 2, {})


def _decoded(model: Any, plain: Any, name: str, rows: int, options: Any) -> dict[str, Any]:
    ids, mask = tokens(rows, 11), torch.ones(rows, 11, dtype=torch.long)
    mask[1:, :3] = 0
    drawn = bool(options.get("temperature") or options.get("unmasking") == "random")
    size = getattr(model.config, "block_size", None) or options.get("block_length")
    # Ends of text are looked for, and never there.
    common = {"suppress_tokens": [2], "eos_token_id": 2, "return_dict_in_generate": True, **options}
    pairs, forwards, same = [], [], []
    for new in NEW:
        given = {"max_new_tokens": new, **common}
        with forwards_apart(model) as inside, pretend.watching() as seen:
            output = model.generate(
                pretend.moved_tensor(ids), attention_mask=pretend.moved_tensor(mask), **given
            )
        expected = plain.generate(ids, attention_mask=mask, **given)
        seen.waits.update(inside.waits)
        pairs.append(seen)
        forwards.append(output.forwards)
        same.append(torch.equal(output.sequences.cpu(), expected.sequences))
    shorter, longer = pairs
    more = max(forwards[1] - forwards[0], 1)
    for part in ("waits", "kernels", "late"):
        getattr(longer, part).subtract(getattr(shorter, part))
    per_forward = line("decode", name, longer, more)
    blocks = (NEW[1] - NEW[0]) / size if size else None
    return per_forward | {
        "waits_per_block": None if blocks is None else longer.waits.total() / blocks,
        "launched": {name: n / more for name, n in longer.kernels.most_common() if n},
        "once": shorter.waits.total() - longer.waits.total() / more * forwards[0],
        "forwards": forwards,
        "same": None if drawn else all(same),
    }


def train(made: Checkpoints) -> Iterator[dict[str, Any]]:
    """One step of training behind the first ones, from the batch to the gradients."""
    for family, target, name, overrides in TRAINING:
        step = _step_of(made, family, target, {"training.method": "full", **overrides})
        step()
        step()
        with pretend.watching() as seen:
            step()
        yield line("train", f"{family} {target}: {name}", seen, 1)


def _step_of(made: Checkpoints, family: str, target: str, overrides: Any) -> Callable[[], None]:
    from transformers import TrainingArguments

    from dllm_convert.recipe.loading import load_recipe
    from dllm_convert.training.asked import annealing_of, process_of, weights_of
    from dllm_convert.training.checkpointing import checkpoint_activations
    from dllm_convert.training.run import _arguments
    from dllm_convert.training.setup import make_trainable
    from dllm_convert.training.trainer import DiffusionTrainer

    given = {
        "target": target,
        "block_size": 8 if target == "bd3lm" else None,
        "training.attention": "sdpa",
        "training.precision": "fp32",
        "data.sequence_length": 64,
    }
    recipe = load_recipe(str(made.folders[family, target]), overrides=given | overrides)
    model = made.copy(family, target)
    checkpoint_activations(model, recipe.training.gradient_checkpointing)
    model = make_trainable(model, get_adapter(family), recipe.training)
    trainer = DiffusionTrainer(
        model=model,
        args=_arguments(recipe, made.root / "unused/.work/trainer", False, False),
        process=process_of(recipe.noise),
        weights=weights_of(recipe.training),
        annealing=annealing_of(recipe),
    )
    pretend.move(model)
    device, plain = torch.device(pretend.NAME, 0), TrainingArguments.device
    trainer.unsound = trainer.unsound.to(device)
    trainer.counts.to(device)
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        TrainingArguments.device = property(lambda self: device)  # type: ignore[assignment]
        try:
            columns = {"input_ids": tokens(2, 64)}
            batches, _ = trainer.get_batch_samples(iter([columns]), 1, device)
            trainer.training_step(model, dict(batches[0]))
            trainer.state.global_step += 1
        finally:
            TrainingArguments.device = plain  # type: ignore[method-assign]

    return step


def measure(made: Checkpoints) -> Iterator[dict[str, Any]]:
    """Likelihoods, scores, and what the ranks of a training ask each other."""
    from transformers import AutoModelForCausalLM

    from dllm_convert.diffusion.likelihood import autoregressive_nll, nats_at_rate, nelbo
    from dllm_convert.diffusion.objective import Objective, TextBatch
    from dllm_convert.evaluation.continuation import Continuation, Estimator, score_round
    from dllm_convert.evaluation.text import Stock
    from dllm_convert.sampling.run import decode_samples, recorder_of
    from dllm_convert.source.tokenizer_loading import load_tokenizer

    text = tokens(2, 48)
    batch = TextBatch(text, torch.zeros_like(text), torch.arange(48).expand(2, -1))
    texts = [Continuation(tuple(tokens(1, 20 + 3 * n)[0].tolist()), 9 + n, n) for n in range(3)]
    for target in ("bd3lm", "mdlm"):
        model = made.moved("qwen2", target)
        objective = Objective.from_config(model.config)
        works: dict[str, Callable[[], Any]] = {
            "nelbo": partial(nelbo, model, [batch], objective, seed=0),
            "nats_at_rate": partial(nats_at_rate, model, [batch], objective, (0.1, 0.5), seed=0),
            "score_round": partial(score_round, model, texts, objective, Estimator(draws=2)),
            "autoregressive_nll": partial(
                autoregressive_nll, model, [batch], model.config.vocab_size
            ),
        }
        if target == "bd3lm":
            base = AutoModelForCausalLM.from_pretrained(made.root / "base-qwen2-bd3lm")
            stock, rows = Stock(pretend.move(base)), base.config.vocab_size
            works["autoregressive_nll of the base"] = partial(
                autoregressive_nll, stock, [batch], rows
            )
        for name, work in works.items():
            with pretend.watching() as seen:
                work()
            yield line("measure", f"{target}: {name}", seen, 1)
        tokenizer = load_tokenizer(made.folders["qwen2", target], int(model.config.vocab_size))
        for name, observer in (("", None), (", recorded", recorder_of(model))):
            with pretend.watching() as seen:
                found = decode_samples(
                    model, tokenizer, ["a b c", "line 1 of"], max_new_tokens=16, observer=observer
                )
            yield line("measure", f"{target}: decode_samples{name}", seen, found[0].forwards)
    consensus, flag = _consensus_of_cuda(), torch.zeros((), device=pretend.NAME)
    for number in range(3):
        with pretend.watching() as seen:
            consensus.any(flag, False, True)
        yield line("measure", f"Consensus.any, call {number + 1}", seen, 1)


def _consensus_of_cuda() -> Any:
    # It waits for nothing on CUDA alone, whose events are the ones it knows.
    from dllm_convert.training.consensus import Consensus

    class OnThisDevice(Consensus):
        def _on_device(self, answer: bool | torch.Tensor) -> torch.Tensor:
            self._device = torch.device(pretend.NAME, 0)
            found = super()._on_device(answer)
            self._device = torch.device("cuda", 0)
            return found

    cuda: Any = torch.cuda
    cuda.Event = type("Event", (), {"record": lambda self: None, "synchronize": lambda self: None})
    return OnThisDevice(torch.device("cuda", 0))


GROUPS = {"decode": decode, "train": train, "measure": measure}


def main() -> None:
    """Run some groups and print a line of JSON per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    asked = parser.parse_args()
    if unknown := sorted(set(asked.groups) - set(GROUPS)):
        parser.error(f"unknown groups {unknown}; known: {list(GROUPS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        made = Checkpoints(Path(folder))
        pretend.register()
        for group in asked.groups or GROUPS:
            for found in GROUPS[group](made):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
