"""What students of masked teachers share: first they learn from unlabelled pictures, then the labels of a few.

Stage `pretrain`: pictures of `[data.unlabelled]`, a part of whose patches is hidden, by the method's own loss.
Stage `tune`: the labelled pictures, whole, by the cross-entropy of their labels. What only the first needs, decoders
and projections, is trained beside the student and not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.method import Batch, Method, MethodConfig, Model, Stage, Update
from distill_core.methods.recognition._students import LABELLED, agreement, new_classifier
from distill_core.networks.exits import WithExits
from distill_core.networks.masked import MaskedEncoder, check_same_patches
from distill_core.networks.predictor import IMAGE, Predictor
from distill_core.recipe.tables import NetworkConfig

WHOLE, HEAD = ("predictor.*",), ("predictor.*classifier*",)


class MaskedConfig(MethodConfig):
    """Keys of every such student."""

    pretrain_steps: int = Field(ge=0)  # of the first stage, the rest are of the second; 0: the labels alone
    head_only: bool = False  # whether the labels train the last layer alone, a linear probe of the features


class MaskedStudent(Method):
    """Base of the methods. A subclass says what the stage `pretrain` minimises, and what is trained beside it."""

    kind = "predictor"
    roles = ("student",)
    config: MaskedConfig
    student: WithExits

    def begin(self, network: NetworkConfig, data: Source, unlabelled: Source) -> None:
        """Make the student's classifier and its encoder.

        Raises:
            ConfigError: it is no vision transformer, or the unlabelled pictures are of another shape.
        """
        if unlabelled.shape != data.shape:
            raise ConfigError(
                f"the unlabelled pictures are {unlabelled.shape}, and those with labels {data.shape}; set "
                "data.unlabelled.size, or choose pictures of the same shape",
                field="data.unlabelled",
            )
        self.data, self.unlabelled = data, unlabelled
        predictor = new_classifier(network, data)
        self.encoder = MaskedEncoder(predictor, "the student", field="network.name")
        self.student = WithExits(predictor, ())

    def read(self, teacher: nn.Module, *, field: str) -> MaskedEncoder:
        """The encoder of a teacher that sees the same patches.

        Raises:
            ConfigError: it is no vision transformer, or takes other pictures or patches.
        """
        encoder = MaskedEncoder(teacher, "the teacher", field=field)
        taken = teacher.card().functions["predict"].inputs[IMAGE]  # type: ignore[operator]
        if not taken.fits(self.data.shape or ()):
            raise ConfigError(
                f"the teacher takes pictures {taken.described}, and the data's are {self.data.shape}; set data.size, "
                "or choose a model or data of the other's shape",
                field=field,
            )
        check_same_patches(self.encoder, encoder, field=field)
        return encoder

    @classmethod
    def columns(cls, config: MaskedConfig) -> Mapping[str, str]:
        return LABELLED

    @classmethod
    def stages(cls, config: MaskedConfig, steps: int) -> tuple[Stage, ...]:
        trains = {"student": HEAD if config.head_only else WHOLE}
        tune = Stage("tune", max(steps - config.pretrain_steps, 1), cls.roles, trains=trains, restart=True)
        if not config.pretrain_steps:
            return (tune,)
        return Stage("pretrain", config.pretrain_steps, cls.roles, streams=("unlabelled",)), tune

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        if self.stage_of(step).name == "pretrain":
            losses = self.pretraining(batch.also["unlabelled"].columns["x0"], step)
            yield Update("student", sum(losses.values()), losses)  # type: ignore[arg-type]
        else:
            yield self.tuning(batch.columns["x0"], batch.columns["class_label"])

    def pretraining(self, x0: Tensor, step: int) -> dict[str, Tensor]:
        """Losses (scalars) of unlabelled pictures, by name; their sum is minimised."""
        raise NotImplementedError

    def tuning(self, x0: Tensor, labels: Tensor) -> Update:
        """The step of labelled pictures."""
        logits = self.student(x0)
        return Update("student", F.cross_entropy(logits, labels), agreement(logits, labels))

    def published(self) -> Mapping[str, Model]:
        predictor: Predictor = self.student.predictor
        return {"student": predictor}
