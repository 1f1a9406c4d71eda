"""Load models completely or not at all: the loader's own report is read, everywhere.

transformers fills what a file lacks at random and drops what its class does not know, and says so
in a log. Here both are refused, with the names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.common.manifest import refuse_other_version
from dllm_convert.errors import DataError
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.converted_config import check_converted_config, read_converted_config
from dllm_convert.source.folder import read_config
from dllm_convert.source.leftovers import computed_with
from dllm_convert.source.source_fit import fit_folder
from dllm_convert.source.text_model import text_config
from dllm_convert.source.tokenizer_loading import load_tokenizer

BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises of a checkpoint that is not what it seems."""


_INSIDE = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""What tensors of a text model are called where another model holds it, for the loader of its class
(`source.text_model`)."""


def load_complete(cls: Any, source: Path | str, *, device: str = "cpu", **settings: Any) -> Any:
    """Load a checkpoint with a class of transformers, in evaluation mode.

    Args:
        cls: A model class, or one of the auto classes.
        source: Folder, or a Hub id.
        device: Where the model goes; on the CPU it stays where `settings` put it.
        **settings: Other arguments of `from_pretrained`.

    Raises:
        DataError: It cannot be loaded, or not completely.
    """
    try:
        model, info = cls.from_pretrained(source, output_loading_info=True, **settings)
    except (torch.OutOfMemoryError, HfHubHTTPError):
        raise
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else "no message"
        raise DataError(
            f"{source} does not load as {cls.__name__} ({type(error).__name__}: {reason[:300]})",
            hint="HF_DEBUG=1 shows where this comes from",
        ) from error
    _refuse_partial(model, info, source)
    # A model in 4 bits cannot be told where to go, not even where it is.
    return (model if device == "cpu" else model.to(device)).eval()


def load_base(
    folder: Path,
    adapter: Adapter,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a base as stock transformers does, its config saying what its files say.

    One that is a conversion itself is loaded as what it is: the stock class would let a block
    diffusion model look ahead across its blocks.

    Args:
        folder: Folder of safetensors.
        adapter: Its family.
        device: Where the model goes.
        dtype: Type the weights are held in.

    Raises:
        DataError: It cannot be loaded, or not completely.
        IncompatibleError: Its tensors are not those of the class.
    """
    import transformers

    stored = read_config(folder)
    if diffusion_section(stored) is not None:
        return load_model(folder, adapter, device=device, dtype=dtype)
    inside = {} if text_config(stored) is None else {"key_mapping": dict(_INSIDE)}
    return load_complete(
        getattr(transformers, adapter.stock_class),
        folder,
        device=device,
        config=base_config(folder, adapter),
        dtype=dtype,
        attn_implementation=adapter.implementations[0],
        **inside,
    )


def base_config(folder: Path, adapter: Adapter) -> Any:
    """Return the stock config of a base, corrected by what its files say.

    Raises:
        DataError: A file is broken.
        IncompatibleError: Its tensors are not those of the class.
    """
    import transformers

    cls = getattr(transformers, adapter.stock_class).config_class
    inner = text_config(read_config(folder))
    config = cls.from_pretrained(folder) if inner is None else cls.from_dict(inner)
    for key, value in fit_folder(folder, adapter).config.items():
        setattr(config, key, value)
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= config.vocab_size:
        # A row that only the conversion has: the stock class would not even be built.
        config.pad_token_id = None
    return config


def _refuse_partial(model: Any, info: Mapping[str, Any], source: Path | str) -> None:
    name = type(model).__name__
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(
            f"{source} would load at random: it has no {_first(missing)} of {name}",
            hint="Take the complete weights of this model",
        )
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in _pairs(info))
    if mismatched:
        raise DataError(
            f"{source} would load at random: {_first(mismatched)} have other shapes in {name}",
            hint="Take the config.json that belongs to these weights",
        )
    foreign = computed_with(sorted(info["unexpected_keys"]), model.state_dict().keys())
    if foreign:
        raise DataError(
            f"{source} holds {_first(foreign)}, which {name} does not compute with: it would be "
            "another model",
            hint="Take the config.json that belongs to these weights",
        )


def _pairs(info: Mapping[str, Any]) -> Iterable[Any]:
    return info["mismatched_keys"] or ()


def _first(names: Collection[str]) -> str:
    """Return the first names and how many more there are."""
    shown = ", ".join(list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def device_and_dtype(device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """Choose where a model runs that is not trained, and in what: a GPU in bfloat16, or float32.

    Args:
        device: Where, if that is given.
        dtype: In what, if that is given, as torch names it.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return where, dtype or ("bfloat16" if where.startswith("cuda") else "float32")


def load_model(
    folder: Path,
    adapter: Adapter,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantized: bool = False,
) -> Any:
    """Load the diffusion class of a checkpoint folder, in evaluation mode.

    Args:
        folder: Converted checkpoint.
        adapter: Its family.
        device: Where the model goes.
        dtype: Type the weights are held in.
        attention: Implementation, as transformers names it; None is the family's first.
        quantized: Hold linear layers in 4 bits (NF4, arXiv 2305.14314).

    Raises:
        DataError: It cannot be loaded, or not completely.
    """
    cls = diffusion_class(adapter)
    chosen = attention or adapter.implementations[0]
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": chosen}
    if quantized:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return load_complete(cls, folder, device=device, **settings)


@dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint, loaded to be run.

    Attributes:
        model: Diffusion model in evaluation mode.
        tokenizer: Its tokenizer.
        config: Its config.json, which was checked.
        adapter: Its family.
    """

    model: Any
    tokenizer: Any
    config: Mapping[str, Any]
    adapter: Adapter


def load_checkpoint(
    folder: Path, *, device: str | None = None, dtype: str | None = None
) -> Checkpoint:
    """Check a folder and load it to run; its own modelling code is not run.

    Args:
        folder: Converted checkpoint.
        device: As in `device_and_dtype`.
        dtype: As in `device_and_dtype`.

    Raises:
        DataError: There is no such checkpoint, or it is not whole.
        IncompatibleError: It is no diffusion checkpoint, or contradicts itself.
        UnsupportedError: Its family is not known.
    """
    config = read_converted_config(folder)
    adapter = check_converted_config(config, folder)
    refuse_other_version(folder)
    where, held = device_and_dtype(device, dtype)
    model = load_model(folder, adapter, device=where, dtype=getattr(torch, held))
    rows = int(model.config.vocab_size)
    # The mask of a gated model needs no row.
    known = max(rows, int(model.config.mask_token_id) + 1) if model.is_gated else rows
    tokenizer = load_tokenizer(folder, known)
    return Checkpoint(model=model, tokenizer=tokenizer, config=config, adapter=adapter)
