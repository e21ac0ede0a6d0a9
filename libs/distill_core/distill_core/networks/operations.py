"""Operations of a network's passes, counted as they run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def counted_operations(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `run`, attention's too; two a product.

    Attention runs as plain matrix products meanwhile, since fused kernels of the CPU are not counted.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())
