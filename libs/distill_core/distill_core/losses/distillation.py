"""Losses between predictions of classes, one value for each item, and the one function that reduces them.

    p = softmax(z / T)                                        z_s, z_t: logits (B, K) of student and teacher
    kl           T^2 sum_c p_t log(p_t / p_s)                 covers what the teacher holds possible
    reverse_kl   T^2 sum_c p_s log(p_s / p_t)                 keeps to what the teacher holds likely
    symmetric_kl (kl + reverse_kl) / 2
    js           (T^2 / 2) [KL(p_t || m) + KL(p_s || m)],     m = (p_s + p_t) / 2;  at most T^2 ln 2
    soft_ce      -T^2 sum_c q_c log p_s                       q: target probabilities (B, K)
    dkd          T^2 [a KL(b_t || b_s) + b KL(r_t || r_s)],   b: (p_y, 1 - p_y) of the label y, r: p among the others
    dist         T^2 [1 - rho(p_s, p_t) + g mean_c (1 - rho_c)],   rho: Pearson's correlation over the classes,
                                                              rho_c: over the batch, of class c

Divergences are summed over the classes; `reduced` is the mean over the batch. The factor T^2 keeps the gradient's size
as T grows (Hinton et al. 2015, section 2.1). All is computed in float32 at least, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["kl", "reverse_kl", "symmetric_kl", "js"]


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) T^2 KL(p_t || p_s) of logits (B, K)."""
    return temperature**2 * _kl(_log_p(teacher, temperature), _log_p(student, temperature))


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) T^2 KL(p_s || p_t) of logits (B, K)."""
    return kl(teacher, student, temperature)


def symmetric_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) the mean of both directions, of logits (B, K)."""
    return (kl(student, teacher, temperature) + reverse_kl(student, teacher, temperature)) / 2


def js(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) T^2 times the Jensen-Shannon divergence of logits (B, K)."""
    p_s, p_t = _log_p(student, temperature), _log_p(teacher, temperature)
    mixed = torch.logaddexp(p_s, p_t) - math.log(2)
    return temperature**2 * (_kl(p_t, mixed) + _kl(p_s, mixed)) / 2


def soft_ce(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) T^2 times the cross-entropy of logits (B, K) with target probabilities (B, K)."""
    return -(temperature**2) * (_wide(target) * _log_p(student, temperature)).sum(1)


def hard_ce(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,) the cross-entropy of logits (B, K) with the class that the teacher's logits (B, K) rank first."""
    return F.cross_entropy(_wide(student), teacher.argmax(1), reduction="none")


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 8.0),
) -> Tensor:
    """(B,) decoupled distillation of logits (B, K) and labels (B,) or mixed ones (B, K), of which the likeliest counts.

    `weights` are those of the label's part and of the others' part; with 1 and 1 - p_t,y it is `kl`. Zhao et al. 2022,
    arXiv 2203.08679, Eq. 6 and 7.
    """
    chosen = F.one_hot(class_of(labels), student.shape[1]).bool()
    label_s, others_s = _decoupled(student, chosen, temperature)
    label_t, others_t = _decoupled(teacher, chosen, temperature)
    of_label, of_others = weights
    return temperature**2 * (of_label * _kl(label_t, label_s) + of_others * _kl(others_t, others_s))


def _decoupled(logits: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen class and of all others (B, 2), and of each other among these (B, K - 1)."""
    scaled = _wide(logits) / temperature
    others = scaled[~chosen].reshape(len(logits), -1)
    pair = torch.stack([scaled[chosen], others.logsumexp(1)], 1)
    return F.log_softmax(pair, dim=1), F.log_softmax(others, dim=1)


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0, class_weight: float = 1.0) -> Tensor:
    """(B,) one minus correlation over the classes, plus the batch's mean of the same over the items, of logits (B, K).

    Predictions that are equal among themselves correlate with nothing, and cost 1. Huang et al. 2022, arXiv 2205.10536,
    Eq. 7 to 10.
    """
    p_s, p_t = _log_p(student, temperature).exp(), _log_p(teacher, temperature).exp()
    of_classes = (1 - _correlation(p_s.T, p_t.T)).mean()
    return temperature**2 * (1 - _correlation(p_s, p_t) + class_weight * of_classes)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation (N,) of the rows of (N, M); 0 where a row is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "js": js,
}


def reduced(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean (scalar) over the batch of losses (B,), each times its weight (B,), which has no gradient."""
    return losses.mean() if weights is None else (weights.detach() * losses).mean()


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(B,) entropy of softmax(z / T) in nats, of logits (B, K)."""
    log_p = _log_p(logits, temperature)
    return -(log_p.exp() * log_p).sum(1)


def class_of(target: Tensor) -> Tensor:
    """(B,) class of labels (B,), or the likeliest of mixed ones (B, K)."""
    return target if target.ndim == 1 else target.argmax(1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) by item, of log-probabilities (B, K); where p is 0 the class counts nothing."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _log_p(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_wide(logits) / temperature, dim=1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
