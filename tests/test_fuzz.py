"""Thousands of broken headers and indexes: a known error on one line, or a file that is right."""

from __future__ import annotations

import json
import random
import resource
import struct
import tracemalloc
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dllm_convert.errors import DataError
from dllm_convert.source import gguf_header
from dllm_convert.source.gguf_header import read_gguf_header
from dllm_convert.source.safetensors_header import (
    DTYPE_BYTES,
    encode_header,
    parse_header,
    read_checkpoint,
    read_header,
    read_weight_map,
)

MUTATIONS = 12_000
NUMBERS = [0, 1, -1, 7, 8, 9, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**4000, 1.5, 1e308, True]
JUNK: list[Any] = [
    *NUMBERS, None, "", "a", "\ud800", "x" * 5000, [], [[]], {}, {"a": {}}, [2] * 3000, "F33",
    "F32", [0, 0], [8, 0], [0, 2**70], [-8, 8], ["0", "8"], [0.0, 8.0],
    [2**62, 2**62], [1] * 100,
]  # fmt: skip
NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "\ud800", "a\nb.safetensors"]
NAMES += ["x" * 300 + ".safetensors", "config.json", "README.md", "link.safetensors"]
NAMES += ["con\u202e.safetensors", "../model.safetensors", "./model.safetensors"]


