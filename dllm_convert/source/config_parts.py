"""Parts of transformers that config.json names: the activation, the scaling of rotary positions.

A class looks them up when it is built and ends in a KeyError; a conversion without training builds
none, so that they are looked at in the plan. The tables are facts of transformers 5; a test
compares them with the release that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dllm_convert.errors import IncompatibleError

ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
        *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
        *("mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus"),
        *("swish", "tanh"),
    }
)
"""Activations without weights of their own."""
SCALINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "longrope": ("short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "proportional": (),
    }
)
"""Scaling of rotary positions to what it cannot be computed without."""
_LENGTHS = ("short_factor", "long_factor")
_THESE = "Take the config.json that belongs to these weights"


def check_parts(config: Mapping[str, Any], *, rotary: int | None) -> None:
    """Check that transformers has the parts that a config names.

    Args:
        config: config.json.
        rotary: Frequencies of rotary positions, half of a head's width; None of a class that has
            no such positions.

    Raises:
        IncompatibleError: It does not, or lacks a number that a part is computed from.
    """
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise IncompatibleError(
            f"config.json: hidden_act is {str(activation)[:40]!r}, expected an activation of "
            "transformers without weights, such as silu or gelu",
            hint=_THESE,
        )
    if rotary is None:
        return
    # transformers lets the older field win.
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key):
            _check_scaling(key, config[key], rotary)
            return


def _check_scaling(key: str, scaling: Mapping[str, Any], rotary: int) -> None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        renamed = "longrope" if kind == "su" else None
        raise IncompatibleError(
            f"config.json: {key}.rope_type is {str(kind)[:40]!r}, expected one of "
            f"{', '.join(SCALINGS)}",
            hint=f"Write {renamed}, its name of today" if renamed else _THESE,
        )
    missing = [name for name in SCALINGS[kind] if scaling.get(name) is None]
    if missing:
        raise IncompatibleError(
            f"config.json: {key} has no {' and no '.join(missing)}, which {kind} is computed from",
            hint=_THESE,
        )
    for name in _LENGTHS if kind == "longrope" else ():
        factors = scaling[name]
        if not isinstance(factors, list) or len(factors) != rotary:
            found = f"{len(factors)} numbers" if isinstance(factors, list) else "no list"
            raise IncompatibleError(
                f"config.json: {key}.{name} is {found}, expected {rotary}, half of a head's width",
                hint=_THESE,
            )
