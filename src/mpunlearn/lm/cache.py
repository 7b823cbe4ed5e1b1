"""A key-value cache for generation that writes into room allocated ahead of time.

`DynamicCache` of transformers concatenates all keys and values with the new ones at every step, which takes most of the time
of generating with a small model. `StaticCache` allocates them once, but attends to the whole room at every step. Here the
room grows by `SPARE` tokens at a time, and attention sees only what is in use. Layers with a sliding window keep the
layer of transformers, which holds no more than the window.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

SPARE = 64
"""Tokens by which the room grows."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, each of shape (B, heads, tokens, head size)."""

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new keys and values, and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < new:
            shapes = [(*states.shape[:-2], new + SPARE, states.shape[-1]) for states in (key_states, value_states)]
            keys, values = (key_states.new_empty(shape) for shape in shapes)
            if self._room is not None:
                keys[..., :old, :], values[..., :old, :] = (room[..., :old, :] for room in self._room)
            self._room = keys, values
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., old:new, :] = states
        self.keys, self.values = (room[..., :new, :] for room in self._room)
        return self.keys, self.values


def growing_cache(model: Any) -> DynamicCache:
    """An empty cache for a model."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
