"""What an adapter declares, read off the small instance and the full config's empty model."""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from dllm_convert.adapters.base import Adapter, Measured, SlidingWindow
from dllm_convert.errors import UnsupportedError
from dllm_convert.probing.instance import Instance, adapted_names, draft_adapter
from dllm_convert.probing.shrink import layer_kinds
from dllm_convert.probing.sizes import VOCABULARY
from dllm_convert.source.leftovers import computed_with
from dllm_convert.source.safetensors_header import FLOATS

Stored = tuple[str, Sequence[int]]
"""Type of a tensor, by its name in safetensors, and its shape."""

_STANDARD = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size"),
    "tie_word_embeddings",
)
"""Fields other stages read, under the names all decoders share."""


def declare(
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    instance: Instance,
    targets: Sequence[str],
    opened: Mapping[str, Any],
    narrow: tuple[str, ...],
    tensors: Collection[str],
    stored: Mapping[str, Stored],
    *,
    kept: bool,
) -> Adapter:
    """Return the declaration of a measured family.

    Args:
        config: Config of the checkpoint.
        values: The same as it stands in config.json.
        instance: The small instance.
        targets: Objectives that passed.
        opened: Config values that open its windows.
        narrow: Kinds of layers that had one.
        tensors: Names of the checkpoint's tensors; empty if they are not known.
        stored: Their types and shapes, as far as they are known.
        kept: Whether its base can stay, beside an adapter.

    Raises:
        UnsupportedError: The vocabulary's tensors are not an embedding, a head and its biases, and
            its base cannot stay, or the checkpoint's tensors are not those of the class.
    """
    model = instance.base
    draft = draft_adapter(config.model_type)
    unused = _loaded(config, draft.stock_class, tensors, stored)
    embedding, head, biases, others = _vocabulary(model)
    if others and not kept:
        raise UnsupportedError(f"beside embedding and head its vocabulary has {others} in the file")
    names = {id(module): name for name, module in model.named_modules()}
    places = [names[id(part)] for part in (model.get_input_embeddings(), _head(model))]
    kinds = layer_kinds(config)
    counts = Counter(kinds)
    order = tuple(sorted(counts).index(kind) for kind in kinds) if len(counts) > 1 else ()
    standard = {key: _field(config, key) for key in _STANDARD}
    return Adapter(
        config.model_type,
        draft.stock_class,
        draft.diffusion_class,
        # A mask has no row in a further table of the vocabulary, and beside a base it needs none.
        targets=() if others else tuple(targets),  # type: ignore[arg-type]
        embedding=embedding,
        head=head,
        lora_targets=adapted_names(model),
        norm_modules=norm_names(model),
        embedding_module=places[0].rpartition(".")[2],
        head_module=places[1].rpartition(".")[2],
        head_biases=biases,
        unused_tensors=unused,
        window=SlidingWindow(dict(opened), default=next(iter(opened.values()))) if opened else None,
        min_transformers=transformers.__version__,
        implementations=draft.implementations,
        behind="cache" if kept else None,
        measured=Measured(
            transformers.__version__,
            {k: v for k, v in standard.items() if v is not None and values.get(k) != v},
            dict(counts),
            narrow,
            order,
        ),
    )


def _field(config: PreTrainedConfig, key: str) -> Any:
    """Return a field of a config; None if it has none, or one for each layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or getattr(head, "weight", None) is None:
        raise UnsupportedError("its logits come from no single output projection")
    return head


def _vocabulary(model: Any) -> tuple[str, str, tuple[str, ...], str]:
    """Return the names, in a file, of embedding, head and the head's biases, and of what else."""
    with tempfile.TemporaryDirectory(prefix="dllm-convert-probe-") as folder:
        model.save_pretrained(folder)
        tensors: dict[str, torch.Tensor] = {}
        for file in Path(folder).glob("*.safetensors"):
            tensors |= load_file(file)
    found = {n: t for n, t in tensors.items() if t.dim() and t.shape[0] == VOCABULARY}
    places = {id(module): name for name, module in model.named_modules()}
    names = []
    modules: tuple[Any, Any] = model.get_input_embeddings(), _head(model)
    for module in modules:
        # By value: a file may call a tensor otherwise than the class does.
        same = [name for name, tensor in found.items() if torch.equal(tensor, module.weight)]
        names.append(same[0] if same else f"{places[id(module)]}.weight")
    biases = tuple(sorted(name for name, tensor in found.items() if tensor.dim() == 1))
    others = sorted(found.keys() - {*names, *biases})
    if names[0] not in found:
        raise UnsupportedError(f"the file has no {names[0]}, which its vocabulary is embedded by")
    if names[0] == names[1]:
        names[1] = f"{places[id(_head(model))]}.weight"
    return names[0], names[1], biases, next(iter(others), "")


