"""Self-distillation of kernel regression in closed form: each round fits its targets mixed with the last round's fit.

    y_0 = y,   y_tau = K (K + lam I)^-1 [alpha y + (1 - alpha) y_(tau-1)],   f_tau(x) = k_x^T (K + lam I)^-1 [ … ]
    f_inf(x)   = alpha k_x^T (alpha K + lam I)^-1 y            (alpha > 0: ridge regression with lam / alpha)
    alpha*     = <y_v - b, a> / <a, a>,   b = S y_(tau-1),  a = S (y - y_(tau-1)),  S = K_v (K + lam I)^-1, in [0, 1]

K: kernel of the training items, K_v: of validation items with them; lam ridge; alpha the weight of the true targets,
alpha* the best one for validation targets y_v. alpha = 0 is self-distillation without guidance, which collapses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.predictor import image_classifier
from distill_core.networks.predictors import build_network
from distill_core.networks.predictors.kernel import KernelMachine
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MethodConfig):
    ridge: float = Field(0.2, gt=0)  # lam; the paper's illustration has 0.2
    alpha: float | Literal["best"] = "best"  # weight of the true targets; best: alpha* of each round
    label_noise: float = Field(0.0, ge=0, lt=1)  # share of the training labels that are drawn anew


def mixed_targets(y: Tensor, last: Tensor, alpha: float) -> Tensor:
    """Targets (N, K) of a round: the true ones `y` and the last round's fit `last`."""
    return alpha * y + (1 - alpha) * last


def best_alpha(validation: Tensor, guided: Tensor, unguided: Tensor) -> float:
    """alpha* in [0, 1] for validation targets (V, K), from the predictions at alpha = 1 and at alpha = 0."""
    direction = guided - unguided
    norm = direction.square().sum()
    if norm == 0:  # in the first round both are ordinary ridge regression
        return 1.0
    return float((((validation - unguided) * direction).sum() / norm).clamp(0, 1))


def limit(kernel: Tensor, y: Tensor, ridge: float, alpha: float) -> Tensor:
    """Coefficients (N, K) of the fit after infinitely many rounds; alpha = 0 gives 0."""
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return alpha * torch.linalg.solve(alpha * kernel + ridge * eye, y) if alpha else torch.zeros_like(y)


class SelfDistillKernel(Method):
    paper = (
        "Borup & Andersen 2021, Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed "
        "by Self-Distillation, arXiv 2102.13088"
    )
    kind = "predictor"
    roles = ("machine",)
    result = "machine"
    plan = "step"
    y: Tensor

    def __init__(
        self, config: Config, *, network: NetworkConfig, data: Source, validation: Source, seed: int
    ) -> None:
        super().__init__()
        self.config, self.validation = config, validation
        assert data.shape is not None  # `columns` asks for pictures
        facts = {
            "shape": data.shape,
            "num_classes": data.num_classes,
            "class_names": data.class_names,
            "num_items": data.size,
        }
        built = build_network(network, facts)
        if not isinstance(built, KernelMachine):
            raise ConfigError(
                f"self_distill_kernel fits kernel machines; set network.name = 'kernel_machine', not {network.name!r}",
                field="network.name",
            )
        everything = data.all()
        built.items.copy_(everything.columns["x0"].flatten(1))
        self.machine = image_classifier(built, network, shape=data.shape, class_names=data.class_names)
        labels = noisy_labels(
            everything.columns["class_label"], len(data.class_names), config.label_noise, seed
        )
        self.register_buffer("y", one_hot(labels, len(data.class_names)), persistent=False)
        self.last = self.y.clone()  # y_(tau-1)
        self.alpha = torch.ones((), dtype=torch.float64)  # of the last round
        self.rounds = torch.zeros((), dtype=torch.float64)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the items", "class_label": "the targets"}

    @torch.no_grad()
    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        kernel = self.kernel()
        ridge = self.config.ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        fit = torch.linalg.cholesky(kernel + ridge)
        alpha = self.next_alpha(fit)
        coefficients = torch.cholesky_solve(mixed_targets(self.y, self.last.to(self.y), alpha), fit)
        self.network.coefficients.copy_(coefficients)
        self.last, self.alpha = kernel @ coefficients, self.alpha.new_tensor(alpha)
        self.rounds = self.rounds + 1
        x, y = self.validation_items()
        error = (self.network.kernel(x) @ coefficients - y).square().mean()
        yield Update("machine", None, {"alpha": alpha, "validation_error": error})

    @property
    def network(self) -> KernelMachine:
        """The network of the predictor."""
        network = self.machine.network
        assert isinstance(network, KernelMachine)
        return network

    def kernel(self) -> Tensor:
        """K (N, N) of the training items."""
        return self.network.kernel(self.network.items)

    def next_alpha(self, fit: Tensor) -> float:
        """The weight of the true targets in this round; `fit` is the Cholesky factor of K + lam I."""
        if self.config.alpha != "best":
            return float(self.config.alpha)
        x, y = self.validation_items()
        cross = self.network.kernel(x)
        guided = cross @ torch.cholesky_solve(self.y, fit)
        unguided = cross @ torch.cholesky_solve(self.last.to(self.y), fit)
        return best_alpha(y, guided, unguided)

    def validation_items(self) -> tuple[Tensor, Tensor]:
        """Items (V, …) and one-hot targets (V, K), without noise."""
        batch = self.validation.all().to(self.device)
        return batch.columns["x0"], one_hot(batch.columns["class_label"], len(self.validation.class_names))

    def state(self) -> dict[str, Tensor]:
        return {"last": self.last, "alpha": self.alpha, "rounds": self.rounds}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.last, self.alpha, self.rounds = state["last"], state["alpha"], state["rounds"]

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Mean squared error on the validation items, of this fit, of the first round's, and of the limit's."""
        x, y = self.validation_items()
        cross, kernel = self.network.kernel(x), self.kernel()
        eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        first = torch.linalg.solve(kernel + self.config.ridge * eye, self.y)
        endless = limit(kernel, self.y, self.config.ridge, float(self.alpha))
        fits = {"": self.network.coefficients.detach(), "first_": first, "limit_": endless}
        return {
            f"{name}validation_error": float((cross @ c - y).square().mean()) for name, c in fits.items()
        } | {
            "alpha": float(self.alpha),
            "rounds": float(self.rounds),
        }


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Targets (N, K) float64: 1 for the label, 0 else."""
    return F.one_hot(labels, classes).double()


def noisy_labels(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """`labels` (N,) with that share of them drawn anew, a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, drawn, labels)
