"""A KV cache with room: clean tokens are kept, denoising writes behind them and is written over."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class BlockLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room behind the clean tokens.

    `keys` and `values` are the clean tokens only, views of the buffers, shape
    (batch, heads, clean, head_dim).
    """

    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def write(
        self,
        states: tuple[torch.Tensor, torch.Tensor],
        first: int,
        at: tuple[torch.Tensor, torch.Tensor] | None,
        visible: int,
        room: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states (batch, heads, n, width) from column `first` on, or `at` rows and columns.

        Returns views of the first `visible` columns; new buffers have `room` of them.
        """
        buffers = self.buffers
        if buffers is None or buffers[0].shape[-2] < visible:
            buffers = self.buffers = self._make_room(states, max(room, visible))
        for buffer, new in zip(buffers, states, strict=True):
            if at is None:
                buffer[:, :, first : first + new.shape[-2]] = new
            else:
                # (batch, 1), (batch, n); layers may be on several devices.
                row, column = (index.to(new.device) for index in at)
                buffer[row, :, column] = new.transpose(1, 2)
        keys, values = (buffer[:, :, :visible] for buffer in buffers)
        return keys, values

    def _make_room(
        self, states: tuple[torch.Tensor, torch.Tensor], room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (new.new_zeros((*new.shape[:-2], room, new.shape[-1])) for new in states)
        length = self.get_seq_length()
        if length and self.keys is not None and self.values is not None:
            keys[:, :, :length], values[:, :, :length] = self.keys, self.values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return keys, values

    def keep(self, length: int) -> None:
        """Let the first `length` columns be the clean tokens."""
        if self.buffers is not None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        if self.buffers is not None:
            length = self.get_seq_length()
            self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
            self.keep(length)


class BlockCache(Cache):
    """A KV cache that can be read without being extended.

    While `frozen`, new states are written behind the clean tokens, in place, and the next forward
    writes over them: denoising leaves nothing behind, and nothing is copied or cropped.

    Args:
        room: Columns to make at once, so that the buffers never grow.
    """

    frozen: bool = False

    def __init__(self, room: int = 0) -> None:
        super().__init__(layer_class_to_replicate=BlockLayer)
        self.room = room
        self._first: int | None = None
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None
        self._visible = 0

    def place(self, columns: torch.Tensor, visible: int | None = None) -> None:
        """Say at which columns (batch, n) the states of the next forwards go.

        They read the first `visible` columns, by default up to the last one written.
        """
        first = columns[:, 0].tolist()
        level = min(first) == max(first) and columns.shape[1] == int(columns[0, -1]) - first[0] + 1
        seen = int(columns.max()) + 1 if visible is None else visible
        row = torch.arange(len(columns), device=columns.device)[:, None]
        self.put(None if level else (row, columns), seen, first[0])

    def put(
        self, at: tuple[torch.Tensor, torch.Tensor] | None, visible: int, first: int = 0
    ) -> None:
        """Say the same without a look at any column.

        `at` are rows (batch, 1) and columns (batch, n); None those from `first` on, in each row.
        """
        self._first, self._visible, self._at = first, visible, at

    def keep(self, length: int) -> None:
        """Let the first `length` columns be the clean tokens."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.keep(length)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of cache and input, (batch, heads, cached + new, head_dim)."""
        while len(self.layers) <= layer_idx:
            self.layers.append(BlockLayer())
        layer: Any = self.layers[layer_idx]
        first, at, visible = self._first, self._at, self._visible
        if first is None:
            first, at = layer.get_seq_length(), None
            visible = first + key_states.shape[-2]
        keys, values = layer.write((key_states, value_states), first, at, visible, self.room)
        if not self.frozen:
            layer.keep(visible)
        return keys, values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Columns the next forward reads, and where they begin."""
        if self._first is not None:
            return self._visible, 0
        sizes: tuple[int, int] = super().get_mask_sizes(*args, **kwargs)
        return sizes
