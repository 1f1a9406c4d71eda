"""Decode text with a converted checkpoint: what `dllm-convert sample` and the card show."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_convert.adapters import adapter_of
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.safetensors_header import load_json_object
from dllm_convert.sampling import DEFAULT_PROMPT


@dataclass(frozen=True)
class Sample:
    """One decoded text.

    Attributes:
        prompt: Text given.
        text: Text written, special tokens left out.
        new_tokens: Tokens written, up to and including the end of the text.
        forwards: Forward passes run.
        tokens_per_forward: New tokens divided by forwards.
        seconds: Wall time of decoding, loading not included.
    """

    prompt: str
    text: str
    new_tokens: int
    forwards: int
    tokens_per_forward: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a mapping."""
        return asdict(self)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a converted checkpoint.

    Raises:
        DataError: If there is no such folder or file.
        IncompatibleError: If it is not a diffusion checkpoint.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(
            f"{folder} has no config.json", hint="Give the folder that dllm-convert run wrote"
        )
    config = load_json_object(path)
    if not isinstance(config.get("diffusion"), dict):
        raise IncompatibleError(
            f"{folder} is not a diffusion checkpoint: its config.json has no 'diffusion' section",
            hint=f"Convert it first: dllm-convert run {folder} --to bd3lm --block 32",
        )
    return config


def decode_sample(
    model: Any, tokenizer: Any, prompt: str, *, seed: int | None = None, **options: Any
) -> Sample:
    """Decode one prompt with a loaded model.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompt: Text to go on from.
        seed: Seed for temperatures above 0.
        **options: Fields of `DecodingOptions`; None keeps the checkpoint's default.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if (
        ids.shape[1] > 1
        and tokenizer.sep_token_id is not None
        and ids[0, -1] == tokenizer.sep_token_id
    ):
        ids = ids[:, :-1]
    if ids.shape[1] == 0:
        raise DataError("the prompt is empty", hint="Give at least one word with --prompt")
    given = {name: value for name, value in options.items() if value is not None}
    started = time.monotonic()
    output = model.generate(ids.to(model.device), seed=seed, return_dict_in_generate=True, **given)
    seconds = time.monotonic() - started
    new = output.sequences[0, ids.shape[1] :].cpu()
    count = round(output.tokens_per_forward * output.forwards)
    return Sample(
        prompt,
        tokenizer.decode(new[:count], skip_special_tokens=True),
        count,
        output.forwards,
        round(output.tokens_per_forward, 3),
        round(seconds, 3),
    )


def run_sample(
    folder: Path, prompt: str | None = None, *, seed: int | None = None, **options: Any
) -> dict[str, Any]:
    """Load a converted checkpoint and decode one prompt.

    Args:
        folder: Converted checkpoint.
        prompt: Text to go on from.
        seed: Seed for temperatures above 0.
        **options: `max_new_tokens`, `max_denoising_steps`, `confidence_threshold`, `temperature`.

    Returns:
        The fields of `Sample`.
    """
    from transformers import AutoTokenizer

    from dllm_convert.training.setup import load_model

    adapter = adapter_of(read_config(folder))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = load_model(folder, adapter, dtype=dtype)
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return decode_sample(model, tokenizer, prompt or DEFAULT_PROMPT, seed=seed, **options).as_dict()
