"""Distances of the procedural scene in closed form, and the error of a field's against them."""

import numpy as np
import pytest
import torch

from distill_core.data.scenes import ProceduralScene
from distill_core.errors import DataError
from distill_core.kinds.field.card import Evaluate as EvaluateConfig
from distill_core.methods import find_method
from distill_core.metrics.image import depth_error
from distill_core.radiance.analytic.closed_form import closed_form_scene
from distill_core.radiance.analytic.procedural import SPHERE_CENTRE, SPHERE_RADIUS, procedural_distance
from distill_core.radiance.cameras.camera import Camera, look_at
from distill_core.radiance.rendering.march import step_length
from distill_core.radiance.scenes.scene import render
from distill_core.recipe import load_recipe


def test_the_error_is_the_mean_over_covered_pixels():
    truth = np.array([[1.0, 2.0], [0.0, 3.0]])
    covered = truth > 0
    assert depth_error(np.array([[1.5, 2.0], [9.0, 2.0]]), truth, covered) == pytest.approx(0.5)
    with pytest.raises(DataError, match="no pixel"):
        depth_error(truth, truth, np.zeros_like(covered))
    with pytest.raises(DataError, match="shapes"):
        depth_error(truth[:1], truth, covered)


def test_the_true_distance_of_the_sphere_is_that_of_geometry():
    centre = np.array(SPHERE_CENTRE)
    eye = centre + np.array([-1.5, -1.0, 0.6])
    camera = Camera(look_at(eye.tolist(), SPHERE_CENTRE), 30.0, 30.0, 4.5, 4.5, 9, 9)
    distance = procedural_distance(camera)
    directions = camera.rays().directions.double().numpy().reshape(9, 9, 3)
    along = directions @ (centre - eye)
    inside = SPHERE_RADIUS**2 - (np.linalg.norm(centre - eye) ** 2 - along**2)
    hit = inside > 0.02  # away from its rim
    assert hit.sum() > 15
    np.testing.assert_allclose(distance.numpy()[hit], (along - np.sqrt(inside.clip(0)))[hit], atol=5e-3)


def test_an_exact_field_is_as_far_away_as_a_step_and_data_without_truth_says_nothing():
    scene = ProceduralScene(ProceduralScene.Config(num_views=2, num_test_views=2, size=32))
    exact = closed_form_scene("procedural")
    view = render(exact, scene.test.camera(0))
    covered = scene.test.images[0, ..., 3] == 1
    error = depth_error(view.depth.numpy(), scene.test.distance[0].numpy(), covered.numpy())
    assert error < step_length(1.0, exact.num_steps)
    assert scene.test.some([1]).distance.shape == (1, 32, 32)


def test_the_method_reports_it():
    scene = ProceduralScene(ProceduralScene.Config(num_views=2, num_test_views=2, size=32))
    settings = load_recipe("nerf_procedural", {"network": {"name": "mlp", "args": {"width": 8}}})
    torch.manual_seed(0)
    cls = find_method("radiance_field")
    method = cls(cls.Config(num_steps=16, grid_resolution=8), network=settings.network, data=scene)
    figures = method.figures(EvaluateConfig())
    method.grid.occupied.fill_(False)  # an empty field: every distance is missing altogether
    truth = scene.test.distance[scene.test.images[..., 3] == 1]
    assert method.figures(EvaluateConfig())["depth_error"] == pytest.approx(float(truth.mean()), rel=0.02)
    assert figures["depth_error"] != pytest.approx(float(truth.mean()), rel=0.02)
    scene.test = scene.train.some([0])
    object.__setattr__(scene.test, "distance", None)
    assert "depth_error" not in method.figures(EvaluateConfig())
