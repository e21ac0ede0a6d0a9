"""The occupancy grid: which cells of the scene's box are worth a sample (Instant-NGP, appendix C)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill_core.reductions import over_processes

DECAY = 0.95  # of a cell's density per update, so that what became empty is forgotten
MIN_OPACITY = 0.01  # a cell counts when one training step through it absorbs more than this


def cell_index(positions: Tensor, bound: float, resolution: int) -> Tensor:
    """Flat index (M,) of the cell of each position (M, 3) in [-bound, bound]^3; outside: the nearest cell."""
    cells = ((positions + bound) * (resolution / (2 * bound))).int().clamp_(0, resolution - 1)
    x, y, z = cells.unbind(-1)
    return (x * resolution + y) * resolution + z


def is_occupied(occupied: Tensor, positions: Tensor, bound: float) -> Tensor:
    """Mask (M,) bool of the positions (M, 3) whose cell is set in `occupied` (G, G, G)."""
    return occupied.reshape(-1).index_select(0, cell_index(positions, bound, len(occupied)))


class OccupancyGrid(nn.Module):
    """Running maximum of the density per cell, and the cells above a threshold. Starts with every cell set.

    The threshold is an opacity at the training step, not a density: it means the same at any scene size.
    """

    density: Tensor
    occupied: Tensor

    def __init__(self, resolution: int, bound: float, delta: float) -> None:
        super().__init__()
        self.resolution, self.bound = resolution, bound
        self.threshold = -math.log1p(-MIN_OPACITY) / delta
        self.register_buffer("density", torch.zeros(resolution, resolution, resolution))
        self.register_buffer("occupied", torch.ones(resolution, resolution, resolution, dtype=torch.bool))

    @torch.no_grad()
    def update(self, log_density: Callable[[Tensor], Tensor], *, every_cell: bool) -> None:
        """Look again at one random point in each chosen cell; draws from torch's global generator.

        `every_cell` visits all of them, else a quarter at random and a quarter from the occupied ones.
        """
        cells = self._every_cell() if every_cell else self._some_cells()
        seen = log_density(self._points_in(cells)).float().exp()
        density = self.density.reshape(-1).mul_(DECAY)
        density.scatter_reduce_(0, cells, seen, reduce="amax")
        over_processes(density, largest=True)  # each looked at points of its own; all march the same grid
        # The mean keeps a thin, early field from emptying the grid.
        self.occupied.copy_(self.density > min(float(density.mean()), self.threshold))

    def _every_cell(self) -> Tensor:
        return torch.arange(self.resolution**3, device=self.density.device)

    def _some_cells(self) -> Tensor:
        count = self.resolution**3 // 4
        cells = torch.randint(self.resolution**3, (count,)).to(self.density.device)
        known = self.occupied.reshape(-1).nonzero().squeeze(-1)
        if len(known) == 0:
            return cells
        return torch.cat([cells, known[torch.randint(len(known), (count,)).to(known.device)]])

    def _points_in(self, cells: Tensor) -> Tensor:
        size = self.resolution
        corner = torch.stack([cells // size**2, cells // size % size, cells % size], -1)
        jitter = torch.rand(corner.shape).to(corner.device)
        return (corner + jitter) * (2 * self.bound / size) - self.bound
