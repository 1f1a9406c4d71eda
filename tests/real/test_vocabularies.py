"""The mask-token rules on vocabularies that vendors shipped, and the real checkpoints' headers."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import assets
import pytest

from dllm_convert.adapters import get_adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.conversion import make_plan
from dllm_convert.planning.mask_token import MaskTokenDecision, decide_mask_token
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import SourceInfo, TensorInfo, inspect_source
from dllm_convert.source.tokenizer_files import read_tokenizer

pytestmark = pytest.mark.real

QWEN3_ROWS, LLAMA3_ROWS, LLAMA2_ROWS = 151_936, 128_256, 32_000
MISTRAL_V1_ROWS, MISTRAL_V3_ROWS, TEKKEN_ROWS = 32_000, 32_768, 131_072


def decide(folder: Path, family: str, rows: int, **mask_token: Any) -> MaskTokenDecision:
    """Apply the rules to a tokenizer folder and an embedding of `rows` rows."""
    adapter = get_adapter(family)
    config = {"model_type": family, "vocab_size": rows}
    info = SourceInfo(
        given=str(folder),
        kind="folder",
        path=folder,
        repo_id=None,
        revision=None,
        config=config,
        tensors={adapter.embedding: TensorInfo("BF16", (rows, 8), "model.safetensors")},
        tokenizer=read_tokenizer(folder, config),
    )
    recipe = Recipe(source="real", target="mdlm", mask_token=mask_token)
    return decide_mask_token(recipe, info, adapter)


def mistral(tmp_path: Path, file: str, name: str = "tokenizer.model") -> Path:
    """Return a folder with one of Mistral's vocabularies under the name checkpoints give it."""
    shutil.copyfile(assets.mistral_tokenizers() / file, tmp_path / name)
    return tmp_path


def test_qwen3_uses_its_first_padded_row() -> None:
    made = decide(assets.qwen3_tokenizer(), "qwen3", QWEN3_ROWS)
    assert (made.rule, made.id, made.new) == ("padded-row", 151_669, True)
    assert made.rows_after == QWEN3_ROWS


def test_qwen2_5_uses_its_first_padded_row(tmp_path: Path) -> None:
    # Qwen2.5's vocabulary is Qwen3's without the four tokens that were added last.
    for path in assets.qwen3_tokenizer().iterdir():
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tokenizer.json":
            content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 151_665]
        else:
            decoder = content["added_tokens_decoder"]
            kept = {row: token for row, token in decoder.items() if int(row) < 151_665}
            content["added_tokens_decoder"] = kept
        (tmp_path / path.name).write_text(json.dumps(content), encoding="utf-8")
    assert decide(tmp_path, "qwen2", QWEN3_ROWS).id == 151_665


def test_qwen3_refuses_ids_that_text_or_the_template_uses() -> None:
    folder = assets.qwen3_tokenizer()
    # <|fim_pad|> is added, but not special: it is decoded as text.
    for token in ("<think>", "<|fim_pad|>", "<tool_call>", "hello", "<|im_end|>", "<|endoftext|>"):
        with pytest.raises(IncompatibleError, match="mask id taken"):
            decide(folder, "qwen3", QWEN3_ROWS, token=token)
    assert decide(folder, "qwen3", QWEN3_ROWS, token="<|quad_start|>").rule == "recipe"


def test_llama3_uses_a_reserved_token() -> None:
    made = decide(assets.llama3_tokenizer(), "llama", LLAMA3_ROWS)
    assert (made.rule, made.new, made.write_row) == ("reserved", False, True)
    assert (made.token, made.id) == ("<|reserved_special_token_0|>", 128_002)
    assert made.rows_after == LLAMA3_ROWS


def test_llama3_skips_a_reserved_token_that_the_template_uses(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(assets.llama3_tokenizer(), tmp_path / "llama3"))
    (folder / "chat_template.jinja").write_text("<|reserved_special_token_0|>{{ messages }}")
    assert decide(folder, "llama", LLAMA3_ROWS).token == "<|reserved_special_token_1|>"


def test_llama3_with_the_mask_outside_the_embedding_is_refused() -> None:
    # 128256 is the id that another converter writes, one past the last row.
    made = decide(assets.llama3_tokenizer(), "llama", LLAMA3_ROWS, id=LLAMA3_ROWS)
    assert made.rows_after > made.id
    with pytest.raises(IncompatibleError, match="expected less than"):
        decide(assets.llama3_tokenizer(), "llama", LLAMA3_ROWS, id=LLAMA3_ROWS + 1)


def test_llama2_grows() -> None:
    made = decide(assets.llama2_tokenizer(), "llama", LLAMA2_ROWS)
    assert (made.rule, made.id, made.rows_after) == ("grow", 32_000, 32_064)


def test_mistral_v1_grows(tmp_path: Path) -> None:
    made = decide(mistral(tmp_path, "tokenizer.model.v1"), "mistral", MISTRAL_V1_ROWS)
    assert (made.rule, made.id, made.rows_after) == ("grow", 32_000, 32_064)


@pytest.mark.parametrize(
    ("file", "token", "row"),
    [
        ("mistral_instruct_tokenizer_240216.model.v2", "[control_8]", 10),
        ("mistral_instruct_tokenizer_240323.model.v3", "[control_12]", 14),
        ("mistral_instruct_tokenizer_241114.model.v7", "[control_17]", 19),
    ],
)
def test_mistral_uses_its_first_control_token(
    tmp_path: Path, file: str, token: str, row: int
) -> None:
    made = decide(mistral(tmp_path, file), "mistral", MISTRAL_V3_ROWS)
    assert (made.rule, made.new) == ("reserved", False)
    assert (made.token, made.id) == (token, row)


