"""Speed of decoding, against the textbook's, against the base and against itself.

    python -m benchmarks.sampling CONVERTED reference --prompt 64 --new 128 --steps 32
    python -m benchmarks.sampling CONVERTED reference --prompt 1024 --new 256 --steps 8
    python -m benchmarks.sampling CONVERTED batch --rows 8
    python -m benchmarks.sampling CONVERTED memory
    python -m benchmarks.sampling CONVERTED thresholds --base BASE
    python -m benchmarks.sampling CONVERTED approximate
    python -m benchmarks.sampling CONVERTED lossless --rows 8 --text HELD_OUT.txt
    python -m benchmarks.sampling OPENED lossless --base BASE

CONVERTED is a BD3LM that `dllm-convert run` wrote, BASE a folder with the weights it was made from.
Prompts are the beginning of the Python language reference. What is compared runs in turn, the other
way round every second time; of the ratios the median, least and largest are given. An untrained
CONVERTED serves as BASE too: it holds the same weights, and is loaded causal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import textbook_sampling
from benchmarks.devices import (
    add_device,
    chosen_device,
    current_device,
    peak_bytes,
    seconds,
)
from dllm_convert.common.allocator import keep_freed_memory
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.sampling.packing import packed_linears

THRESHOLDS = (0.7, 0.9, 0.95)
Run = Callable[[], Any]


def alternate(first: Run, second: Run, pairs: int) -> tuple[dict[str, Any], Any, Any]:
    """Time two runs in turn; the ratio is second over first. Their last results follow."""
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            late, there = seconds(second)
            early, here = seconds(first)
        else:
            early, here = seconds(first)
            late, there = seconds(second)
        times.append((early, late))
    ratios = [late / early for early, late in times]
    figures = {
        "first_s": statistics.median(early for early, _ in times),
        "second_s": statistics.median(late for _, late in times),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "largest": max(ratios),
        "pairs": pairs,
    }
    return figures, here, there


class Stopwatch:
    """Time that a model spends in its forward passes."""

    def __init__(self, model: Any) -> None:
        self.seconds, self.calls, forward = 0.0, 0, model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            spent, output = seconds(lambda: forward(*args, **kwargs))
            self.seconds += spent
            self.calls += 1
            return output

        model.forward = timed


def prompt_of(tokenizer: Any, length: int, rows: int = 1) -> torch.Tensor:
    """Tokens of the language reference, shape (rows, length), each row from another place."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[: 40 * length * rows + 20_000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    prompts = torch.stack([ids[row * length : (row + 1) * length] for row in range(rows)])
    return prompts.to(current_device())


def generate(model: Any, *args: Any, **settings: Any) -> Any:
    """Decode as `sample` and `evaluate` do, with packed weights."""
    with packed_linears(model):
        return model.generate(*args, **settings)