def described() -> dict[str, Any]:
    """Return a valid header of some tensors."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for number, dtype in enumerate(DTYPE_BYTES):
        shape = [number % 3, 2] if number % 4 else []
        size = int(np.prod(shape)) * DTYPE_BYTES[dtype]
        content[f"layer.{number}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    return content


def mutate_value(content: dict[str, Any], dice: random.Random) -> None:
    """Put junk somewhere into the description of a tensor, or the tensor itself."""
    name = dice.choice(list(content))
    place, kind = content[name], dice.randrange(6)
    if kind == 0 or not isinstance(place, dict) or name == "__metadata__":
        content[name] = deepcopy(dice.choice(JUNK))
    elif kind == 1:
        place[dice.choice(["dtype", "shape", "data_offsets", "more"])] = deepcopy(dice.choice(JUNK))
    elif kind == 2:
        place.pop(dice.choice([*place, "more"]), None)
    elif kind == 3:
        offsets = place.get("data_offsets")
        if isinstance(offsets, list) and offsets:
            offsets[dice.randrange(len(offsets))] = dice.choice(NUMBERS)
    elif kind == 4:
        content[dice.choice([*NAMES, "layer.3"])] = dict(place)
    else:
        other = content[dice.choice(list(content))]
        if isinstance(other, dict) and "data_offsets" in other:
            place["data_offsets"] = deepcopy(other["data_offsets"])


def mutate_bytes(raw: bytes, dice: random.Random) -> bytes:
    """Damage text: flip, cut, insert, double."""
    damaged = bytearray(raw)
    for _ in range(dice.randrange(1, 5)):
        at, kind = dice.randrange(len(damaged) + 1), dice.randrange(5)
        if kind == 0 and at < len(damaged):
            damaged[at] = dice.randrange(256)
        elif kind == 1:
            del damaged[at : at + dice.randrange(40)]
        elif kind == 2:
            damaged[at:at] = dice.choice(
                [b"{", b"[", b'"', b"\\", b"\xff", b"\\ud800", b"9" * 5000]
            )
        elif kind == 3:
            damaged[at:at] = damaged[at : at + dice.randrange(200)]
        else:
            damaged[at:at] = dice.choice([b"[", b'{"a":']) * dice.randrange(3000)
    return bytes(damaged)


def headers(seed: int, count: int) -> Iterator[bytes]:
    dice, valid = random.Random(seed), json.dumps(described())
    for number in range(count):
        if number % 2:
            content = json.loads(valid)
            for _ in range(dice.randrange(1, 4)):
                mutate_value(content, dice)
            yield json.dumps(content).encode()
        else:
            yield mutate_bytes(valid.encode(), dice)


def is_one_line(error: DataError, file: str) -> None:
    text = str(error)
    assert "\n" not in text
    text.encode("utf-8")
    assert file in text
    assert len(text) < 1000


def test_the_unmutated_header_is_valid() -> None:
    raw = json.dumps(described()).encode()
    size = 8 + len(raw) + max(e["data_offsets"][1] for n, e in described().items() if n[0] != "_")
    assert len(parse_header(raw, file="a", file_bytes=size).entries) == len(DTYPE_BYTES)


def test_safetensors_headers() -> None:
    data = max(e["data_offsets"][1] for n, e in described().items() if n[0] != "_")
    refused = 0
    for raw in headers(6, MUTATIONS):
        size = 8 + len(raw) + data
        try:
            header = parse_header(raw, file="m.safetensors", file_bytes=size)
        except DataError as error:
            is_one_line(error, "m.safetensors")
            refused += 1
            continue
        position = 0
        for entry in header.entries.values():
            assert entry.start == position
            position = entry.end
        assert header.data_start + position == size
        tensors = {n: (e.dtype, e.shape, e.end - e.start) for n, e in header.entries.items()}
        encode_header(tensors, header.metadata)
    assert MUTATIONS / 2 < refused < MUTATIONS


def test_lengths_and_truncations_of_files(tmp_path: Path) -> None:
    raw, path, dice = json.dumps(described()).encode(), tmp_path / "m.safetensors", random.Random(1)
    lengths = [0, 1, 7, len(raw) - 1, len(raw) + 1, 2**27, 2**31, 2**63, 2**64 - 1]
    for _ in range(500):
        whole = struct.pack("<Q", dice.choice([len(raw), *lengths])) + raw + b"\0" * 300
        path.write_bytes(whole[: dice.randrange(len(whole))])
        with pytest.raises(DataError) as caught:
            read_header(path)
        is_one_line(caught.value, path.name)


def test_a_header_of_brackets_does_not_fill_the_memory() -> None:
    for bomb in (b"[]," * (4 << 20), b'{"a":[' + b"[0,0]," * (3 << 20), b"[" * (8 << 20)):
        tracemalloc.start()
        with pytest.raises(DataError):
            parse_header(bomb, file="bomb", file_bytes=len(bomb) + 8)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def test_indexes(tmp_path: Path) -> None:
    dice, index = random.Random(2), tmp_path / "in" / "model.safetensors.index.json"
    index.parent.mkdir()
    header = encode_header({"a": ("F32", [2], 8)}, {})
    (index.parent / "m.safetensors").write_bytes(header + b"\0" * 8)
    (tmp_path / "model.safetensors").write_bytes(header + b"\0" * 8)
    (index.parent / "link.safetensors").symlink_to("/dev/zero")
    good = {"metadata": {"total_size": 8}, "weight_map": {"a": "m.safetensors"}}
    index.write_text(json.dumps(good))
    assert read_checkpoint(index.parent).keys() == {"m.safetensors"}
    for number in range(1500):
        content = json.loads(json.dumps(good))
        kind = dice.randrange(4)
        if kind == 0:
            content["weight_map"][dice.choice(["a", "b", "\ud800"])] = deepcopy(
                dice.choice([*NAMES, *JUNK])
            )
        elif kind == 1:
            content[dice.choice(["weight_map", "metadata"])] = deepcopy(dice.choice(JUNK))
        raw = json.dumps(content).encode()
        index.write_bytes(raw if kind < 2 else mutate_bytes(raw, dice))
        try:
            found = read_checkpoint(index.parent)
        except DataError as error:
            is_one_line(error, ".json" if ".json" in str(error) else ".safetensors")
        else:
            assert set(found) == {"m.safetensors"}, number


def test_a_name_twice_in_an_index(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(DataError, match="named twice"):
        read_weight_map(tmp_path / "i.json")


@pytest.fixture(scope="module")
def valid_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a"])
    writer.add_token_types([3, 3, 1])
    writer.add_rope_freq_base(1e4)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float16))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_gguf_headers(valid_gguf: bytes, tmp_path: Path) -> None:
    dice, path = random.Random(3), tmp_path / "tiny.gguf"
    header = valid_gguf.index(b"blk.0.attn_q.weight") + 60
    refused = 0
    for _ in range(2500):
        damaged = bytearray(valid_gguf)
        for _ in range(dice.randrange(1, 4)):
            at, kind = dice.randrange(min(header, len(damaged))), dice.randrange(4)
            if kind == 0:
                damaged[at] = dice.randrange(256)
            elif kind == 1:
                huge = dice.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
                damaged[at : at + 8] = struct.pack("<Q", huge)
            elif kind == 2:
                del damaged[at + 1 : at + dice.randrange(2, 30)]
            else:
                del damaged[1 + dice.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            found = read_gguf_header(path)
        except DataError as error:
            is_one_line(error, "tiny.gguf")
            refused += 1
            continue
        for tensor in found.tensors.values():
            size = gguf_header.tensor_bytes(tensor.kind, tensor.shape)
            assert 0 <= tensor.start <= tensor.start + size <= len(damaged)
    assert refused > 600


def test_memory_of_all_this_is_bounded() -> None:
    # Kibibytes; torch and the test runner themselves take some hundred MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20
