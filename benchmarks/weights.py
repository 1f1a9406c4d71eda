"""What a conversion without training costs, against `cp -r` of the same folder.

    python -m benchmarks.weights make /scratch/qwen --rows 151936
    python -m benchmarks.weights compare /scratch/qwen --pairs 5
    python -m benchmarks.weights sparse /scratch/sparse llama-70b
    python -m benchmarks.weights gguf SmolLM2-135M-Instruct.Q4_1.gguf --pairs 2

`make` writes a checkpoint of a real model's exact shapes with random, valid bfloat16 weights and a
byte-level tokenizer that is padded to the real number of tokens. `sparse` does the same with holes
instead of weights: sizes and headers are real, the disk holds next to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from dllm_convert.source.safetensors_header import encode_header

MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151_936, "tokens": 151_665, "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "shards": 4,
    },
    "llama-70b": {
        "model_type": "llama", "vocab_size": 128_256, "tokens": 128_256, "hidden_size": 8192,
        "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "shards": 30,
    },
    "llama-405b": {
        "model_type": "llama", "vocab_size": 128_256, "tokens": 128_256, "hidden_size": 16_384,
        "intermediate_size": 53_248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "shards": 191,
    },
}  # fmt: skip
"""Shapes as their config.json gives them."""


def shapes(model: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor, embedding first."""
    hidden, wide = model["hidden_size"], model["intermediate_size"]
    keys = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    yield "model.embed_tokens.weight", (model["vocab_size"], hidden)
    for number in range(model["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, rows in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, hidden)
            if model["model_type"] == "qwen2":
                yield f"{layer}self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (wide, hidden)
        yield f"{layer}mlp.up_proj.weight", (wide, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, wide)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not model["tie_word_embeddings"]:
        yield "lm_head.weight", (model["vocab_size"], hidden)


def random_bfloat16(count: int, seed: int) -> bytes:
    """Return `count` small normal numbers as bfloat16."""
    import numpy as np

    values = np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * np.float32(0.02)
    return bytes((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], *, holes: bool) -> int:
    """Write one file and return the bytes of its tensors."""
    described = {name: ("BF16", shape, 2 * prod(shape)) for name, shape in tensors}
    total = sum(size for _, _, size in described.values())
    with path.open("wb") as file:
        file.write(encode_header(described, {"format": "pt"}))
        if holes:
            start = file.tell()
            for name, (_, shape, size) in described.items():
                if shape[0] > 100_000:  # rows of the vocabulary, whose mean must not be zero
                    file.seek(start)
                    file.write(random_bfloat16(shape[1], len(name)))
                start += size
            file.truncate(start)
            return total
        for number, (_, shape) in enumerate(tensors):
            for start in range(0, prod(shape), 1 << 24):
                file.write(random_bfloat16(min(1 << 24, prod(shape) - start), number + start))
    return total


def write_weights(folder: Path, model: dict[str, Any], *, holes: bool) -> None:
    """Write all shards and their index."""
    tensors = list(shapes(model))
    limit = sum(2 * prod(shape) for _, shape in tensors) / model["shards"]
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensors:
        if filled >= limit * len(groups) and len(groups) < model["shards"]:
            groups.append([])
        groups[-1].append((name, shape))
        filled += 2 * prod(shape)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        total += write_shard(folder / file, group, holes=holes)
        weight_map |= {name: file for name, _ in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, tokens: int) -> None:
    """Write a byte-level BPE tokenizer of exactly so many tokens: pairs of bytes, then of pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    pairs = [(one, two) for one in alphabet for two in alphabet]
    triples = (((one + two), three) for one, two in pairs for three in alphabet)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for pair in [*pairs, *(next(triples) for _ in range(tokens))]:
        if len(vocab) == tokens - len(special):
            break
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make(folder: Path, name: str, *, holes: bool, rows: int | None = None) -> None:
    """Write a checkpoint of a model's shapes."""
    model = MODELS[name] | ({"vocab_size": rows} if rows else {})
    folder.mkdir(parents=True)
    config = {key: value for key, value in model.items() if key not in ("tokens", "shards")}
    eos = model["tokens"] - 3
    config |= {"max_position_embeddings": 32_768, "dtype": "bfloat16", "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, model["tokens"])
    write_weights(folder, model, holes=holes)


def timed(command: list[str]) -> dict[str, float]:
    """Run a command; return seconds, peak MiB, and bytes that passed through read and write."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    counted: dict[str, int] = {}
    while True:
        try:
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            counted = {
                key: int(value) for key, value in (line.split(": ") for line in lines)
            } or counted
        except (OSError, ValueError):
            pass
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "read_gb": counted.get("rchar", 0) / 1e9,
        "written_gb": counted.get("wchar", 0) / 1e9,
    }


def convert(source: Path, out: Path, *more: str) -> dict[str, float]:
    """Time `dllm-convert run --no-train`."""
    command = [sys.executable, "-m", "dllm_convert", "run", str(source), "--to", "bd3lm"]
    return timed([*command, "--block", "32", "--no-train", "--quiet", "--out", str(out), *more])


def forget(folder: Path) -> None:
    """Have the system drop a folder's files from its page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(source: Path, pairs: int, *, cold: bool) -> None:
    """Alternate cp -r, a conversion, and one with links; print what each took.

    Args:
        source: The checkpoint.
        pairs: Rounds after the first, which warms up.
        cold: Whether each has to read the checkpoint from the disk.
    """
    out = source.with_name(source.name + "-out")
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "cp -r": lambda: timed(["cp", "-r", str(source), str(out)]),
        "run --no-train": lambda: convert(source, out),
        "run --no-train --link": lambda: convert(source, out, "--link"),
    }
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(pairs + 1):
        for name, run in ways.items():
            # The same memory lies free before each: a virtual machine may have to ask for it first.
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(source, out)
            os.sync()
            shutil.rmtree(out)
            if cold:
                forget(source)
            result = run()
            if number:  # the first round warms up
                taken[name].append(result)
            print(name, {key: round(value, 2) for key, value in result.items()}, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    for name, results in taken.items():
        ratios = [r["seconds"] / c["seconds"] for r, c in zip(results, taken["cp -r"], strict=True)]
        middle = {key: statistics.median(r[key] for r in results) for key in results[0]}
        print(
            f"{name}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}), median " + ", ".join(f"{k} {v:.2f}" for k, v in middle.items())
        )


OURS = """
import sys, pathlib
from dllm_convert.source.from_gguf import dequantise
dequantise(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), "llama")
"""
THEIRS = """
import sys, pathlib, torch, transformers
path = pathlib.Path(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32,
    quantization_config=transformers.GgufConfig(dequantize=True))
model.save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(
    sys.argv[2])
"""


def compare_gguf(path: Path, scratch: Path, pairs: int) -> None:
    """Alternate this project's dequantisation and transformers' load and save; compare results."""
    from dllm_convert.common.copying import sha256_file
    from dllm_convert.source.safetensors_header import SINGLE_FILE, read_header

    for _ in range(pairs):
        folders = {}
        for name, code in (("ours", OURS), ("transformers", THEIRS)):
            folders[name] = scratch / name
            shutil.rmtree(folders[name], ignore_errors=True)
            folders[name].mkdir(parents=True)
            command = [sys.executable, "-c", code, str(path), str(folders[name])]
            result = timed(command)
            print(name, {key: round(value, 2) for key, value in result.items()}, flush=True)
    ours, theirs = (folder / SINGLE_FILE for folder in folders.values())
    tensors = [read_header(file) for file in (ours, theirs)]
    contents = []
    for header, file in zip(tensors, (ours, theirs), strict=True):
        raw = file.read_bytes()
        start = header.data_start
        contents.append(
            {n: (e.dtype, e.shape, raw[start + e.start : start + e.end])
             for n, e in header.entries.items()}
        )  # fmt: skip
    equal = contents[0] == contents[1]
    print(f"{len(contents[0])} tensors, equal: {equal}; {sha256_file(ours)[:12]}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("make", "compare", "sparse", "gguf"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?", default="qwen2.5-1.5b", choices=sorted(MODELS))
    parser.add_argument("--rows", type=int, help="rows of the embedding, to have it grown")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="compare: read from the disk")
    parser.add_argument("--once", action="store_true", help="sparse: without --link only")
    parser.add_argument("--scratch", type=Path, default=Path("gguf-scratch"))
    given = parser.parse_args()
    if given.what == "gguf":
        compare_gguf(given.folder, given.scratch, given.pairs)
        return
    if given.what == "compare":
        compare(given.folder, given.pairs, cold=given.cold)
        return
    if not given.folder.exists():
        make(given.folder, given.model, holes=given.what == "sparse", rows=given.rows)
    if given.what == "sparse":
        out = given.folder.with_name(given.folder.name + "-out")
        for more in ([],) if given.once else ([], ["--link"]):
            shutil.rmtree(out, ignore_errors=True)
            result = convert(given.folder, out, *more)
            print(given.model, *more, {key: round(value, 2) for key, value in result.items()})
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
