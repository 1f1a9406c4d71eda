"""Speed of decoding on llama.cpp against ours on the same model, one thread each.

    python -m benchmarks.engines CONVERTED FILE.gguf [FILE.gguf ...] --new 64 --steps 8

FILE is what `dllm-convert export CONVERTED --to gguf` wrote; llama.cpp is the compiled one of the
extra `serve-gguf`. Both write the same text by the same rule, in turn, the other way round every
second time. Wall time says what somebody waits, and processor time what is computed where other
work takes the cores: of the ratios, ours over llama.cpp's, the median, least and largest are given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dllm_convert.common.allocator import keep_freed_memory
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.sampling.packing import packed_linears
from dllm_convert.serving.gguf_model import load_gguf

PROMPT = "The meaning of a name in a program is"


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return wall seconds, processor seconds and the result of a run."""
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - processor, result


def in_turn(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int) -> dict[str, Any]:
    """Run two ways of writing the same text in turn; a ratio is ours over theirs."""
    walls, processors, last = [], [], []
    for pair in range(pairs):
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        found = [timed(run) for run in order]
        last = found if pair % 2 == 0 else found[::-1]
        walls.append((last[0][0], last[1][0]))
        processors.append((last[0][1], last[1][1]))
    one, other = (result.sequences[0] for _, _, result in last)
    return {
        "wall": _ratios(walls),
        "processor": _ratios(processors),
        "forwards": [result.forwards for _, _, result in last],
        "equal_tokens": int((one == other).sum()),
        "of": len(one),
        "pairs": pairs,
    }


def _ratios(times: list[tuple[float, float]]) -> dict[str, float]:
    ratios = [ours / theirs for ours, theirs in times]
    return {
        "ours_s": statistics.median(ours for ours, _ in times),
        "llama_cpp_s": statistics.median(theirs for _, theirs in times),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "largest": max(ratios),
    }


def compare(
    converted: Path, files: Sequence[Path], *, new: int, steps: int, pairs: int
) -> dict[str, dict[str, Any]]:
    """Compare the conversion with each of its files; a row per name of a file."""
    loaded = load_checkpoint(converted, device="cpu", dtype="float32")
    ids = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]])
    settings = {
        "max_new_tokens": new,
        "max_denoising_steps": steps,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    rows = {}
    with packed_linears(loaded.model):
        loaded.model.generate(ids, **settings)  # packs the weights
        for file in files:
            theirs: Any = load_gguf(file, 1).model
            ours, other = (
                partial(model.generate, ids, **settings) for model in (loaded.model, theirs)
            )
            rows[file.name] = in_turn(ours, other, pairs)
    return rows


def main() -> None:
    """Print a table as JSON, a row per file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("converted", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of a block, or of the text (MDLM)")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with quiet_libraries():
        rows = compare(args.converted, args.files, new=args.new, steps=args.steps, pairs=args.pairs)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
