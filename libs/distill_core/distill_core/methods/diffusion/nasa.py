"""NASA-T, the other half of SNOOPI: a one-step student that can also be told what not to show.

    dL/dtheta = E[ W (D_fake^w(x_sigma) - D_teacher^w(x_sigma)) dx0/dtheta ],   x0 = G_theta(sigma* z; c, c-, alpha)
    D_teacher^w = D(c-) + w (D(c) - D(c-)),   w ~ U(guidance_min, guidance_max),   alpha ~ U(0, scale_max)

The student's cross-attention turns away from the negative prompt c- (`networks/steering.py`); the teacher's guidance
leads away from it instead of the null prompt; the fake score does not see it. Without negative prompts this is PG-SB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field

from distill_core.config import Words
from distill_core.data.source import Source
from distill_core.errors import ConfigError
from distill_core.method import Batch, Cond, Update
from distill_core.methods.diffusion._score_distillation import DrawnGuidance, DrawnGuidanceConfig
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.generation import generate
from distill_core.networks.steering import NEGATIVE, with_negative
from distill_core.recipe.tables import EvaluateConfig


class Config(DrawnGuidanceConfig):
    negative_prompts: tuple[Words, ...] = ()  # one is drawn for each item; () = PG-SB
    scale_max: float = Field(1.0, ge=0)  # alpha ~ U(0, scale_max), one per update
    scale: float = Field(
        0.5, ge=0
    )  # alpha that the student is measured and served with (official: 0.1 to 0.5)


class NASA(DrawnGuidance):
    config: Config

    def __init__(self, config: Config, *, teacher: Denoiser, student: Denoiser, data: Source) -> None:
        super().__init__(config, teacher=teacher, student=student)
        self.data = data
        if not config.negative_prompts:
            return
        if teacher.cond.kind != "prompt" or self.law.is_off:
            raise ConfigError(
                "negative prompts need a text-to-image teacher under guidance; leave config.negative_prompts out",
                field="config.negative_prompts",
            )
        student.cond = student.cond.model_copy(update={"nasa_scale": config.scale})

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        yield from super().updates(self.with_negatives(batch), step)

    def with_negatives(self, batch: Batch) -> Batch:
        """The batch with a negative prompt for each item, and one strength for all."""
        prompts = self.config.negative_prompts
        if not prompts:
            return batch
        chosen = torch.randint(len(prompts), (batch.size,)).tolist()
        alpha = self.config.scale_max * float(torch.rand(()))
        cond = with_negative(self.teacher, batch.cond, [prompts[i] for i in chosen], scale=alpha)
        return replace(batch, cond=cond).to(self.device)

    def teacher_cond(self, batch: Batch) -> Cond:
        return {name: value for name, value in batch.cond.items() if name != "nasa_scale"}

    def fake_cond(self, batch: Batch) -> Cond:
        return {n: v for n, v in self.teacher_cond(batch).items() if not n.startswith(NEGATIVE)}

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """Shares of images that show the prompt, and the negative prompt; `plain_`: without the negative prompt.

        For data that recognises what a picture shows, on its prompts without a word of the negative ones.
        """
        recognise = getattr(self.data, "recognise", None)
        asked = self._asked(config.num_samples)
        if recognise is None or not asked:
            return {}
        cond = self.student.encode_prompts([prompt for prompt, _ in asked])
        steered = with_negative(
            self.student, cond, [negative for _, negative in asked], scale=self.config.scale
        )
        figures: dict[str, float] = {}
        for prefix, condition in (("", steered), ("plain_", cond)):
            pictures = generate(
                self.student, condition, len(asked), seed=config.seed, batch_size=config.batch_size
            )
            seen = [self.data.class_names[label].split() for label in recognise(pictures).tolist()]
            shown = [
                (_all_in(prompt, words), _all_in(negative, words))
                for (prompt, negative), words in zip(asked, seen)
            ]
            accuracy, share = torch.tensor(shown, dtype=torch.double).mean(0).tolist()
            figures |= {f"{prefix}prompt_accuracy": accuracy, f"{prefix}negative_share": share}
        return figures

    def _asked(self, count: int) -> list[tuple[str, str]]:
        """`count` pairs of a prompt and a negative one, every pair equally often."""
        negatives = self.config.negative_prompts
        words = {word for negative in negatives for word in negative.split()}
        prompts = [p for p in dict.fromkeys(self.data.prompts or ()) if not words & set(p.split())]
        pairs = [(prompt, negative) for prompt in prompts for negative in negatives]
        return [pairs[i % len(pairs)] for i in range(count)] if pairs else []


def _all_in(text: str, words: list[str]) -> bool:
    return set(text.split()) <= set(words)
