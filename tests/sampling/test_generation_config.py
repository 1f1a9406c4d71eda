"""Settings as transformers takes them: keywords, a GenerationConfig, the checkpoint's own."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from tiny_decoders import MASK, prompt, tiny
from transformers import GenerationConfig, GenerationMixin

from dllm_convert.modeling.published import settings

END, PAD = 31, 59


def model_that_ends(**own: Any) -> Any:
    """A model whose fifth token ends its text."""
    model = tiny("llama", block=4)
    free = model.generate(prompt(6), max_new_tokens=12, eos_token_id=None)[0, 6:].tolist()
    model.generation_config = GenerationConfig(eos_token_id=free[4], pad_token_id=PAD, **own)
    return model


def written(model: Any, *arguments: Any, **settings: Any) -> list[int]:
    tokens: list[int] = model.generate(prompt(6), *arguments, **settings)[0, 6:].tolist()
    return tokens


def test_what_is_not_set_is_the_checkpoints() -> None:
    model = model_that_ends(confidence_threshold=0.2, max_denoising_steps=2)
    expected = written(model, max_new_tokens=12)
    assert PAD in expected
    for config in (GenerationConfig(max_new_tokens=12), GenerationConfig(max_length=18)):
        assert written(model, generation_config=config) == expected
        assert written(model, config) == expected
    own = written(model, max_new_tokens=12, confidence_threshold=None, max_denoising_steps=None)
    assert own != expected
    assert written(model, GenerationConfig(), max_new_tokens=12) == expected


def test_the_call_comes_first_then_the_config_then_the_checkpoint() -> None:
    model = model_that_ends(max_new_tokens=5)
    assert len(written(model)) == 5
    assert len(written(model, GenerationConfig(max_new_tokens=7))) == 7
    assert len(written(model, GenerationConfig(max_length=9))) == 3
    assert len(written(model, GenerationConfig(max_length=9), max_new_tokens=4)) == 4
    assert len(written(model, GenerationConfig(max_new_tokens=7), max_length=8)) == 2
    assert len(written(model, max_length=8)) == 2
    assert len(written(model, max_length=8, max_new_tokens=3)) == 3
    del model.generation_config.max_new_tokens
    assert len(written(model)) == 128
    with pytest.raises(ValueError, match="max_length is 6, and the prompt takes 6 tokens"):
        written(model, max_length=6)


def test_several_ends() -> None:
    model = model_that_ends()
    free = written(model, max_new_tokens=12, eos_token_id=None)
    ends = [free[7], free[2]]
    for given in (ends, tuple(ends), torch.tensor(ends)):
        found = written(model, max_new_tokens=12, eos_token_id=given)
        assert found == free[:3] + [PAD] * 9
    config = GenerationConfig(eos_token_id=ends, max_new_tokens=12)
    assert written(model, config) == free[:3] + [PAD] * 9
    assert written(model, max_new_tokens=12, eos_token_id=-1) == free
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=-1)
    assert written(model, max_new_tokens=12) == free[:3] + [ends[0]] * 9
    for wrong in (1.0, "31", [1, "2"], True):
        with pytest.raises(ValueError, match=r"eos_token_id is .* expected the id"):
            written(model, eos_token_id=wrong)


REFUSALS = [
    ({"num_beams": 4}, "has no beams"),
    ({"length_penalty": 0.5}, "has no beams"),
    ({"early_stopping": True}, "has no beams"),
    ({"penalty_alpha": 0.6}, "in no order"),
    ({"prompt_lookup_num_tokens": 3}, "verify_with"),
    ({"encoder_no_repeat_ngram_size": 2}, "an encoder"),
    ({"output_scores": True}, "observer"),
    ({"cache_implementation": "quantized"}, "a cache of its own"),
    ({"token_healing": True}, "last token"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSALS, ids=str)
def test_what_cannot_be_done_is_refused_with_the_reason(
    fields: dict[str, Any], reason: str
) -> None:
    model = model_that_ends()
    ((name, value),) = fields.items()
    said = re.escape(f"{name} is {value!r}, which is refused: ") + f".*{reason}"
    with pytest.raises(ValueError, match=said):
        written(model, max_new_tokens=3, **fields)
    with pytest.raises(ValueError, match=said):
        written(model, GenerationConfig(max_new_tokens=3, **fields))


def test_every_field_of_transformers_is_known() -> None:
    """Each field is honoured, decides nothing, or is refused; a new one has to be looked at."""
    standard = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    taken = inspect.signature(GenerationMixin.generate).parameters.keys()
    own = inspect.signature(type(tiny("llama")).generate).parameters.keys()
    kinds = [settings.TAKEN, settings.HARMLESS.keys(), settings.REFUSED.keys()]
    for name in (standard | taken) - own - {"kwargs"}:
        assert sum(name in kind for kind in kinds) == 1, name
    assert all(settings.HARMLESS.values()) and all(settings.REFUSED.values())


def test_names_of_nobody_are_refused() -> None:
    model = model_that_ends()
    for name, value in (("do_sampl", False), ("temprature", None), ("logits_to_keep", 1)):
        with pytest.raises(ValueError, match=f"unknown settings .*{name}"):
            written(model, **{name: value})
    for extra in ("special_tokens_mask", "offset_mapping", "inputs_embeds", "position_ids"):
        with pytest.raises(ValueError, match=f"unknown settings .*{extra}"):
            written(model, **{extra: torch.zeros(1, 6, dtype=torch.long)})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1},
        {"use_cache": True},
        {"use_cache": False},
        {"cache_implementation": "static", "max_cache_len": 64, "disable_compile": True},
        {"renormalize_logits": True, "typical_p": 1.0, "epsilon_cutoff": 0.0, "num_beam_groups": 1},
        {"top_k": 50, "top_p": 1.0},
        {"stop_strings": None, "suppress_tokens": [], "output_scores": False},
        {"min_length": 0, "length_penalty": 1.0, "early_stopping": False},
        {"bos_token_id": 0},
    ],
    ids=str,
)
def test_what_does_nothing_in_transformers_does_nothing_here(fields: dict[str, Any]) -> None:
    model = model_that_ends()
    expected = written(model, max_new_tokens=12)
    assert written(model, GenerationConfig(max_new_tokens=12, **fields)) == expected
    if "bos_token_id" not in fields:
        assert written(model, max_new_tokens=12, **fields) == expected
    assert (
        written(model, max_new_tokens=12, logits_processor=None, assistant_model=None) == expected
    )


def test_sampling_is_decided_where_it_is_spoken_of_first() -> None:
    model = model_that_ends(do_sample=True, temperature=3.0, max_new_tokens=12)
    greedy = written(model, do_sample=False)
    drawn = written(model, seed=1)
    assert drawn != greedy
    for config in (GenerationConfig(do_sample=False), GenerationConfig(temperature=0.0)):
        assert written(model, config, seed=1) == greedy
    assert written(model, temperature=0.0, seed=1) == greedy
    assert written(model, do_sample=True, temperature=0.0, seed=1) == greedy
    assert written(model, GenerationConfig(do_sample=True), seed=1) == drawn
    assert written(model, do_sample=True, seed=1) == drawn
    assert written(model, temperature=3.0, do_sample=True, seed=1) == drawn
    plain = model_that_ends(max_new_tokens=12)
    assert written(plain, seed=1) == greedy
    hot = written(plain, temperature=1.0, seed=1)
    assert hot != greedy
    assert written(plain, do_sample=True, seed=1) == hot
    assert written(plain, GenerationConfig(do_sample=True), seed=1) == hot


def test_the_checkpoints_own_config_is_warned_of() -> None:
    model = model_that_ends()
    model.generation_config.num_beams = 5
    with pytest.warns(UserWarning, match=r"\['num_beams'\], which denoising has no use"):
        written(model, max_new_tokens=3)


def test_facts_of_the_model_are_not_to_be_changed() -> None:
    model = model_that_ends()
    same = GenerationConfig(max_new_tokens=3, block_size=4, mask_token_id=MASK)
    assert len(written(model, same)) == 3
    with pytest.raises(ValueError, match="block_size is 8, this model's is 4"):
        written(model, GenerationConfig(max_new_tokens=3, block_size=8))


def test_a_dictionary_is_returned_where_the_config_says_so() -> None:
    model = model_that_ends()
    config = GenerationConfig(max_new_tokens=3, return_dict_in_generate=True)
    assert model.generate(prompt(4), config).sequences.shape == (1, 7)
    assert model.generate(prompt(4), config, return_dict_in_generate=False).shape == (1, 7)


def test_prompts_are_given_once_and_in_their_shape() -> None:
    model, ids = model_that_ends(), prompt(4)
    with pytest.raises(ValueError, match="inputs and input_ids are the same"):
        model.generate(ids, input_ids=ids)
    with pytest.raises(ValueError, match="give input_ids"):
        model.generate()
    with pytest.raises(ValueError, match=r"input_ids is \(4,\), expected token ids"):
        model.generate(ids[0])
    with pytest.raises(ValueError, match="input_ids is list"):
        model.generate(ids.tolist())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\)"):
        model.generate(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"token_type_ids has shape \(1, 3\)"):
        model.generate(ids, token_type_ids=torch.zeros(1, 3))


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_types_of_tokens_are_those_of_one_text(family: str) -> None:
    model, ids = tiny(family), prompt(5)
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    settings: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(ids, **settings).tolist()
    assert model.generate(ids, token_type_ids=kinds, **settings).tolist() == expected
    kinds[0, 0], mask[0, 0] = 3, 0
    model.generate(ids, token_type_ids=kinds, attention_mask=mask, **settings)
    with pytest.raises(ValueError, match="token_type_ids names a second text"):
        model.generate(ids, token_type_ids=kinds, **settings)
