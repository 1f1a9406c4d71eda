"""The reader of tokenizer files against AutoTokenizer, over the combinations that files come in."""

from __future__ import annotations

import inspect
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from dllm_convert.adapters import get_adapter
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.planning import tokenizer as plan_tokenizer
from dllm_convert.planning.mask_token import decide_mask_token
from dllm_convert.planning.tokenizer import check_tokenizer
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import SourceInfo, TensorInfo
from dllm_convert.source.tokenizer_classes import (
    _DEFAULTS,
    _FAMILIES,
    _MISNAMED,
    GENERIC,
    default_tokens,
    loading_class,
)
from dllm_convert.source.tokenizer_files import ROLES, read_tokenizer
from dllm_convert.weights.tokenizer import write_tokenizer

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<mask>")
CLASSES = (
    *(None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast"),
    *("Qwen2Tokenizer", "GPT2TokenizerFast", "GemmaTokenizer", "BertTokenizer", "RobertaTokenizer"),
    *("GPTNeoXTokenizerFast", "CohereTokenizerFast", "NobodysTokenizer"),
)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "bert", "roberta", "gemma2", "gpt_neox", "phi3")
GROUPS, DRAWS = 12, 25
"""Tests, and drawn folders in each."""


def byte_level(special: tuple[str, ...], listed: int) -> Tokenizer:
    """Make a byte-level vocabulary, the first `listed` special tokens as added ones."""
    vocab = {text: row for row, text in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special[:listed]])
    return tokenizer


def pieces(special: tuple[str, ...], listed: int) -> Tokenizer:
    """Make a vocabulary of pieces, as SentencePiece has them."""
    vocab = {text: row for row, text in enumerate((*special, "▁", *"abcdefghijklmnopqrstuvwxyz"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special[:listed]])
    return tokenizer


def words(special: tuple[str, ...], listed: int) -> Tokenizer:
    """Make a vocabulary of words."""
    texts = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *special, *"abcdefghij")
    vocab = {text: row for row, text in enumerate(texts)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in texts[:listed]])
    return tokenizer


def _token(text: str, special: bool = True) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": text, **flags, "special": special}


def _settings(draw: random.Random, size: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"model_max_length": 128}
    for role in ROLES:
        chosen = draw.random()
        if chosen < 0.25:
            settings[f"{role}_token"] = draw.choice((*SPECIAL, f"<new-{role}>"))
        elif chosen < 0.35:
            settings[f"{role}_token"] = None
        elif chosen < 0.45:
            text = draw.choice(SPECIAL)
            settings[f"{role}_token"] = {"__type": "AddedToken", **_token(text)}
    if draw.random() < 0.3:
        settings["added_tokens_decoder"] = {
            str(size + row): _token(text, draw.random() < 0.7)
            for row, text in enumerate(draw.sample(("<x>", "<y>", "<pad>", "<mask>"), 2))
        }
    if draw.random() < 0.3:
        key = draw.choice(("extra_special_tokens", "additional_special_tokens"))
        settings[key] = draw.sample(("<x>", "<e1>", "<e2>"), 2)
    if draw.random() < 0.15:
        settings["image_token"] = "<image>"
    return settings