def test_tekken_uses_a_special_filler(tmp_path: Path) -> None:
    folder = mistral(tmp_path, "tekken_240911.json", "tekken.json")
    made = decide(folder, "mistral", TEKKEN_ROWS)
    assert (made.rule, made.token, made.id) == ("reserved", "<SPECIAL_20>", 20)


def agree(folder: Path, family: str) -> None:
    """Compare the reader with AutoTokenizer on a folder that gets a config of `family`."""
    import transformers

    config = {"model_type": family}
    (folder / "config.json").write_text(json.dumps(config))
    info = read_tokenizer(folder, config)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert dict(info.vocab) == loaded.get_vocab()
    assert (info.size, info.mask_token) == (len(loaded), loaded.mask_token)
    roles = ("bos", "eos", "unk", "sep", "pad", "cls")
    assert {getattr(loaded, f"{role}_token_id") for role in roles} - {None} <= info.reachable
    # Pieces that a SentencePiece model takes from the text as they stand are words here.
    if (folder / "tokenizer.json").is_file():
        assert {*loaded.all_special_tokens} <= info.special


@pytest.mark.parametrize("kept", ["all", "without settings"])
@pytest.mark.parametrize(
    ("name", "family"),
    [("qwen3", "qwen3"), ("qwen3", "qwen2"), ("llama3", "llama"), ("llama2", "llama")],
)
def test_the_reader_agrees_with_transformers(
    tmp_path: Path, name: str, family: str, kept: str
) -> None:
    folder = Path(shutil.copytree(assets.asset(name) / "package" / "models", tmp_path / name))
    if kept == "without settings":
        (folder / "tokenizer_config.json").unlink()
    agree(folder, family)


@pytest.mark.parametrize("family", ["mistral", "llama"])
@pytest.mark.parametrize(
    "file",
    [
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
    ],
)
def test_the_reader_agrees_on_sentencepiece(tmp_path: Path, file: str, family: str) -> None:
    pytest.importorskip("sentencepiece")
    agree(mistral(tmp_path, file), family)


def test_sentencepiece_agrees_with_its_own_reader(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = mistral(tmp_path, "mistral_instruct_tokenizer_240323.model.v3")
    info = read_tokenizer(folder, {})
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert info.size == processor.get_piece_size()
    assert all(info.vocab[processor.id_to_piece(row)] == row for row in range(info.size))


def test_smollm2_plans_from_its_header_in_well_under_a_second() -> None:
    path = str(assets.smollm2_gguf())
    started = time.perf_counter()
    info = inspect_source(path)
    recipe = Recipe(source=path, target="bd3lm", block_size=32)
    plan = make_plan(recipe, info)
    assert time.perf_counter() - started < 2
    assert (info.model_type, info.license, info.parameters) == ("llama", "apache-2.0", 134_515_008)
    assert info.tokenizer.size == plan.mask.rows_before == 49_152
    assert (plan.mask.rule, plan.mask.id, plan.mask.rows_after) == ("grow", 49_152, 49_216)


def test_smollm2_has_a_special_token_that_text_does_not_produce() -> None:
    path = str(assets.smollm2_gguf())
    mask = {"token": "<empty_output>"}
    recipe = Recipe.model_validate({"source": path, "target": "mdlm", "mask_token": mask})
    plan = make_plan(recipe, inspect_source(path))
    assert (plan.mask.rule, plan.mask.id, plan.mask.rows_after) == ("recipe", 16, 49_152)


def test_antiberty_plans_as_bert() -> None:
    path = str(assets.antiberty_folder())
    plan = make_plan(Recipe(source=path, target="mdlm", allow_pickle=True), inspect_source(path))
    assert plan.adapter.model_type == "bert"
    assert (plan.mask.rule, plan.mask.id, plan.mask.rows_after) == ("tokenizer", 4, 25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "rows"),
    [
        ("qwen3", "qwen3", QWEN3_ROWS),
        ("llama3", "llama", LLAMA3_ROWS),
        ("llama2", "llama", LLAMA2_ROWS),
    ],
)
@pytest.mark.parametrize("light", [False, True], ids=["transformers", "light"])
def test_saving_changes_nothing_but_the_mask(
    tmp_path: Path, name: str, family: str, rows: int, light: bool
) -> None:
    import transformers

    from dllm_convert.weights.tokenizer import SAMPLES, write_tokenizer

    source = Path(shutil.copytree(assets.asset(name) / "package" / "models", tmp_path / "source"))
    out = tmp_path / "out"
    out.mkdir()
    for folder in (source, out):
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
    mask = decide(source, family, rows)
    info = read_tokenizer(source, {"model_type": family})
    write_tokenizer(mask, info, source, out, light=light)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert (loaded.mask_token, loaded.mask_token_id) == (mask.token, mask.id)
    assert len(loaded) == max(mask.used_rows, mask.id + 1)
    before = transformers.AutoTokenizer.from_pretrained(source)
    for text in SAMPLES:
        assert loaded(text)["input_ids"] == before(text)["input_ids"]
    assert loaded(f"a{mask.token}b")["input_ids"].count(mask.id) == 1
    assert loaded.chat_template == before.chat_template


@pytest.mark.slow
def test_saving_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    import transformers

    from dllm_convert.weights.tokenizer import write_tokenizer

    pytest.importorskip("sentencepiece")
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "mistral"}')
    mistral(source, "mistral_instruct_tokenizer_240323.model.v3")
    mask = decide(source, "mistral", MISTRAL_V3_ROWS)
    write_tokenizer(mask, read_tokenizer(source, {"model_type": "mistral"}), source, out)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.mask_token_id == mask.id == 14
