"""The untrained conversion on disk: every byte that should stay stays, the mask's row is right."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dllm_convert.adapters import all_adapters
from dllm_convert.common import disk
from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.manifest import hash_files
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.safetensors_header import read_checkpoint, read_header
from dllm_convert.weights.mean_row import mean_row
from dllm_convert.weights.run import adapt

ALL = all_adapters()
Sources = Callable[..., Path]
QUIET = Reporter(quiet=True)


def convert(source: Path, out: Path, light: bool = False, **fields: Any) -> ConversionPlan:
    recipe = Recipe.model_validate({"source": str(source), "target": "mdlm", **fields})
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, out, QUIET, light=light)
    return plan


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in read_checkpoint(folder):
        found |= load_file(folder / file)
    return found


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_byte_stays_but_the_vocabulary_rows(
    source_cache: Sources,
    tmp_path: Path,
    adapter: Any,
    tied: bool,
    shards: int,
    dtype: torch.dtype,
) -> None:
    source = source_cache(adapter.model_type, tied=tied, shards=shards, dtype=dtype)
    plan = convert(source, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    rows, used = plan.mask.rows_before, plan.mask.used_rows
    for name, old in before.items():
        new = after[name]
        assert new.dtype == dtype
        if name not in plan.tensors_changed:
            assert torch.equal(old, new), name
            continue
        kept = [row for row in range(rows) if row != plan.mask.id]
        assert torch.equal(old[kept], new[kept])
        mean = old[:used].double().mean(0).to(dtype)
        assert new.shape == (plan.mask.rows_after, *old.shape[1:])
        assert torch.equal(new[plan.mask.id], mean)
        assert all(torch.equal(row, mean) for row in new[rows:])


@pytest.mark.parametrize("padding", [0, 5], ids=["grown", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_transformers_loads_it_and_old_logits_are_equal(
    source_cache: Sources, tmp_path: Path, adapter: Any, tied: bool, padding: int
) -> None:
    source = source_cache(adapter.model_type, tied=tied, vocab_padding=padding)
    plan = convert(source, tmp_path / "out")
    auto = getattr(transformers, adapter.auto_class)
    old = auto.from_pretrained(source)
    causal = adapter.attention == "causal"
    new, info = auto.from_pretrained(tmp_path / "out", is_causal=causal, output_loading_info=True)
    assert not any(info.values()), info
    assert type(new).__name__ == adapter.stock_class
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        before, after = old.eval()(ids).logits, new.eval()(ids).logits
    kept = [row for row in range(plan.mask.rows_before) if row != plan.mask.id]
    # Matrix kernels may sum in another order for another number of rows.
    torch.testing.assert_close(before[..., kept], after[..., kept], rtol=0, atol=adapter.tolerance)
    assert after.shape[-1] == plan.mask.rows_after == new.config.vocab_size


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_files_and_configs(source_cache: Sources, tmp_path: Path, adapter: Any) -> None:
    block = 16 if "bd3lm" in adapter.targets else None
    target = "bd3lm" if block else "mdlm"
    source = source_cache(adapter.model_type)
    plan = convert(source, tmp_path / "out", target=target, block_size=block)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base = json.loads((source / "config.json").read_text())
    assert {k: config[k] for k in plan.config_updates} == dict(plan.config_updates)
    untouched = base.keys() - plan.config_updates.keys()
    assert {k: config[k] for k in untouched} == {k: base[k] for k in untouched}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["mask_token_id"] == plan.mask.id
    assert generation.get("block_size") == block
    assert None not in generation.values()
    # An encoder has no end of text of its own; training ends texts with the separator.
    ends = (
        base.get("eos_token_id") or transformers.AutoTokenizer.from_pretrained(source).sep_token_id
    )
    assert generation["eos_token_id"] == ends
    for role in ("bos", "pad"):
        assert generation.get(f"{role}_token_id") == base.get(f"{role}_token_id")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    assert adapter.diffusion_class in (tmp_path / "out" / "modeling_dllm.py").read_text()


@pytest.mark.parametrize("light", [False, True], ids=["transformers", "light"])
@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_the_tokenizer_knows_its_mask_and_is_otherwise_the_same(
    source_cache: Sources, tmp_path: Path, adapter: Any, light: bool
) -> None:
    source = source_cache(adapter.model_type)
    plan = convert(source, tmp_path / "out", light=light)
    old = transformers.AutoTokenizer.from_pretrained(source)
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (new.mask_token, new.mask_token_id) == (plan.mask.token, plan.mask.id)
    assert new.chat_template == old.chat_template
    text = "Lists are mutable; naïve tuples are not.\n\tdef f(): return 0"
    assert new(text)["input_ids"] == old(text)["input_ids"]
    assert new.decode(old(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    masked = new(f"a {new.mask_token} b")["input_ids"]
    assert masked.count(plan.mask.id) == 1
    assert new.decode([plan.mask.id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("light", [False, True], ids=["transformers", "light"])
def test_a_later_padded_row_needs_texts_before_it(
    source_cache: Sources, tmp_path: Path, light: bool
) -> None:
    source = source_cache("qwen3", vocab_padding=9)
    plan = convert(source, tmp_path / "out", light, mask_token={"token": "<m>", "id": 390})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.mask_token_id == plan.mask.id == 390
    assert len(tokenizer) == 391


def test_the_chat_template_survives(source_cache: Sources, tmp_path: Path) -> None:
    source = source_cache("llama")
    convert(source, tmp_path / "out")
    old = transformers.AutoTokenizer.from_pretrained(source)
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Hi"}]
    assert old.chat_template
    rendered = new.apply_chat_template(messages, tokenize=False)
    assert rendered == old.apply_chat_template(messages, tokenize=False)


def test_unchanged_shards_are_the_same_files(source_cache: Sources, tmp_path: Path) -> None:
    source = source_cache("llama", tied=False, shards=3)
    plan = convert(source, tmp_path / "out")
    headers = read_checkpoint(source)
    assert headers.keys() == read_checkpoint(tmp_path / "out").keys()
    for file, header in headers.items():
        changed = set(header.entries) & set(plan.tensors_changed)
        same = (source / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
        assert same != bool(changed), file


def test_the_index_counts_the_grown_tensors(source_cache: Sources, tmp_path: Path) -> None:
    source = source_cache("llama", tied=False, shards=2, dtype=torch.bfloat16)
    convert(source, tmp_path / "out")
    old = json.loads((source / "model.safetensors.index.json").read_text())
    new = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert new["weight_map"] == old["weight_map"]
    added = 2 * (448 - 384) * 32
    gained = {k: new["metadata"][k] - old["metadata"][k] for k in new["metadata"]}
    assert gained == {"total_parameters": added, "total_size": 2 * added}


def test_metadata_is_kept_and_the_format_added(source_factory: Sources, tmp_path: Path) -> None:
    source = source_factory("bert")
    path = source / "model.safetensors"
    save_file(load_file(path), path, metadata={"trained_by": "someone"})
    convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "trained_by": "someone"}


def test_unused_heads_are_left_out_of_weights_and_index(
    source_factory: Sources, tmp_path: Path
) -> None:
    source = source_factory("bert", shards=2)
    index_path = source / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = sorted(set(index["weight_map"].values()))[0]
    content = load_file(source / file)
    content["cls.seq_relationship.weight"] = torch.ones(2, 32)
    save_file(content, source / file, metadata={"format": "pt"})
    index["weight_map"]["cls.seq_relationship.weight"] = file
    index_path.write_text(json.dumps(index))
    plan = convert(source, tmp_path / "out")
    assert plan.tensors_dropped == ("cls.seq_relationship.weight",)
    assert tensors(tmp_path / "out").keys() == tensors(source).keys() - set(plan.tensors_dropped)


def test_a_recipes_special_token_gets_the_mean_in_place(
    source_cache: Sources, tmp_path: Path
) -> None:
    source = source_cache("qwen2", tied=False)
    plan = convert(source, tmp_path / "out", mask_token={"token": "<|im_start|>"})
    assert plan.mask.rows_after == plan.mask.rows_before
    before, after = tensors(source), tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][0], before[name].double().mean(0).float())
        assert torch.equal(after[name][1:], before[name][1:])


def test_an_opened_window_is_written_as_null(source_cache: Sources, tmp_path: Path) -> None:
    convert(source_cache("mistral", sliding_window=8), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] is None
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").sliding_window is None


def test_a_folder_that_is_not_empty_is_refused(source_cache: Sources, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        convert(source_cache("llama"), tmp_path)
    assert (tmp_path / "foreign").read_text() == "mine"


def test_values_that_are_not_finite(source_factory: Sources, tmp_path: Path) -> None:
    source = source_factory("llama")
    path = source / "model.safetensors"
    content = load_file(path)
    content["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(content, path, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="not finite"):
        convert(source, tmp_path / "out")


def test_a_tokenizer_that_gives_another_id_than_planned(
    source_cache: Sources, tmp_path: Path
) -> None:
    source = source_cache("qwen2", vocab_padding=9)
    info = inspect_source(str(source))
    plan = make_plan(Recipe(source="x", target="mdlm"), info)
    wrong = replace(plan, mask=replace(plan.mask, id=3, new=False, token="never seen"))
    with pytest.raises(IncompatibleError, match="the plan chose 3"):
        adapt(wrong, source, tmp_path / "out", QUIET)


class TestFullDisk:
    """A disk that is or becomes full is one line with the bytes needed."""

    def test_known_beforehand(
        self, source_cache: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = disk.shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DataError, match=r"needs [\d,]+ bytes, 1,000 are free"):
            convert(source_cache("llama"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("other", ["consolidated.safetensors", "pytorch_model.bin", "a.gguf"])
    def test_what_is_not_copied_takes_no_room(
        self, source_factory: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
    ) -> None:
        source = source_factory("llama")
        size = sum(path.stat().st_size for path in source.iterdir())
        (source / other).write_bytes(b"x" * 2 * size)
        usage = disk.shutil.disk_usage(tmp_path)._replace(free=2 * size)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
        convert(source, tmp_path / "out")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_while_writing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="disk full") as caught, disk.writing(tmp_path, 1):
            Path("/dev/full").write_bytes(b"x" * 10_000)
        assert "--out" in str(caught.value.hint)

    def test_other_errors_pass_through(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), disk.writing(tmp_path, 1):
            (tmp_path / "absent").read_bytes()


def test_memory_stays_far_below_the_weights(source_cache: Sources, tmp_path: Path) -> None:
    source = source_cache("llama", hidden_size=512, intermediate_size=4096, layers=2, tied=False)
    size = (source / "model.safetensors").stat().st_size
    plan = make_plan(Recipe(source="x", target="mdlm"), inspect_source(str(source)))
    tracemalloc.start()
    try:
        adapt(plan, source, tmp_path / "out", QUIET)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 50_000_000
    assert peak < size / 2


@pytest.mark.parametrize("shards", [1, 3])
def test_mixed_precision_passes_through(
    source_factory: Sources, tmp_path: Path, shards: int
) -> None:
    source = source_factory("llama", dtype=torch.bfloat16, tied=False, shards=shards)
    for file in read_checkpoint(source):
        content = load_file(source / file)
        for name, tensor in content.items():
            if ".mlp." in name:
                content[name] = tensor.float()
            elif "_proj" in name:
                content[name] = tensor.half()
        save_file(content, source / file, metadata={"format": "pt", "quantised_by": "somebody"})
    plan = convert(source, tmp_path / "out")
    for file in read_checkpoint(source):
        before, after = load_file(source / file), load_file(tmp_path / "out" / file)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            if name not in plan.tensors_changed:
                assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            assert handle.metadata()["quantised_by"] == "somebody"


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_mean_row_is_torchs(tmp_path: Path, dtype: torch.dtype, width: int) -> None:
    tensor = (torch.randn(3000, width, generator=torch.manual_seed(0)) * 0.02 + 0.01).to(dtype)
    save_file({"before": torch.ones(3), "rows": tensor}, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    with (tmp_path / "m.safetensors").open("rb") as file:
        row = mean_row(file.fileno(), header, header.entries["rows"], 2900)
    expected = tensor[:2900].double().mean(0).to(dtype)
    assert torch.equal(torch.frombuffer(bytearray(row), dtype=dtype), expected)


@pytest.mark.parametrize("light", [False, True], ids=["transformers", "light"])
def test_hashes_are_those_of_the_files(source_cache: Sources, tmp_path: Path, light: bool) -> None:
    source = source_cache("bert", shards=2)
    recipe = Recipe(source=str(source), target="mdlm")
    plan = make_plan(recipe, inspect_source(str(source)))
    made = adapt(plan, source, tmp_path / "out", QUIET, light=light)
    assert made.files == hash_files(tmp_path / "out")
    assert made.source == {name: sha256_file(source / name) for name in made.source}
    assert made.source.keys() == {path.name for path in source.iterdir()}