def make_folder(folder: Path, seed: int) -> dict[str, Any]:
    """Write a folder with one draw of all that tokenizer files may say; return its config."""
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    build = words if family == "bert" else draw.choice((byte_level, pieces))
    tokenizer = build(SPECIAL, draw.choice((0, 3, 6)))
    if draw.random() < 0.3:
        tokenizer.add_tokens(["<plain>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    settings = _settings(draw, size)
    declared = draw.choice(CLASSES)
    if family == "bert":
        declared = draw.choice((None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer"))
    elif declared == "BertTokenizer":
        declared = None
    if declared is not None:
        settings["tokenizer_class"] = declared
    if draw.random() < 0.9:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if draw.random() < 0.3:
        listed: dict[str, Any] = {"bos_token": "<s>"}
        if draw.random() < 0.5:
            listed["mask_token"] = draw.choice(("<mask>", "<listed-mask>", _token("<mask>")))
        if draw.random() < 0.3:
            listed["additional_special_tokens"] = ["<l1>"]
        (folder / "special_tokens_map.json").write_text(json.dumps(listed))
    if draw.random() < 0.3:
        (folder / "added_tokens.json").write_text(json.dumps({"<old>": size, "<pad>": size + 1}))
    config = {"model_type": family, "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("group", range(GROUPS))
def test_the_reader_agrees_with_transformers(tmp_path: Path, group: int) -> None:
    import transformers

    refused = 0
    for seed in range(group * DRAWS, (group + 1) * DRAWS):
        folder = tmp_path / str(seed)
        config = make_folder(folder, seed)
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(folder)
        except (TypeError, ValueError):
            refused += 1
            continue
        info = read_tokenizer(folder, config)
        assert dict(info.vocab) == loaded.get_vocab(), seed
        assert info.mask_token == loaded.mask_token, seed
        rows = {getattr(loaded, f"{role}_token_id") for role in ROLES if role != "mask"}
        assert rows - {None} <= info.reachable, seed
        assert {*loaded.all_special_tokens} <= info.special, seed
    assert refused <= DRAWS // 10


def _plain_files(folder: Path, family: str, declared: str | None) -> dict[str, Any]:
    """Write the files from before tokenizer.json."""
    folder.mkdir()
    if family == "bert":
        lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##a", "x\u3000"]
        (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        tokenizer = json.loads(byte_level(SPECIAL, 0).to_str())
        (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": 64} | ({"tokenizer_class": declared} if declared else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": family, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("family", "declared"),
    [
        *[("bert", name) for name in (None, "BertTokenizer", "BertTokenizerFast")],
        *[("roberta", name) for name in (None, "RobertaTokenizer", "RobertaTokenizerFast")],
        *[("qwen2", name) for name in (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")],
        *[("gpt2", None), ("gpt_neox", "GPTNeoXTokenizerFast")],
    ],
)
def test_files_from_before_tokenizer_json(
    tmp_path: Path, family: str, declared: str | None
) -> None:
    import transformers

    config = _plain_files(tmp_path / "source", family, declared)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    info = read_tokenizer(tmp_path / "source", config)
    assert dict(info.vocab) == loaded.get_vocab()
    assert info.mask_token == loaded.mask_token


def _mapping() -> dict[str, str]:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return {
        family: name.removesuffix("Fast")
        for family, name in TOKENIZER_MAPPING_NAMES.items()
        if name
    }


def test_the_tables_are_the_installed_transformers() -> None:
    from transformers.models.auto import modeling_auto, tokenization_auto

    for name in _DEFAULTS:
        found = tokenization_auto.tokenizer_class_from_name(name)
        assert found is not None, name
        # A subclass without arguments of its own hands them on.
        first = next(c for c in found.__mro__ if "unk_token" in inspect.signature(c).parameters)
        parameters = inspect.signature(first).parameters
        stated = {role: parameters.get(f"{role}_token") for role in ROLES}
        defaults = {role: p.default for role, p in stated.items() if p is not None and p.default}
        assert {r: str(text) for r, text in defaults.items()} == dict(default_tokens(name)), name
    families = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    registered = {family: name for family, name in _mapping().items() if family in families}
    known = {*_DEFAULTS, GENERIC}
    for family, name in registered.items():
        if name in known:
            assert loading_class(family, None, byte_level=False) == name, family
    assert {*tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS} & families == _MISNAMED
    for name, members in _FAMILIES.items():
        assert all(registered[family] == name for family in members), name


def _recipe(**given: Any) -> Recipe:
    return Recipe.model_validate({"source": "made up", "target": "mdlm", **given})


def _source(folder: Path, config: dict[str, Any], rows: int) -> SourceInfo:
    adapter = get_adapter("llama")
    return SourceInfo(
        given="made up",
        kind="folder",
        path=folder,
        repo_id=None,
        revision=None,
        config={**config, "vocab_size": rows},
        tensors={adapter.embedding: TensorInfo("F32", (rows, 8), "model.safetensors")},
        tokenizer=read_tokenizer(folder, config),
    )


@pytest.mark.parametrize("light", [True, False], ids=["light", "proven"])
@pytest.mark.parametrize("group", range(2))
def test_writing_changes_nothing_but_the_mask(tmp_path: Path, group: int, light: bool) -> None:
    import transformers

    written = 0
    for seed in range(1000 + group * DRAWS, 1000 + (group + 1) * DRAWS):
        source, out = tmp_path / str(seed), tmp_path / f"{seed}-out"
        config = make_folder(source, seed)
        rows = json.loads((source / "config.json").read_text())["vocab_size"] + 40 * (seed % 2)
        info = _source(source, config, rows)
        try:
            before = transformers.AutoTokenizer.from_pretrained(source)
            mask = decide_mask_token(_recipe(), info, get_adapter("llama"))
        except (TypeError, ValueError, IncompatibleError):
            continue
        out.mkdir()
        (out / "config.json").write_text((source / "config.json").read_text())
        try:
            write_tokenizer(mask, info.tokenizer, source, out, light=light)
        except DataError as error:
            # A vocabulary of words whose unknown token is not among them.
            assert "UNK" in str(error), seed
            continue
        after = transformers.AutoTokenizer.from_pretrained(out)
        assert (after.mask_token, after.mask_token_id) == (mask.token, mask.id), seed
        kept = {text: row for text, row in after.get_vocab().items() if text in before.get_vocab()}
        assert kept == before.get_vocab(), seed
        text = "a b d"
        assert after(text)["input_ids"] == before(text)["input_ids"], seed
        assert after(f"a{mask.token}b")["input_ids"].count(mask.id) == 1, seed
        written += 1
    assert written >= DRAWS * 0.8


def test_a_file_whose_added_tokens_are_not_listed_is_edited_all_the_same(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    config = {"model_type": "llama", "vocab_size": 270}
    for folder in (source, out):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    content = json.loads(byte_level(SPECIAL, 0).to_str())
    # The name of the list is also the text of a token, and the list itself is not there.
    del content["added_tokens"]
    content["model"]["vocab"]["added_tokens"] = len(content["model"]["vocab"])
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "Q"}, "content": "q"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    info = _source(source, config, 270)
    mask = decide_mask_token(_recipe(), info, get_adapter("llama"))
    write_tokenizer(mask, info.tokenizer, source, out, light=True)
    made = json.loads((out / "tokenizer.json").read_text())
    assert [token["content"] for token in made.pop("added_tokens")] == ["<|mask|>"]
    assert made == {key: value for key, value in content.items() if key != "added_tokens"}


CODE = {"AutoTokenizer": ["tokenization_our.OurTokenizer", None]}


def _with_settings(folder: Path, family: str, **settings: Any) -> SourceInfo:
    folder.mkdir()
    byte_level(SPECIAL, 3).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return _source(folder, {"model_type": family}, 320)


@pytest.mark.parametrize("auto_map", [CODE, CODE["AutoTokenizer"], {"AutoTokenizer": "a.B"}])
@pytest.mark.parametrize("declared", ["OurTokenizer", None])
def test_a_tokenizer_of_the_checkpoints_own_code_is_refused(
    tmp_path: Path, auto_map: Any, declared: str | None
) -> None:
    info = _with_settings(tmp_path / "s", "llama", tokenizer_class=declared, auto_map=auto_map)
    with pytest.raises(IncompatibleError, match="not run") as caught:
        check_tokenizer(info)
    assert "auto_map" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "declared"), [("qwen2", "OurTokenizer"), ("llama", "LlamaTokenizerFast")]
)
def test_code_that_transformers_has_a_class_for_is_told_and_left_out(
    tmp_path: Path, family: str, declared: str
) -> None:
    info = _with_settings(tmp_path / "s", family, tokenizer_class=declared, auto_map=CODE)
    (warning,) = check_tokenizer(info)
    assert "tokenization_our.OurTokenizer" in warning
    out = tmp_path / "out"
    out.mkdir()
    mask = decide_mask_token(_recipe(), info, get_adapter("llama"))
    write_tokenizer(mask, info.tokenizer, tmp_path / "s", out, light=True)
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert written["tokenizer_class"] in ("LlamaTokenizerFast", "PreTrainedTokenizerFast")


def test_settings_that_name_a_place_are_not_copied(tmp_path: Path) -> None:
    info = _with_settings(
        tmp_path / "s", "llama", name_or_path="/home/me/x", tokenizer_file="/home/me/t.json"
    )
    out = tmp_path / "out"
    out.mkdir()
    mask = decide_mask_token(_recipe(), info, get_adapter("llama"))
    write_tokenizer(mask, info.tokenizer, tmp_path / "s", out, light=True)
    assert "/home/me" not in (out / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("file", "module", "extra"),
    [
        ("tekken.json", "mistral_common", "mistral"),
        ("tokenizer.model", "sentencepiece", "sentencep"),
    ],
)
def test_a_vocabulary_whose_reader_is_not_installed_is_refused_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, module: str, extra: str
) -> None:
    info = _with_settings(tmp_path / "s", "mistral")
    info = replace(info, tokenizer=replace(info.tokenizer, file=file))
    monkeypatch.setattr(plan_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(IncompatibleError, match=module) as caught:
        check_tokenizer(info)
    assert f"dllm-convert[{extra}" in (caught.value.hint or "")
    monkeypatch.setattr(plan_tokenizer, "find_spec", lambda name: object())
    assert check_tokenizer(info) == ()


def test_a_tekken_file_beside_a_tokenizer_json_is_not_copied(tmp_path: Path) -> None:
    # With mistral-common installed transformers would read it instead, and it has no mask.
    info = _with_settings(tmp_path / "s", "mistral")
    (tmp_path / "s" / "tekken.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    mask = decide_mask_token(_recipe(), info, get_adapter("llama"))
    write_tokenizer(mask, info.tokenizer, tmp_path / "s", out)
    assert not (out / "tekken.json").exists()
