"""What runs on a GPU, on the pretend one: how often the host waits, and how much is launched.

    python -m benchmarks.walk                    # all of it, a line of JSON per case
    python -m benchmarks.walk decode train       # some of it

Tiny models with random weights. `waits` and `kernels` are of one unit: a forward of decoding, a step
of training behind the first one, a call of anything else. Of decoding `small` are the kernels that
the model's own forward does not launch, and `blocks` the regions that were written in turn.
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
NEW = 32
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
    "recorded forms, 4 rows": (4, {}),
}
WINDOWS: dict[str, tuple[int, dict[str, Any]]] = {
    "windows, 4 rows": (4, {"block_length": 8}),
    "windows and threshold, 4 rows": (4, {"block_length": 8, "confidence_threshold": 0.05}),
    "windows, approximate cache, 4 rows": (4, {"block_length": 8, "approximate_cache": True}),
}
TRAINING: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("qwen2", "bd3lm", "full", {}),
    ("qwen2", "bd3lm", "uniform weights", {"training.loss_weight": "uniform"}),
    ("qwen2", "bd3lm", "complementary views", {"noise.complementary": True, "noise.views": 2}),
    ("qwen2", "bd3lm", "counts, bias", {"noise.draw": "count", "noise.position_bias": 0.1}),
    ("qwen2", "bd3lm", "uniform kernel", {"noise.kernel": "uniform", "noise.discrete_steps": 8}),
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
        "waited": {f"{kind} at {where}": n for (kind, where), n in seen.waits.most_common()},
    }


def decode(made: Checkpoints) -> Iterator[dict[str, Any]]:
    """Every way to decode: the tokens of the CPU where nothing is drawn."""
    for target in ("bd3lm", "mdlm"):
        model, plain = made.moved("qwen2", target), made.plain["qwen2", target]
        cases = DECODING if target == "bd3lm" else DECODING | WINDOWS
        for name, (rows, options) in cases.items():
            yield _decoded(model, plain, f"{target}: {name}", rows, options)
    yield _decoded(made.moved("bert", "mdlm"), made.plain["bert", "mdlm"], "bert: greedy", 2, {})


def _decoded(model: Any, plain: Any, name: str, rows: int, options: Any) -> dict[str, Any]:
    ids, mask = tokens(rows, 11), torch.ones(rows, 11, dtype=torch.long)
    mask[1:, :3] = 0
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    on_device = {"attention_mask": pretend.moved_tensor(mask), **settings}
    prompt = pretend.moved_tensor(ids)
    # What is launched, and waited for, once for a text is what two tokens more do not add.
    with forwards_apart(model) as inside, pretend.watching() as seen:
        output = model.generate(prompt, **on_device)
    expected = plain.generate(ids, attention_mask=mask, **settings)
    drawn = bool(options.get("temperature") or options.get("unmasking") == "random")
    size = getattr(model.config, "block_size", None) or options.get("block_length") or NEW
    return line(
        "decode",
        name,
        seen,
        output.forwards,
        inside={"waits": inside.waits.total(), "kernels": inside.kernels.total()},
        small=seen.kernels.total() / output.forwards,
        launched=dict(seen.kernels.most_common()),
        forwards=output.forwards,
        forwards_on_cpu=expected.forwards,
        blocks=-(-NEW // size) + 1,
        waits_in_all=seen.waits.total() + inside.waits.total(),
        same=None if drawn else torch.equal(output.sequences.cpu(), expected.sequences),
    )


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
        annealing=annealing_of(recipe.training),
    )
    pretend.move(model)
    device, plain = torch.device(pretend.NAME, 0), TrainingArguments.device
    trainer.unsound = trainer.unsound.to(device)
    trainer._sums = trainer._sums.to(device)
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
    from dllm_convert.diffusion.likelihood import autoregressive_nll, nats_at_rate, nelbo
    from dllm_convert.diffusion.objective import Objective, TextBatch
    from dllm_convert.evaluation.continuation import Continuation, Estimator, score_round
    from dllm_convert.training.consensus import Consensus

    text = tokens(2, 48)
    batch = TextBatch(text, torch.zeros_like(text), torch.arange(48).expand(2, -1))
    for target in ("bd3lm", "mdlm"):
        model = made.moved("qwen2", target)
        objective = Objective.from_config(model.config)
        texts = [
            Continuation(tuple(tokens(1, 20 + 3 * n)[0].tolist()), 9 + n, n) for n in range(3)
        ]
        works: dict[str, Callable[[], Any]] = {
            "nelbo": lambda m=model, o=objective: nelbo(m, [batch], o, seed=0),
            "nats_at_rate": lambda m=model, o=objective: nats_at_rate(
                m, [batch], o, (0.1, 0.5), seed=0
            ),
            "score_round": lambda m=model, o=objective: score_round(m, texts, o, Estimator(draws=2)),
            "autoregressive_nll": lambda m=model: autoregressive_nll(
                m, [batch], m.config.vocab_size
            ),
        }
        for name, work in works.items():
            with pretend.watching() as seen:
                work()
            yield line("measure", f"{target}: {name}", seen, 1)
    flag = torch.zeros((), dtype=torch.bool, device=pretend.NAME)
    consensus = Consensus(flag.device)
    for number in range(2):
        with pretend.watching() as seen:
            consensus.any(flag, False, True)
        yield line("measure", f"Consensus.any, call {number + 1}", seen, 1)


GROUPS = {"decode": decode, "train": train, "measure": measure}


def main() -> None:
    """Run some groups and print a line of JSON per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=list(GROUPS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        made = Checkpoints(Path(folder))
        pretend.register()
        for group in asked.groups:
            for found in GROUPS[group](made):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
