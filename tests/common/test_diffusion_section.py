"""The `diffusion` section is one value: what is written is read, by the published file as well."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.converted_config import read_section
from dllm_convert.modeling.published.settings import decoding_options

SECTIONS = [
    DiffusionSection("mdlm", None, 7, token_shift=False),
    DiffusionSection("mdlm", None, 0, token_shift=True, noise_schedule="cosine"),
    DiffusionSection("bd3lm", 8, 7, token_shift=True, context="causal"),
    DiffusionSection("mdlm", None, 7, True, noise_schedule="polynomial", noise_power=3.0),
    DiffusionSection("bd3lm", 1, 7, True, noise_kernel="uniform", discrete_steps=9),
    DiffusionSection(
        *("mdlm", None, 7, True, "learned"), noise_exponents=(0.5, 2.0), noise_classes=((3, 9),)
    ),
    DiffusionSection("bd3lm", 4, 7, True, "learned", noise_exponents=(1.0,)),
    DiffusionSection(
        "mdlm", None, 7, True, noise_kernel="neighbours", discrete_steps=9, noise_jumps=2.5
    ),
]


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_what_is_written_is_read(section: DiffusionSection) -> None:
    assert read_section({"diffusion": section.as_dict()}) == section


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_the_published_file_reads_the_same(section: DiffusionSection) -> None:
    config = SimpleNamespace(
        vocab_size=16,
        mask_token_id=section.mask_token_id,
        block_size=section.block_size,
        diffusion=section.as_dict(),
    )
    options = decoding_options(config, {}, 1, None, {})
    assert options.token_shift is section.token_shift
    assert options.causal_context is (section.context == "causal")
    assert bool(options.noise_tokens) is (not section.masks)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask_token_id", False),
        ("mask_token_id", 0.0),
        ("mask_token_id", 1 << 70),
        ("block_size", 1.0),
        ("token_shift", 0),
        ("token_shift", ...),
        ("attention", ...),
        ("noise_schedule", ["linear"]),
        ("noise_kernel", None),
        ("discrete_steps", True),
        ("noise_power", 0),
        ("noise_power", float("nan")),
    ],
    ids=str,
)
def test_what_is_not_sound_is_told_by_its_field(key: str, value: object) -> None:
    section = DiffusionSection("bd3lm", 8, 7, token_shift=True).as_dict()
    section.pop(key, None)
    if value is not ...:
        section[key] = value
    with pytest.raises(IncompatibleError, match=rf"config\.json: diffusion\.{key} is "):
        read_section({"diffusion": section})
