"""Consistency distillation (CD): one network maps every point of the teacher's trajectory to its end.

    min E d( f(x, s), sg f_target(x', e) ),   f(x, s) = D(x, s),  f(x, 0) = x

x' is one solver step of the teacher from x = x0 + s eps at the level s to the next one, e. Several steps are taken by
noising the answer to a lower level again.
"""

from __future__ import annotations

from distill_core.methods.diffusion._consistency import ConsistencyConfig as ConsistencyConfig
from distill_core.methods.diffusion._consistency import ConsistencyDistillation
from distill_core.networks.denoiser import Denoiser


class Consistency(ConsistencyDistillation):
    paper = "Song et al. 2023, Consistency Models, arXiv 2303.01469"

    def __init__(self, config: ConsistencyConfig, *, teacher: Denoiser, student: Denoiser) -> None:
        super().__init__(config, teacher=teacher, student=student)
