"""Attacks on classifiers, those of the Adversarial Robustness Toolbox, and a look at whether gradients are masked.

    FGSM  x + eps sign(dL/dx)            PGD  the same in small steps, back into the ball of radius eps
    C&W   min |d|^2 + c max(z_y - max_(j != y) z_j, 0) over d, c by bisection: needs no gradient of the softmax

A classifier whose logits are large answers with probabilities of 0 and 1, and float32 gradients of its loss are 0:
FGSM and PGD then stand still, which is no robustness. So the same attacks are made on logits that are divided by
`masking` too, which changes no answer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.errors import missing_package

PIXEL = 2.0  # of data in [-1, 1] for one of pictures in [0, 1]


class AttackConfig(Config):
    """Budgets of the attacks, for pictures in [0, 1]."""

    epsilon: float = Field(0.1, gt=0, le=1)  # largest change of a pixel by FGSM and PGD; photographs: 8 / 255
    pgd_steps: int = Field(20, ge=1, le=1000)  # each of a quarter of epsilon
    cw_steps: int = Field(100, ge=1, le=10_000)  # of C&W, for each c
    cw_searches: int = Field(6, ge=1, le=20)  # values of c
    items: int = Field(100, ge=1, le=10_000)  # that are attacked


class _Divided(nn.Module):
    """A network whose logits are divided."""

    def __init__(self, network: nn.Module, divisor: float) -> None:
        super().__init__()
        self.network, self.divisor = network, divisor

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image) / self.divisor
        return logits


def attacked(
    network: nn.Module, x0: Tensor, labels: Tensor, config: AttackConfig, *, masking: float = 1.0
) -> dict[str, float]:
    """Figures of a network in evaluation mode under attacks on pictures x0 (B, C, H, W) in [-1, 1] with labels (B,).

    Accuracies under FGSM and PGD; the same with logits divided by `masking`; the share whose gradient is 0; of the
    pictures that were named rightly the share that C&W changes the answer of, and the median length of these changes.

    Raises:
        Unavailable: the toolbox is not installed.
    """
    evasion = _toolbox()
    epsilon = PIXEL * config.epsilon
    found: dict[str, float] = {}
    for prefix, divisor in (("", 1.0), ("unmasked_", masking)):
        model = _wrapped(_Divided(network, divisor), x0, labels)
        attacks = {
            "fgsm": evasion.FastGradientMethod(model, norm=np.inf, eps=epsilon, batch_size=len(x0)),
            "pgd": evasion.ProjectedGradientDescent(
                model, norm=np.inf, eps=epsilon, eps_step=epsilon / 4, max_iter=config.pgd_steps,
                batch_size=len(x0), verbose=False,
            ),
        }  # fmt: skip
        for name, attack in attacks.items():
            changed = attack.generate(x0.cpu().numpy(), labels.cpu().numpy())
            found[f"{prefix}{name}_accuracy"] = float(_right(network, changed, labels).double().mean())
    found["zero_gradient_share"] = zero_gradients(network, x0, labels)
    return found | dict(_carlini_wagner(network, x0, labels, config))


def zero_gradients(network: nn.Module, x0: Tensor, labels: Tensor) -> float:
    """Share of pictures at which the loss has a gradient of exactly 0 in float32."""
    x0 = x0.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(network(x0), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x0)
    return float((gradient.flatten(1) == 0).all(1).double().mean())


def _carlini_wagner(
    network: nn.Module, x0: Tensor, labels: Tensor, config: AttackConfig
) -> Mapping[str, float]:
    attack = _toolbox().CarliniL2Method(
        _wrapped(network, x0, labels),
        binary_search_steps=config.cw_searches,
        max_iter=config.cw_steps,
        batch_size=len(x0),
        verbose=False,
    )
    right = _right(network, x0.cpu().numpy(), labels)
    if not right.any():
        return {"cw_success": 1.0, "cw_distance": 0.0}
    x0, labels = x0[right], labels[right]
    changed = attack.generate(x0.cpu().numpy(), labels.cpu().numpy())
    fooled = ~_right(network, changed, labels)
    lengths = (torch.from_numpy(changed).to(x0) - x0).flatten(1).norm(dim=1)[fooled] / PIXEL
    distance = float(lengths.median()) if len(lengths) else float("inf")
    return {"cw_success": float(fooled.double().mean()), "cw_distance": distance}


@torch.no_grad()
def _right(network: nn.Module, images: np.ndarray, labels: Tensor) -> Tensor:
    answers: Tensor = network(torch.from_numpy(images).to(labels.device)).argmax(1)
    return answers == labels


def _wrapped(network: nn.Module, x0: Tensor, labels: Tensor) -> Any:
    """The network as the toolbox takes it: logits, and values that stay in [-1, 1]."""
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = network(x0[:1]).shape[1]
    return PyTorchClassifier(
        network,
        nn.CrossEntropyLoss(),
        tuple(x0.shape[1:]),
        classes,
        clip_values=(-1.0, 1.0),
        device_type="gpu" if x0.is_cuda else "cpu",
    )


def check_toolbox() -> None:
    """Say that the toolbox is missing, without the seconds that its import takes.

    Raises:
        Unavailable: it is not installed.
    """
    if importlib.util.find_spec("art") is None:
        raise missing_package("adversarial-robustness-toolbox", "attacks")


def _toolbox() -> Any:
    check_toolbox()
    import art.attacks.evasion as evasion

    return evasion