def against_reference(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Same tokens, less time."""
    prompt = prompt_of(tokenizer, args.prompt)
    settings = {"max_new_tokens": args.new, "max_denoising_steps": args.steps, "eos_token_id": None}

    watch, shares = Stopwatch(model), []

    def ours() -> torch.Tensor:
        watch.seconds, watch.calls = 0.0, 0
        total, tokens = seconds(lambda: generate(model, prompt, **settings)[0, args.prompt :])
        shares.append((watch.seconds / total, watch.calls))
        found: torch.Tensor = tokens
        return found

    def textbooks() -> torch.Tensor:
        return textbook_sampling.decode(model, prompt, args.new, args.steps)

    generate(model, prompt[:, :40], max_new_tokens=4)
    figures, mine, theirs = alternate(ours, textbooks, args.pairs)
    return {
        **figures,
        "same_tokens": float((mine == theirs).float().mean()),
        "forwards": shares[-1][1],
        "share_in_forwards": statistics.median(share for share, _ in shares),
    }


def against_one_row(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of a batch over those of one row."""
    prompts = prompt_of(tokenizer, args.prompt, args.rows)
    settings = {"max_new_tokens": args.new, "max_denoising_steps": args.steps, "eos_token_id": None}
    figures, _, _ = alternate(
        lambda: generate(model, prompts, **settings),
        lambda: generate(model, prompts[:1], **settings),
        args.pairs,
    )
    return {**figures, "throughput": figures["ratio"] * args.rows}


def peak_memory(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of processes that decode the same text in more and more steps."""
    if args.child:
        prompt = prompt_of(tokenizer, args.prompt)
        generate(
            model, prompt, max_new_tokens=64, max_denoising_steps=args.steps, eos_token_id=None
        )
        return {"mib": peak_bytes() / 2**20}
    found = {}
    for steps in (1, 8, 32):
        command = [sys.executable, "-m", "benchmarks.sampling", args.converted, "memory"]
        command += ["--child", "--steps", str(steps), "--prompt", str(args.prompt)]
        command += ["--device", args.device]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{steps} steps per block"] = json.loads(done.stdout.splitlines()[-1])["mib"]
    return found


def nelbo(model: Any, text: torch.Tensor, given: int) -> float:
    """The model's own NELBO of the tokens behind `given`, nats per token, 16 draws per block."""
    size, mask = model.config.block_size, model.config.mask_token_id
    shift = int(model.config.diffusion["token_shift"])
    device, total = text.device, 0.0
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for start in range(given // size * size, len(text), size):
            block = text[start : start + size]
            places = torch.arange(start, start + len(block), device=device)
            new = places >= given
            for draw in range(16):
                t = (draw + torch.rand(1, generator=generator, device=device)) / 16
                drawn = torch.rand(len(block), generator=generator, device=device)
                hidden = new & (drawn < t)
                noisy = torch.cat([text[:start], block.masked_fill(hidden, mask)])
                logits = model(noisy[None], use_cache=False).logits[0]
                if hidden.any():
                    nats = torch.nn.functional.cross_entropy(
                        logits[places[hidden] - shift], block[hidden], reduction="sum"
                    )
                    total += float(nats / t) / 16
    return total / (len(text) - given)


def against_base(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second at confidence thresholds, beside the base's own decoding."""
    config = AutoConfig.from_pretrained(args.base, trust_remote_code=False, is_causal=True)
    base: Any = AutoModelForCausalLM.from_pretrained(
        args.base, config=config, dtype=torch.float32, trust_remote_code=False
    )
    base = base.to(current_device())
    prompt = prompt_of(tokenizer, args.prompt)
    own = {"max_new_tokens": args.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def autoregressive() -> torch.Tensor:
        tokens: torch.Tensor = base.generate(prompt, **own)[0]
        return tokens

    found: dict[str, Any] = {}
    careful = generate(model, prompt, max_new_tokens=args.new, eos_token_id=None)[0]
    for threshold in THRESHOLDS:

        def ours(limit: float = threshold) -> Any:
            return generate(
                model,
                prompt,
                max_new_tokens=args.new,
                confidence_threshold=limit,
                eos_token_id=None,
                return_dict_in_generate=True,
            )

        figures, output, _ = alternate(ours, autoregressive, args.pairs)
        text = output.sequences[0]
        found[str(threshold)] = {
            **figures,
            "tokens_per_second": args.new / figures["first_s"],
            "base_tokens_per_second": args.new / figures["second_s"],
            "tokens_per_forward": output.tokens_per_forward,
            "agrees_with_one_per_forward": float((text == careful)[args.prompt :].float().mean()),
            "nelbo": nelbo(model, text, args.prompt),
        }
    found["one token per forward"] = {"nelbo": nelbo(model, careful, args.prompt)}
    return found


def approximate(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """MDLM with states kept from a window's first forward: time and what it changes."""
    del model.config.block_size
    prompt = prompt_of(tokenizer, args.prompt)
    settings = {
        "max_new_tokens": args.new,
        "max_denoising_steps": args.steps,
        "block_length": 32,
        "eos_token_id": None,
    }
    figures, kept, exact = alternate(
        lambda: generate(model, prompt, **settings, approximate_cache=True)[0, args.prompt :],
        lambda: generate(model, prompt, **settings)[0, args.prompt :],
        args.pairs,
    )
    parts = (exact == kept).view(-1, 32).float().mean(-1)
    return {
        **figures,
        "same_tokens": float((exact == kept).float().mean()),
        "same_per_window": [round(float(part), 3) for part in parts],
    }


QUESTIONS = (
    "What is a list comprehension?",
    "Explain recursion simply.",
    "Write a short story about a cat.",
    "How do I open a file in Python?",
    "What is the capital of France, and why is it famous?",
    "Give me three tips for sleeping better.",
    "What is photosynthesis?",
    "Summarise the rules of chess.",
)
"""What a chat model is asked; nothing here is in any text that the demo trains on."""


KEPT = ("tokens", "forwards", "verifier_forwards", "equal", "close", "looped")
"""What is counted of lossless decoding; forwards of a verifier that is another model apart."""


def lossless(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Drafts that are verified, beside greedy decoding of the verifier alone.

    That is the clean stream of the same weights, or with --base another model.
    """
    place = args.base or args.converted
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, is_causal=True)
    base: Any = AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=torch.float32, trust_remote_code=False
    )
    base = base.to(current_device())
    verifier = base if args.base else "base" if model.is_gated else "self"
    text = Path(args.text).read_text(encoding="utf-8") if args.text else None
    found: dict[str, Any] = {}
    for name, prompts in _prompts(tokenizer, text, args).items():
        ratios, kept = [], dict.fromkeys(KEPT, 0)
        for prompt in prompts:
            own = {"max_new_tokens": args.new, "eos_token_id": None}

            def ours(ids: torch.Tensor = prompt, own: dict[str, Any] = own) -> Any:
                more = {"verify_with": verifier, "return_dict_in_generate": True}
                with packed_linears(base) if args.base else nullcontext():
                    return generate(model, ids, **own, **more)

            def alone(ids: torch.Tensor = prompt, own: dict[str, Any] = own) -> torch.Tensor:
                more = {"do_sample": False, "pad_token_id": 0}
                # Without its mask it would guess one from the padding token, which a text may hold.
                with packed_linears(base):
                    tokens: torch.Tensor = base.generate(
                        ids, attention_mask=torch.ones_like(ids), **own, **more
                    )
                return tokens

            figures, mine, theirs = alternate(ours, alone, args.pairs)
            ratios.append(figures["ratio"])
            same = mine.sequences[0, len(prompt[0]) :] == theirs[0, len(prompt[0]) :]
            kept["tokens"] += len(same)
            kept["equal"] += int(same.sum())
            kept["forwards"] += mine.forwards
            kept["verifier_forwards"] += mine.verifier_forwards or 0
            kept["close"] += mine.close
            kept["looped"] += looped(theirs[0, len(prompt[0]) :].tolist())
        found[name] = {
            "tokens_per_forward": kept["tokens"] / kept["forwards"],
            "speed_over_the_base": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
            **kept,
        }
    return found


def looped(tokens: list[int], length: int = 8) -> int:
    """Count tokens of a text that end a run of `length` tokens which it had before.

    What a small model repeats is easy to draft: without this number drafts look better than they
    are.
    """
    seen: set[tuple[int, ...]] = set()
    count = 0
    for end in range(length, len(tokens) + 1):
        run = tuple(tokens[end - length : end])
        count += run in seen
        seen.add(run)
    return count


def _prompts(
    tokenizer: Any, text: str | None, args: argparse.Namespace
) -> dict[str, list[torch.Tensor]]:
    """Prompts of each kind, shape (1, length) each: text to go on from, and questions."""
    if text is None:
        plain = [
            prompt_of(tokenizer, args.prompt, args.rows)[row, None] for row in range(args.rows)
        ]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(current_device())
        step = max((ids.shape[1] - args.prompt) // args.rows, 1)
        plain = [ids[:, row * step :][:, : args.prompt] for row in range(args.rows)]
    found = {"text": plain}
    if tokenizer.chat_template:
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"].to(current_device())
            for question in QUESTIONS[: args.rows]
        ]
        found["chat"] = asked
    return found


MODES = {
    "lossless": lossless,
    "reference": against_reference,
    "batch": against_one_row,
    "memory": peak_memory,
    "thresholds": against_base,
    "approximate": approximate,
}


def main() -> None:
    """Run one comparison and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converted")
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--base")
    parser.add_argument("--text", help="a file of text that nothing was trained on")
    add_device(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = chosen_device(args)
    torch.set_num_threads(2)
    keep_freed_memory()  # as `dllm-convert sample` does
    with quiet_libraries():
        folder = Path(args.converted)
        loaded = load_checkpoint(folder, device=str(device))
        figures = MODES[args.mode](loaded.model, loaded.tokenizer, args)
    print(json.dumps({"mode": args.mode, **figures}), flush=True)


if __name__ == "__main__":
    main()
