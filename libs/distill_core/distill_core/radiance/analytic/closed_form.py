"""Scenes in closed form, ready to be looked at: an analytic field with the cells that it occupies."""

from __future__ import annotations

import math

import torch

from distill_core.artifacts import SceneSpec
from distill_core.networks.fields import build_field
from distill_core.networks.fields.analytic import SCENES
from distill_core.radiance.analytic.procedural import BOUND
from distill_core.radiance.scenes.scene import Scene
from distill_core.recipe.tables import NetworkConfig

CELLS, NUM_STEPS, RADIUS = 32, 192, 2.8  # per side; along the diagonal; of the usual cameras


def closed_form_scene(name: str) -> Scene:
    """The scene `name` of `networks.fields.analytic`: exact, frozen, without a parameter."""
    axis = (torch.arange(CELLS) + 0.5) * (2 * BOUND / CELLS) - BOUND
    centres = torch.cartesian_prod(axis, axis, axis)
    # A distance changes by at most the way gone: further than half a diagonal from a surface, a cell has none of it.
    # Deep inside nothing can be seen; a shell of more than a cell lets no light through.
    depth, reach = -SCENES[name].signed_distances(centres).amin(-1), math.sqrt(3) * BOUND / CELLS
    near = (depth >= -reach) & (depth <= 1.5 * reach)
    field = build_field(NetworkConfig(name="analytic", args={"scene": name}), BOUND)
    spec = SceneSpec(field="analytic", bound=BOUND, radius=RADIUS)
    return Scene(field.eval(), near.reshape(CELLS, CELLS, CELLS), spec, NUM_STEPS)
