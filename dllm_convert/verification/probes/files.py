"""Files: is every weight there, whole and finite, and is everything as the manifest recorded it?

Nothing here loads the model: headers are read, then one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dllm_convert.errors import DataError
from dllm_convert.modeling.bundle import auto_map
from dllm_convert.planning.attention import layer_types
from dllm_convert.planning.layers import SLIDING
from dllm_convert.source.tensor_names import stored_names
from dllm_convert.verification.instruments.reading import read_tensor
from dllm_convert.verification.memory import tensor_refusal
from dllm_convert.verification.probes.hashes import hashes_probe
from dllm_convert.verification.probes.storage import check_storage
from dllm_convert.verification.report import Probe, first_items, none_wrong, skipped
from dllm_convert.verification.subject import Subject


def check_files(subject: Subject) -> list[Probe]:
    """Return the probes `config`, `weights`, `index`, `dtypes`, `finite` and `hashes`."""
    probes = [_config(subject)]
    try:
        probes.append(_weights(subject))
        probes += check_storage(subject)
        probes.append(check_finite(subject))
    except DataError as error:
        probes.append(Probe("weights", False, "not readable", "safetensors", str(error)))
    probes.append(check_hashes(subject))
    return probes


def _config(subject: Subject) -> Probe:
    """Fields that other programs act on must say what the diffusion section says."""
    config, claim, adapter = subject.config, subject.claim, subject.adapter
    # Without our class a gated model is its base, and says so.
    required: dict[str, Any] = {
        "is_causal": None if claim.is_gated else False,
        "architectures": [adapter.stock_class if claim.is_gated else adapter.diffusion_class],
        "auto_map": auto_map(adapter),
        "mask_token_id": claim.mask_token_id,
        "block_size": claim.block_size,
    }
    wrong = {
        key: f"is {config.get(key)!r}, not {value!r}"
        for key, value in required.items()
        if config.get(key) != value
    }
    opened = claim.behind == "mask" and adapter.local is None
    if opened and SLIDING in layer_types(config, adapter):
        size = config.get("sliding_window", adapter.window.default if adapter.window else None)
        wrong["sliding_window"] = f"of {size} tokens is in force, which narrows {claim.attention}"
    return Probe(
        "config",
        not wrong,
        f"{len(wrong)} of {len(required) + 1} fields wrong",
        "0 against the diffusion section",
        first_items(wrong),
    )


def _expected(subject: Subject) -> tuple[dict[str, tuple[int, ...]], Mapping[str, str]]:
    """Return shapes of the class's tensors, and its ties: name to the name it shares with."""
    cls = subject.diffusion_class
    config = cls.config_class.from_pretrained(subject.folder)
    with torch.device("meta"):
        model = cls(config)
    state = model.state_dict()
    if subject.adapter.measured is not None:
        from transformers.core_model_loading import revert_weight_conversion

        # A file may call tensors otherwise than the class, or hold experts one by one.
        stored = revert_weight_conversion(model, state)
        state = max(state, stored, key=lambda names: len(names.keys() & subject.shapes.keys()))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes, model.all_tied_weights_keys


def _weights(subject: Subject) -> Probe:
    expected, ties = _expected(subject)
    names = stored_names(subject.shapes, subject.adapter)
    found = {names[name]: shape for name, shape in subject.shapes.items()}
    shared = {name for name, twin in ties.items() if twin in found}
    shared |= {twin for name, twin in ties.items() if name in found}
    missing = sorted(expected.keys() - found.keys() - shared)
    misshapen = [
        f"{name} has shape {found[name]}, not {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    stale = [
        f"{name} is tied to {twin} but holds other values"
        for name, twin in ties.items()
        if name in found
        and twin in found
        and not torch.equal(_read(subject, name), _read(subject, twin))
    ]
    foreign = sorted(found.keys() - expected.keys())
    wrong = [f"{name} is missing" for name in missing] + misshapen + stale
    wrong += [f"{name} belongs to no part of the model" for name in foreign]
    return Probe(
        "weights",
        none_wrong(len(wrong), len(expected)),
        f"{len(wrong)} of {len(expected)} tensors wrong",
        "0 missing, misshapen or foreign",
        first_items(wrong),
    )


def _read(subject: Subject, name: str) -> torch.Tensor:
    for header in subject.headers.values():
        if name in header.entries:
            return read_tensor(subject.folder, header, name)
    raise DataError(f"no file holds {name}")


def check_finite(subject: Subject) -> Probe:
    """Return the probe `finite`: every tensor is read, one at a time."""
    refusal = tensor_refusal(subject.headers)
    if refusal is not None:
        return skipped("finite", "0", refusal)
    wrong: list[str] = []
    tensors = 0
    for header in subject.headers.values():
        for name in header.entries:
            tensor = read_tensor(subject.folder, header, name)
            tensors += 1
            if tensor.element_size() == 1 and tensor.is_floating_point():
                tensor = tensor.to(torch.float16)  # torch judges no 8-bit float
            count = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
            if count:
                wrong.append(f"{name} has {count} values that are NaN or infinite")
    return Probe(
        "finite",
        none_wrong(len(wrong), tensors),
        f"{len(wrong)} of {tensors} tensors hold NaN or infinity",
        "0",
        first_items(wrong),
    )


def check_hashes(subject: Subject) -> Probe:
    """Return the probe `hashes`: the files are those the manifest names, and no others."""
    return hashes_probe(subject.folder)
