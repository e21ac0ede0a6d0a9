"""Defensive distillation: a student of softened answers, and a report of what attacks still do to it.

    teacher:  CE(z_t / T, y)        student:  CE(z_s / T, softmax(z_t / T))        deployed at T = 1

Trained at a temperature T, logits grow by T: at T = 1 the softmax is saturated, the gradient of the loss is 0, and
attacks that follow it stand still. That is masking, and no robustness: with logits / T they work as before, and
Carlini & Wagner's, which reads the logits, does anyway. All of that is measured here. T = 1 is no defence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from pydantic import Field

from distill_core.data import Source, build_source
from distill_core.data.classes import use_class_names
from distill_core.losses.distillation import reduced, soft_ce
from distill_core.method import Batch, Method, MethodConfig, Stage, Update
from distill_core.methods.recognition._students import LABELLED, agreement, new_classifier
from distill_core.metrics.attacks import AttackConfig, attacked, check_toolbox
from distill_core.networks.modes import evaluating
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MethodConfig):
    temperature: float = Field(20.0, ge=1)  # of both trainings; 20 to 100 are usual, 1 is no defence
    teacher_steps: int = Field(400, ge=1)  # in which the teacher is trained, the rest are the student's
    attacks: AttackConfig = AttackConfig()  # budgets of the attacks that the student is measured under


class Defensive(Method):
    paper = (
        "Papernot et al. 2016, Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks, "
        "arXiv 1511.04508; 2024, Evaluating Adversarial Robustness: A Comparison Of FGSM, Carlini-Wagner Attacks, And "
        "The Role of Distillation as Defense Mechanism, arXiv 2404.04245"
    )
    kind = "predictor"
    roles = ("teacher", "student")

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        check_toolbox()  # before the training, not after it
        self.config, self.data = config, data
        self.teacher = new_classifier(network, data)
        self.student = new_classifier(network, data)

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return LABELLED

    @classmethod
    def stages(cls, config: Config, steps: int) -> tuple[Stage, ...]:
        rest = max(steps - config.teacher_steps, 1)
        return Stage("teacher", config.teacher_steps, ("teacher",)), Stage(
            "student", rest, ("student",), restart=True
        )

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0, labels, temperature = batch.columns["x0"], batch.columns["class_label"], self.config.temperature
        role = self.stage_of(step).name
        logits = getattr(self, role)(x0)
        if role == "teacher":
            loss = F.cross_entropy(logits / temperature, labels)
        else:
            with torch.no_grad(), evaluating(self.teacher):
                target = F.softmax(self.teacher(x0) / temperature, 1)
            loss = reduced(soft_ce(logits / temperature, target))
        yield Update(role, loss, agreement(logits, labels))

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """What attacks do to the student, on the items of `evaluate.data`, or on those of the training without it."""
        source = self.data if config.data is None else build_source(config.data)
        use_class_names(source, self.data.class_names, field="evaluate.data")
        batch = source.all(self.config.attacks.items).to(self.device)
        with evaluating(self.student):
            return attacked(
                self.student.network,
                batch.columns["x0"],
                batch.columns["class_label"],
                self.config.attacks,
                masking=self.config.temperature,
            )
