"""OFA-KD: one-for-all distillation between architectures: exits turn a student's stages into logits, where all agree.

    ofa(z_s, z_t, y) = -sum_c [(p_t,c + m_c)^g - m_c] log p_s,c,    m = onehot(y),  p = softmax(z)
    L = CE(z_s, y) + w ofa(z_s, z_t, y) + w_e sum_k ofa(exit_k(h_k), z_t, y)

h_k: features of the student's stage k, exit_k a head that is trained with it and not published. g = 1 is logit
distillation; g > 1 raises the weight of the labelled class and thins those of the others. Only logits of the teacher
enter it, so that both may be of any architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.config import Words
from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.losses.distillation import class_of, reduced, soft_ce
from distill_core.method import Batch, Method, MethodConfig, Model, Update
from distill_core.methods.recognition._students import (
    LABELLED,
    agreement,
    new_classifier,
    taught,
    use_classes_of,
)
from distill_core.networks.exits import Hint, WithExits, exits_of
from distill_core.networks.taps import dry_run, tapped
from distill_core.recipe.tables import NetworkConfig


class Config(MethodConfig):
    taps: tuple[Words, ...] = Field(max_length=16)  # module paths of the student's stages; (): no exits
    power: float = Field(1.5, gt=0, le=8)  # g; the official code's default is 1, its example 1.5
    weight: float = Field(1.0, ge=0)  # w, of the student's own logits
    exit_weight: float = Field(1.0, ge=0)  # w_e, of all exits; 0 and weight 0: the labels alone
    match: Literal["logits", "features"] = "logits"  # features: hints at `teacher_taps` in the place of exits
    teacher_taps: tuple[Words, ...] = ()  # one for each of `taps`, for match = "features"

    @model_validator(mode="after")
    def _taps_match(self) -> Self:
        if self.match == "features" and len(self.teacher_taps) != len(self.taps):
            raise ValueError(
                f"match = 'features' needs one of teacher_taps for each of {len(self.taps)} taps, and there are "
                f"{len(self.teacher_taps)}"
            )
        return self


def ofa_loss(student: Tensor, teacher: Tensor, labels: Tensor, power: float) -> Tensor:
    """(B,) loss of logits (B, K); labels (B,), or mixed (B, K), of which the likeliest class counts."""
    label = F.one_hot(class_of(labels), student.shape[1])
    target = (teacher.float().softmax(1) + label) ** power - label
    return soft_ce(student, target)


class OFA(Method):
    paper = (
        "Hao et al. 2023, One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation, "
        "arXiv 2310.19444"
    )
    kind = "predictor"
    roles = ("student",)

    def __init__(self, config: Config, *, teacher: nn.Module, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        use_classes_of(teacher, data, "ofa")
        predictor = new_classifier(network, data)
        assert data.shape is not None  # `columns` asks for pictures
        self.student = WithExits(predictor, self.heads(predictor, data.shape, len(data.class_names)))

    def heads(self, predictor: nn.Module, shape: tuple[int, ...], num_classes: int) -> list[nn.Module]:
        """What is trained at the taps: exits, or projections to the teacher's features."""
        config = self.config
        own = dry_run(_network(predictor), config.taps, shape, field="config.taps")
        if len(own) < len(config.taps):
            raise ConfigError("config.taps names a module twice; name each once", field="config.taps")
        if config.match == "logits":
            return exits_of(own, num_classes, field="config.taps")
        theirs = dry_run(_network(self.teacher), config.teacher_taps, shape, field="config.teacher_taps")
        return [Hint(own[a], theirs[b]) for a, b in zip(config.taps, config.teacher_taps)]

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, labels, config = batch.columns["x0"], batch.columns["class_label"], self.config
        logits, features = tapped(_network(self.student.predictor), config.taps, x0)
        loss = F.cross_entropy(logits, class_of(labels))
        if config.weight:
            loss = loss + config.weight * reduced(
                ofa_loss(logits, taught(self.teacher, x0), labels, config.power)
            )
        if config.exit_weight and config.taps:
            loss = loss + config.exit_weight * self.at_taps(features, x0, labels)
        yield Update("student", loss, agreement(logits, labels))

    def at_taps(self, features: Mapping[str, Tensor], x0: Tensor, labels: Tensor) -> Tensor:
        """The sum (scalar) of what the student's stages pay."""
        if self.config.match == "logits":
            wanted = taught(self.teacher, x0)
            exits = (head(features[path]) for path, head in zip(self.config.taps, self.student.exits))
            losses = [ofa_loss(logits, wanted, labels, self.config.power) for logits in exits]
        else:
            with torch.no_grad():
                _, theirs = tapped(_network(self.teacher), self.config.teacher_taps, x0)
            pairs = zip(self.config.taps, self.config.teacher_taps, self.student.exits)
            losses = [head(features[own], theirs[other]) for own, other, head in pairs]
        return torch.stack([reduced(loss) for loss in losses]).sum()

    def published(self) -> Mapping[str, Model]:
        return {"student": self.student.predictor}


def _network(model: nn.Module) -> nn.Module:
    """The network of a predictor; the model itself where it is one."""
    network = getattr(model, "network", model)
    assert isinstance(network, nn.Module)
    return network
