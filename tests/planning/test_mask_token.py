"""The mask-token rules, one by one and in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.adapters import get_adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.mask_token import MaskTokenDecision, decide_mask_token, unused_ids
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import SourceInfo, TensorInfo, TokenizerInfo, inspect_source


def source(
    size: int,
    rows: int,
    *,
    family: str = "llama",
    special: dict[str, int] | None = None,
    reachable: frozenset[int] = frozenset({0, 1}),
    mask: str | None = None,
) -> SourceInfo:
    """Return a source whose vocabulary is t0, t1, ... with some texts replaced."""
    special = special or {}
    taken = set(special.values())
    vocab = {f"t{row}": row for row in range(size) if row not in taken} | special
    adapter = get_adapter(family)
    return SourceInfo(
        given="made up",
        kind="folder",
        path=None,
        repo_id=None,
        revision=None,
        config={"model_type": family, "vocab_size": rows},
        tensors={adapter.embedding: TensorInfo("F32", (rows, 8), "model.safetensors")},
        tokenizer=TokenizerInfo(vocab, frozenset(special), reachable, size, mask),
    )


def decide(info: SourceInfo, **mask_token: Any) -> MaskTokenDecision:
    recipe = Recipe(source="made up", target="mdlm", mask_token=mask_token)
    return decide_mask_token(recipe, info, get_adapter(info.model_type))


def test_the_tokenizers_own_mask_comes_first_and_its_row_is_kept() -> None:
    made = decide(source(100, 128, special={"[MASK]": 7}, mask="[MASK]"))
    assert (made.rule, made.id, made.new, made.write_row) == ("tokenizer", 7, False, False)
    assert made.rows_after == made.rows_before == 128


def test_a_recipe_cannot_silently_lose_to_the_tokenizers_own() -> None:
    info = source(100, 128, special={"[MASK]": 7, "[SPARE]": 8}, mask="[MASK]")
    assert decide(info, token="[MASK]", id=7).rule == "tokenizer"
    with pytest.raises(IncompatibleError, match="has its own"):
        decide(info, token="[SPARE]")


def test_a_causal_models_own_mask_that_is_also_its_padding_is_passed_over() -> None:
    # No causal model was trained with a mask, so the rules choose another and say why.
    info = source(100, 128, special={"[MASK]": 0}, mask="[MASK]")
    made = decide(info)
    assert (made.rule, made.id, made.new) == ("padded-row", 100, True)
    assert "'[MASK]'" in made.reason
    assert "something else too" in made.reason
    assert decide(info, token="<m>").token == "<m>"


def test_a_causal_models_own_mask_that_text_produces_is_passed_over() -> None:
    info = source(100, 128, special={"a": 7}, mask="a")
    info = replace(info, tokenizer=replace(info.tokenizer, mask_is_word=True))
    made = decide(info)
    assert (made.rule, made.id) == ("padded-row", 100)
    assert "ordinary token" in made.reason


def test_an_encoder_is_not_given_another_mask_than_its_own() -> None:
    info = source(100, 128, family="bert", special={"[MASK]": 0}, mask="[MASK]")
    for named in ({}, {"token": "<m>"}):
        with pytest.raises(IncompatibleError, match=r"trained with"):
            decide(info, **named)


def test_the_recipe_names_an_existing_special_token() -> None:
    made = decide(source(100, 100, special={"<spare>": 16}), token="<spare>")
    assert (made.rule, made.id, made.new, made.write_row) == ("recipe", 16, False, True)
    assert made == decide(source(100, 100, special={"<spare>": 16}), id=16)


def test_the_recipe_names_a_new_text() -> None:
    padded = decide(source(100, 128), token="<m>")
    assert (padded.token, padded.id, padded.new, padded.rows_after) == ("<m>", 100, True, 128)
    grown = decide(source(100, 100), token="<m>")
    assert (grown.id, grown.rows_after, grown.used_rows) == (100, 128, 100)


def test_the_recipe_names_a_later_padded_row() -> None:
    made = decide(source(100, 128), id=127)
    assert (made.token, made.id, made.new) == ("<|mask|>", 127, True)


@pytest.mark.parametrize(
    ("mask_token", "message"),
    [
        ({"token": "t5"}, "ordinary token"),
        ({"id": 5}, "ordinary token"),
        ({"token": "<eos>"}, "used elsewhere"),
        ({"id": 1}, "used elsewhere"),
        ({"id": 128}, "less than the 128 rows"),
        ({"id": 10**9}, "less than the 128 rows"),
        ({"token": "<spare>", "id": 17}, "has id 16, not 17"),
        ({"token": "<new>", "id": 5}, "is another token"),
        ({"token": ""}, "can be seen"),
        ({"token": " "}, "can be seen"),
    ],
)
def test_a_named_mask_that_is_taken_or_out_of_range(
    mask_token: dict[str, Any], message: str
) -> None:
    info = source(100, 128, special={"<spare>": 16, "<eos>": 1})
    with pytest.raises(IncompatibleError, match=message) as caught:
        decide(info, **mask_token)
    assert caught.value.exit_code == 3


def test_a_padded_row_is_the_first_free_one() -> None:
    made = decide(source(100, 128, special={"<|reserved_special_token_0|>": 9}))
    assert (made.rule, made.id, made.new, made.write_row) == ("padded-row", 100, True, True)
    assert made.used_rows == 100


def test_a_padded_row_that_a_config_uses_is_not_free() -> None:
    made = decide(source(100, 128, reachable=frozenset({1, 100, 101})))
    assert (made.rule, made.id) == ("padded-row", 102)


def test_a_reserved_token_is_used_when_no_row_is_free() -> None:
    special = {f"<|reserved_special_token_{n}|>": 90 + n for n in range(3)}
    info = source(100, 100, special=special)
    assert decide(info).token == "<|reserved_special_token_0|>"
    used = replace(info, tokenizer=replace(info.tokenizer, reachable=frozenset({90, 91})))
    made = decide(used)
    assert (made.rule, made.id, made.new, made.write_row) == ("reserved", 92, False, True)


def test_the_lowest_reserved_id_wins_not_the_first_in_the_alphabet() -> None:
    special = {"<|reserved_special_token_10|>": 95, "<|reserved_special_token_9|>": 94}
    assert decide(source(100, 100, special=special)).id == 94


def test_a_family_without_reserved_tokens_grows() -> None:
    info = source(100, 100, family="qwen2", special={"<|reserved_special_token_0|>": 9})
    assert decide(info).rule == "grow"


@pytest.mark.parametrize(("rows", "after"), [(100, 128), (127, 128), (128, 192), (49152, 49216)])
def test_growth_is_rounded_up(rows: int, after: int) -> None:
    made = decide(source(rows, rows))
    assert (made.rule, made.id, made.rows_after) == ("grow", rows, after)
    assert (made.new, made.write_row, made.used_rows) == (True, True, rows)


def test_a_new_text_never_collides_with_the_vocabulary() -> None:
    assert decide(source(100, 128, special={"<|mask|>": 7})).token == "<|mask_token|>"


def test_a_tokenizer_larger_than_the_embedding() -> None:
    with pytest.raises(IncompatibleError, match="ids up to 100, the embedding only 100 rows"):
        decide(source(101, 100))


def with_added(rows: int, added: dict[str, int], **given: Any) -> SourceInfo:
    """Return a source whose embedding has rows for the vocabulary without its added tokens."""
    info = source(max(rows, *(row + 1 for row in added.values())), rows, special=added, **given)
    return replace(info, tokenizer=replace(info.tokenizer, proper=rows))


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_added_tokens_beyond_the_embedding_make_it_grow(family: str) -> None:
    info = with_added(100, {"<pad>": 100, "<image>": 101}, family=family)
    made = decide(info)
    assert (made.rule, made.id, made.rows_after, made.used_rows) == ("grow", 102, 128, 100)


def test_a_mask_within_the_embedding_does_not_spare_the_others_their_rows() -> None:
    made = decide(with_added(100, {"<pad>": 100, "<spare>": 16}), token="<spare>")
    assert (made.id, made.rows_after, made.write_row) == (16, 128, True)


def test_an_own_mask_beyond_the_embedding_gets_a_row() -> None:
    made = decide(with_added(100, {"<mask>": 100}, mask="<mask>"))
    assert (made.rule, made.id, made.new, made.write_row) == ("tokenizer", 100, False, True)
    assert made.rows_after == 128


def test_config_and_embedding_that_disagree() -> None:
    info = source(100, 128)
    wrong = replace(info, config={**info.config, "vocab_size": 127})
    with pytest.raises(IncompatibleError, match="vocab_size is 127"):
        decide(wrong)


@pytest.mark.parametrize("value", [None, "many", True, 3.5])
def test_a_vocab_size_that_is_no_number(value: object) -> None:
    info = replace(source(10, 10), tensors={}, config={"model_type": "llama", "vocab_size": value})
    with pytest.raises(IncompatibleError, match="vocab_size"):
        decide(info)


def test_without_headers_the_config_gives_the_rows() -> None:
    assert decide(replace(source(100, 128), tensors={})).rows_before == 128


@pytest.mark.parametrize(
    ("family", "rule", "padding"),
    [
        ("bert", "tokenizer", 0),
        ("roberta", "tokenizer", 0),
        ("llama", "grow", 0),
        ("qwen2", "padded-row", 5),
        ("qwen3", "padded-row", 5),
        ("mistral", "grow", 0),
    ],
)
def test_rules_on_saved_tokenizers(
    source_cache: Callable[..., Path], family: str, rule: str, padding: int
) -> None:
    info = inspect_source(str(source_cache(family, vocab_padding=padding)))
    made = decide(info)
    assert made.rule == rule
    assert 0 <= made.id < made.rows_after


@pytest.mark.parametrize(
    ("size", "rows", "unused"),
    [(100, 128, ((101, 128),)), (100, 100, ((101, 128),)), (127, 128, ())],
    ids=["padded", "grown", "full"],
)
def test_rows_that_are_no_token(size: int, rows: int, unused: tuple[tuple[int, int], ...]) -> None:
    info = source(size, rows)
    assert unused_ids(info.tokenizer, decide(info)) == unused


def test_rows_between_tokens_that_are_no_token() -> None:
    info = source(100, 128)
    vocab = {text: row for text, row in info.tokenizer.vocab.items() if row not in (40, 41, 70)}
    info = replace(info, tokenizer=replace(info.tokenizer, vocab=vocab))
    assert unused_ids(info.tokenizer, decide(info)) == ((40, 42), (70, 71), (101, 128))
