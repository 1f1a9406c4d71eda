"""Quantised checkpoints, told by their config, the files beside them, or their tensors.

They are looked for before anything else: a packed matrix is missing under its own name, has another
shape and another type, and none of that is what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dllm_convert.errors import IncompatibleError
from dllm_convert.source.info import SourceInfo, TensorInfo

"""Types of weights that can be converted."""

SECTIONS = ("quantization_config", "quantization", "compression_config")
"""Sections of config.json that say how weights are quantised."""
_SIDE_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quantization_config.json": "",
    "quant_strategy.json": "quanto",
    "job_new.json": "EXL2",
}
"""Files that tools for quantising write, and whose they are."""
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "mxfp4": "MXFP4",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "mlx": "MLX",
}
_TELLING = (
    (r"(absmax|quant_map|nested_absmax|nested_quant_map|SCB|quant_state\..+)", "bitsandbytes"),
    (r"(q_weight|q_invperm|q_scale_max|q_groups)", "EXL2"),
    (r"(trellis|suh|svh)", "EXL3"),
    (r"(codebooks|codes)", "AQLM"),
    (r"(weight_packed|weight_shape|weight_zero_point|weight_g_idx)", "compressed-tensors"),
    (r"(W_q|W_q\..+)", "HQQ"),
    (r"(weight_scales)", "EETQ"),
    (r"(_data|_qdata|weight\._data|weight\._scale|weight_qdata|weight:.+)", "quanto or torchao"),
    (r"(\w*_blocks)", "MXFP4"),
    (r"(weight_scale_2|\w*quantizer\._amax|weight_amax)", "ModelOpt"),
    (r"(weight_scale_inv|weight_scale|activation_scale)", "FP8"),
)
"""Last parts of names that only a quantised layer has."""
_PACKED = frozenset(
    {"U8", "I8", "U32", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
_NO_WEIGHTS = ("bias", "_ids", "mask")
"""How the names of buffers end that old files hold as whole numbers."""
_GPTQ = frozenset({"qweight", "qzeros"})


def check_quantised(source: SourceInfo) -> None:
    """Check that the weights are plain numbers; GGUF is dequantised by transformers.

    Raises:
        IncompatibleError: They are quantised; the message says how, and how that is known.
    """
    if source.kind == "gguf":
        return
    section = _section(source.config, source.tensors)
    check_packed(source.tensors, source.beside)
    sign = section or (None if source.tensors else _side_file(source.beside))
    if sign is not None:
        plain = "; if the tensors are plain, take the section out of config.json" if section else ""
        raise _refusal(sign, plain)


def check_packed(tensors: Mapping[str, TensorInfo], beside: Iterable[str] = ()) -> None:
    """Check that tensors are plain numbers, by their names and types.

    Args:
        tensors: Tensor name to description.
        beside: Names of the files beside them, which tell whose tool packed them.

    Raises:
        IncompatibleError: They are packed.
    """
    sign = _tensors(tensors, beside)
    if sign is not None:
        raise _refusal(sign)


def _refusal(sign: str, more: str = "") -> IncompatibleError:
    return IncompatibleError(
        f"the weights are quantised ({sign}), and quantised weights cannot be trained on",
        hint=f"Take the checkpoint in bfloat16, float16 or float32 that it was made from{more}",
    )


def side_file_warning(source: SourceInfo) -> str | None:
    """Return what to know of a quantising tool's file beside weights that are plain."""
    found = next((name for name in _SIDE_FILES if name in source.beside), None)
    if found is None or not source.tensors or source.kind == "gguf":
        return None
    return f"{found} lies beside the weights, which are not quantised: it is left out"


def _named(method: object) -> str:
    text = str(method).lower().replace("_", "-")
    known = {key.replace("_", "-"): name for key, name in _METHODS.items()}
    return known.get(text, text if re.fullmatch(r"[\w.-]{1,30}", text) else "")


def _section(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Say what a section of config.json says; one that is null or empty says nothing."""
    for key in SECTIONS:
        section = config.get(key)
        if not section:
            continue
        values = section if isinstance(section, Mapping) else {}
        method = _named(values.get("quant_method") or values.get("quant_algo") or "")
        if not method and (values.get("load_in_4bit") or values.get("load_in_8bit")):
            method = "bitsandbytes"
        if not method and {"bits", "group_size"} <= values.keys():
            method = "MLX" if _packed_mlx(tensors) or not tensors else ""
        named = f"{method}: " if method else ""
        return f"{named}config.json has a {key}"
    return None


def _side_file(names: Iterable[str]) -> str | None:
    present = set(names)
    for name, method in _SIDE_FILES.items():
        if name in present:
            return f"{method}: {name} beside them" if method else f"{name} beside them"
    return None


def _packed(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return a matrix that is stored as whole numbers or 8-bit floats."""
    for name, tensor in tensors.items():
        matrix = len(tensor.shape) > 1 and not name.endswith(_NO_WEIGHTS)
        if matrix and tensor.dtype in _PACKED:
            return name
    return next((name for name in tensors if name.rpartition(".")[2] in _GPTQ), None)


def _packed_mlx(tensors: Mapping[str, TensorInfo]) -> bool:
    return any(
        tensor.dtype == "U32" and f"{name.removesuffix('weight')}scales" in tensors
        for name, tensor in tensors.items()
    )


def _tensors(tensors: Mapping[str, TensorInfo], beside: Iterable[str]) -> str | None:
    """Say what the names and types of the tensors tell."""
    ends: dict[str, str] = {}
    for name in tensors:
        ends.setdefault(name.rpartition(".")[2], name)
    if ends.keys() >= _GPTQ or "qweight" in ends:
        method = "GPTQ" if "g_idx" in ends else "AWQ or GPTQ"
        beside_it = _side_file(beside)
        return f"{beside_it or method}, {ends['qweight']}"
    if _packed_mlx(tensors):
        return f"MLX: {next(n for n, t in tensors.items() if t.dtype == 'U32')} is U32"
    packed = _packed(tensors)
    for pattern, method in _TELLING:
        for name in tensors:
            if re.fullmatch(rf".+\.{pattern}", name) and (packed or "scale" not in name):
                return _side_file(beside) or f"{method}: {name}"
    if packed is None:
        return None
    kind = tensors[packed].dtype
    method = "FP8: " if kind.startswith("F8") else ""
    return _side_file(beside) or f"{method}{packed} has dtype {kind}"
