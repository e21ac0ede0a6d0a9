"""A pool of examples that were hard, to be seen again: poses, rays, or whatever fits into a row of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HardExamplePool(nn.Module):
    """Up to `capacity` items (capacity, *shape). Once full it stays so: what is drawn is replaced by what is hard now.

    An item that was hard while the pool was filled need not be any more; replacing on use lets it age out. The pool's
    `state_dict` is all that a resumed run needs.
    """

    items: Tensor
    filled: Tensor

    def __init__(self, capacity: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(capacity, *shape))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @property
    def full(self) -> bool:
        return int(self.filled) == len(self.items)

    def put(self, items: Tensor) -> None:
        """Append `items` (N, *shape); those that no longer fit are dropped."""
        begin = int(self.filled)
        end = min(begin + len(items), len(self.items))
        self.items[begin:end] = items[: end - begin]
        self.filled.fill_(end)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Items (N, *shape) and their slots (N,): `count` different ones, or all there are, by torch's generator."""
        slots = torch.randperm(int(self.filled))[:count].to(self.items.device)
        return self.items[slots], slots

    def replace(self, slots: Tensor, items: Tensor) -> None:
        """Overwrite what was drawn from `slots` (N,) with `items`, hardest first; slots beyond them keep theirs."""
        count = min(len(slots), len(items))
        self.items[slots[:count]] = items[:count]
