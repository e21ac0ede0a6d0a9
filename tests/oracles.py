"""Models whose scores and samples are known in closed form, for the tests of distillation methods."""

from __future__ import annotations

import torch

from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
from distill_core.diffusion.levels import expand
from distill_core.diffusion.schedule import NoiseSchedule
from distill_core.method import Batch, Cond, Method
from distill_core.networks.denoiser import Denoiser


class AffineDenoiser(Denoiser):
    """D(x, sigma) = m + (x - m) s^2 / (s^2 + sigma^2): exact for N(m, s^2), trainable in m and log s."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.log_std = torch.nn.Parameter(torch.tensor(std).log())
        self.schedule = NoiseSchedule("edm", sigma_min=0.02, sigma_max=10.0)
        self.image = ImageSpec(channels=1, height=2, width=2, picture=(1, 2, 2))
        self.cond = CondSpec(kind="none")
        self.sampler = SamplerSpec(
            kind="heun", sigma_min=0.02, sigma_max=10.0, noise_scale=10.0, num_steps=32, max_steps=64
        )

    def forward(self, x_sigma, sigma, cond=None):
        variance = (2 * self.log_std).exp()
        return self.mean + (x_sigma - self.mean) * variance / (variance + expand(sigma, x_sigma) ** 2)

    def with_features(self, x_sigma, sigma, cond=None):
        return self(x_sigma, sigma), [x_sigma.repeat(1, 8, 1, 1)]

    def null_cond(self, batch):
        return {}


class Pusher(AffineDenoiser):
    """A one-step student on the same interface: x0 = m + s z."""

    def forward(self, x_sigma, sigma, cond=None):
        return self.mean + self.log_std.exp() * x_sigma / expand(sigma, x_sigma)


def train(
    method: Method,
    steps: int,
    *,
    lr: float = 0.02,
    roles: tuple[str, ...] | None = None,
    cond: Cond | None = None,
) -> None:
    """Adam on every role, with the rate falling to 0; roles left out keep their weights. 256 items, under `cond`."""
    parameters = {role: list(getattr(method, role).parameters()) for role in roles or method.roles}
    optimizers = {
        role: torch.optim.Adam(values, lr, betas=(0.0, 0.99)) for role, values in parameters.items()
    }
    for step in range(steps):
        for update in method.updates(Batch.of(256, None, cond or {}), step):
            if update.role not in parameters:
                continue
            update.loss.backward(inputs=parameters[update.role])
            for group in optimizers[update.role].param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()


class MixtureDenoiser(Denoiser):
    """D of K isotropic Gaussians N(m_k, s_k^2), one of them a class: exact, with exact guidance. Not trainable."""

    def __init__(self, means=((0.9, -0.4), (-0.7, 0.3), (0.2, 1.1)), stds=(0.3, 0.45, 0.2)) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))  # (K, D)
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float64))
        self.schedule = NoiseSchedule("edm", sigma_min=0.02, sigma_max=10.0)
        count, size = len(means), len(means[0])
        self.image = ImageSpec(channels=1, height=1, width=size, picture=(1, 1, size))
        self.cond = CondSpec(kind="class_label", num_classes=count, null_label=count)
        self.sampler = SamplerSpec(
            kind="heun", sigma_min=0.02, sigma_max=10.0, noise_scale=10.0, num_steps=32, max_steps=64
        )
        self.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # a device to ask for

    def forward(self, x_sigma, sigma, cond=None):
        x, level = x_sigma.flatten(1).double(), sigma.double()[:, None]
        variance = self.stds**2 + level**2  # (B, K)
        squares = (x[:, None] - self.means).square().sum(-1)
        logits = -squares / (2 * variance) - x.shape[1] / 2 * variance.log()
        if cond:
            labels = cond["class_label"]
            known = torch.nn.functional.one_hot(labels, len(self.stds) + 1)[:, :-1].bool()
            logits = logits.masked_fill((labels < len(self.stds))[:, None] & ~known, -torch.inf)
        shrunk = self.means + (x[:, None] - self.means) * (self.stds**2 / variance)[..., None]
        x0 = (logits.softmax(-1)[..., None] * shrunk).sum(1)
        return x0.reshape(x_sigma.shape).to(x_sigma.dtype)

    def with_features(self, x_sigma, sigma, cond=None):
        return self(x_sigma, sigma, cond), [x_sigma.repeat(1, 8, 1, 1)]

    def null_cond(self, batch):
        return {"class_label": torch.full((batch,), self.cond.null_label)}

    def samples(self, count, labels=None):
        """x0 (count, 1, 1, D), with the classes `labels` (count,) or each equally often."""
        labels = torch.arange(count) % len(self.stds) if labels is None else labels
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64)
        x0 = self.means[labels] + self.stds[labels, None] * noise
        return x0.reshape(count, 1, 1, -1)


class StraightFlow(AffineDenoiser):
    """The denoiser whose paths are straight from 10 z to m + s z: what reflow makes of a Gaussian's teacher."""

    def forward(self, x_sigma, sigma, cond=None):
        std, sigma = self.log_std.exp(), expand(sigma, x_sigma)
        left = 1 - sigma / self.sampler.noise_scale  # x_sigma = left x0 + sigma z
        z = (x_sigma - left * self.mean) / (left * std + sigma)
        return self.mean + std * z
