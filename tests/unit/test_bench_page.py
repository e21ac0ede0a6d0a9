"""The page that `make bench` writes holds the report's own figures."""

from __future__ import annotations

from distillery_cli.bench import markdown


def test_the_page_names_the_machine_and_every_measured_load():
    load = {"concurrency": 8, "images_per_request": 1, "p50_ms": 12.34, "images_per_s": 150.0, "ratio": 0.5}
    bare = {"sessions": 2, "batch": 4, "images_per_s": 300.0}
    step = {
        "method": "dmd2",
        "recipe": "dmd2",
        "batch_size": 128,
        "forward_passes": 6,
        "differentiated_passes": 19,
    }
    good = {**step, "step_ms": 287.0, "passes_ms": 270.0, "step_over_passes": 1.063}
    slow = {**step, "method": "slow", "step_ms": 300.0, "passes_ms": 200.0, "step_over_passes": 1.5}
    broken = {"method": "broken", "recipe": "broken", "batch_size": 8, "error": "the loss became nan"}
    page = markdown(
        {
            "machine": {"cpu": "A processor", "cores": 2, "system": "Linux", "python": "3.11"},
            "sampler": [{"model": "unet", "bare": bare, "loads": [load]}],
            "trainer": [good, slow, broken],
        }
    )
    assert "A processor, 2 cores" in page
    assert "| unet | sampler, 8 clients, 1 images a request | 12.3 | 150 | 0.5 |" in page
    assert "| dmd2 | 128 | 6 | 19 | 287 | 270 | 1.06 | PASS |" in page
    assert "| slow | 128 | 6 | 19 | 300 | 200 | 1.5 | over |" in page
    assert "| broken | 8 |  |  |  |  |  | the loss became nan |" in page