def norm_names(model: nn.Module) -> tuple[str, ...]:
    """Return what the normalisation layers of a model are called, each once."""
    names = (
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters())
    )
    return tuple(dict.fromkeys(names))


def _loaded(
    config: PreTrainedConfig,
    stock: str,
    present: Collection[str],
    stored: Mapping[str, Stored] | None = None,
) -> str | None:
    """Compare a checkpoint's tensors with those its class loads.

    Args:
        config: Config of the checkpoint.
        stock: Name of its class.
        present: Names of its tensors; empty if they are not known.
        stored: Type and shape of each; what is not in it is compared by name only.

    Returns:
        What is left out of the output, as one expression.

    Raises:
        UnsupportedError: A tensor is missing that the class would fill at random, has another shape
            or type, or belongs to a computation that the class does not do.
    """
    if not present:
        return None
    with torch.device("meta"):
        model = getattr(transformers, stock)(copy.deepcopy(config))
    state = model.state_dict()
    shared = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    # A file holds experts one by one that the class holds together; either is loaded.
    expected = [state, revert_weight_conversion(model, state)]
    lacking = [sorted(names.keys() - set(present) - shared) for names in expected]
    missing = min(lacking, key=len)
    if missing:
        _refuse_bare_names(missing, present, model.base_model_prefix, stock)
        raise UnsupportedError(
            f"the weights lack {len(missing)} tensors of {stock}, the first is {missing[0]}: they "
            "would be random"
        )
    _refuse_misfits(expected[lacking.index(missing)], stored or {}, stock)
    known = set().union(*expected)
    foreign = set(present) - known
    _refuse_other_model(foreign, known, model, stock)
    return _expression(foreign, known)


def _refuse_misfits(
    expected: Mapping[str, torch.Tensor], stored: Mapping[str, Stored], stock: str
) -> None:
    """Refuse tensors of another shape, or whole numbers where the class has weights.

    Raises:
        UnsupportedError: There is one.
    """
    for name, (dtype, shape) in stored.items():
        tensor = expected.get(name)
        if tensor is None:
            continue
        if tuple(shape) != tuple(tensor.shape):
            raise UnsupportedError(
                f"{name} has shape {tuple(shape)}, config.json makes it {tuple(tensor.shape)} in "
                f"{stock}"
            )
        if tensor.is_floating_point() and dtype not in FLOATS:
            raise UnsupportedError(
                f"{name} has dtype {dtype}, expected one of {', '.join(sorted(FLOATS))}"
            )


def _refuse_other_model(
    foreign: Collection[str], known: Collection[str], model: Any, stock: str
) -> None:
    """Refuse tensors that body or head would compute with, though the class has them not.

    Raises:
        UnsupportedError: There is one.
    """
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = [n for n in sorted(foreign) if not any(re.search(p, n) for p in ignored)]
    found = computed_with(unknown, known)
    if found:
        raise UnsupportedError(
            f"the weights have {found[0]} ({len(found)} such tensors), which {stock} does not "
            "compute with: it would be another model"
        )


def _refuse_bare_names(
    missing: Sequence[str], present: Collection[str], prefix: str, stock: str
) -> None:
    """Refuse a file of the body alone, whose names lack the body's: transformers adds it silently.

    Raises:
        UnsupportedError: It is one, as that of GPT-2.
    """
    if not all(name.removeprefix(f"{prefix}.") in present for name in missing):
        return
    # The report keeps a message and no hint.
    raise UnsupportedError(
        f"a tensor is called {missing[0].removeprefix(f'{prefix}.')}, expected {missing[0]}: the "
        f"file holds the body of {stock}. Write it anew, under full names: "
        f"transformers.{stock}.from_pretrained(SOURCE).save_pretrained(FOLDER)"
    )


def _expression(foreign: Collection[str], known: Collection[str]) -> str | None:
    """Return an expression of names, whatever their numbers, unless it fits a known one too."""
    patterns = set()
    for name in foreign:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(name))
        fits = any(re.fullmatch(pattern, other) for other in known)
        patterns.add(re.escape(name) if fits else pattern)
    return "|".join(sorted(patterns)) or None
