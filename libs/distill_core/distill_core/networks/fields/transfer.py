"""Weights that a student field takes over from its teacher before the first step."""

from __future__ import annotations

import torch

from distill_core.networks.fields.base import ColorNetField, RadianceField
from distill_core.networks.fields.tensors import SparseField, TensorsField


@torch.no_grad()
def transfer_matching(teacher: RadianceField, student: RadianceField) -> list[str]:
    """Copy every tensor of `teacher` that `student` has under the same name in the same shape; their names.

    A packed grid takes the values of a dense one of its resolution.
    """
    if isinstance(student, SparseField) and isinstance(teacher, TensorsField):
        same = student.config.resolution, student.config.values
        if same == (teacher.config.resolution, teacher.config.values):
            student.copy_dense(teacher)
            return ["rows"]
    known = dict(teacher.named_parameters())
    copied = []
    for name, parameter in student.named_parameters():
        if name in known and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
            copied.append(name)
    return copied


def features_compare(teacher: RadianceField, student: RadianceField) -> bool:
    """Whether both feed features of one width into a block 2 of one shape, so that equal features are equal colours."""
    if not (isinstance(teacher, ColorNetField) and isinstance(student, ColorNetField)):
        return False
    shapes = [[parameter.shape for parameter in field.color_net.parameters()] for field in (teacher, student)]
    return teacher.geo_dim == student.geo_dim and shapes[0] == shapes[1]
