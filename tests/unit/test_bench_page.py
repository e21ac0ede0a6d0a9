"""The page that `make bench` writes holds the report's own figures."""

from __future__ import annotations

from distillery_cli.bench import markdown


def test_the_page_names_the_machine_and_every_measured_load():
    load = {"concurrency": 8, "images_per_request": 1, "p50_ms": 12.34, "images_per_s": 150.0, "ratio": 0.5}
    bare = {"sessions": 2, "batch": 4, "images_per_s": 300.0}
    step = {"recipe": "dmd2", "num_passes": 20, "step_ms": 287.0, "forward_ms": 142.0, "backward_ms": 107.0}
    page = markdown(
        {
            "machine": {"cpu": "A processor", "cores": 2, "system": "Linux", "python": "3.11"},
            "sampler": [{"model": "unet", "bare": bare, "loads": [load]}],
            "trainer": {**step, "step_over_passes": 1.16},
        }
    )
    assert "A processor, 2 cores" in page
    assert "| unet | sampler, 8 clients, 1 images a request | 12.3 | 150 | 0.5 |" in page
    assert "| step_over_passes | 1.16 |" in page
