"""Merge an adapter into a base whose weights stay in their files, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from dllm_convert.modeling.hollow import names_of, replace_parameters
from dllm_convert.modeling.slices import Slices


class MergedWeights:
    """The weights of a base with an adapter merged into it, by PEFT itself.

    Args:
        model: PEFT model, of whose base nothing is in memory.
        trained: What was trained, by its names in that model.
        untrained: Folder of the base's weights.
    """

    def __init__(
        self, model: Any, trained: Mapping[str, torch.Tensor | None], untrained: Path
    ) -> None:
        self.model, self._slices = model, Slices(untrained)
        self._source = {
            weight: next(name for name in names if name in self._slices)
            for weight, names in names_of(model).items()
            if weight.is_meta
        }
        names = {weight: name for name, weight in model.named_parameters()}

        def filled(old: nn.Parameter) -> nn.Parameter | None:
            found = trained.get(names[old])
            return None if found is None else _filled(old, found)

        replace_parameters(model, filled)

    def fill_embeddings(self) -> None:
        """Read the base's embeddings and head: PEFT saves them where rows were added."""
        inner = self.model.get_base_model()
        for module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
            if module is not None:
                replace_parameters(
                    module, lambda old: _filled(old, self._read(old)) if old.is_meta else None
                )

    def __call__(self, name: str) -> torch.Tensor:
        """Return a merged tensor by its name in the base."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_base_model().get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper):
            return self._held(module.modules_to_save[module.active_adapters[0]], leaf)
        if isinstance(module, TrainableTokensWrapper):
            return self._merged(module.token_adapter, leaf)
        if isinstance(module, BaseTunerLayer):
            return self._merged(module, leaf)
        return self._held(module, leaf)

    def _merged(self, layer: Any, leaf: str) -> torch.Tensor:
        base = layer.get_base_layer()
        before = dict(base._parameters)
        replace_parameters(base, lambda old: _filled(old, self._read(old)) if old.is_meta else None)
        layer.merge()
        found = self._held(base, leaf)
        # As it was: of the next one nothing is merged, and of this one nothing is kept.
        layer.merged_adapters.clear()
        base._parameters.update(before)
        return found

    def _held(self, module: nn.Module, leaf: str) -> torch.Tensor:
        tensor: torch.Tensor = getattr(module, leaf)
        return self._read(tensor) if tensor.is_meta else tensor.detach()

    def _read(self, empty: Any) -> torch.Tensor:
        return self._slices.whole(self._source[empty], empty.dtype)


def _filled(old: nn.Parameter, numbers: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(numbers.to(old.dtype), requires_grad=old.requires_grad)
