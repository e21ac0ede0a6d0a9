"""The page that `make bench` writes holds the report's own figures."""

from __future__ import annotations

from benchmarks.conversion import conclusions, conversion_rows
from benchmarks.overview import markdown


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
    curves = {
        "mlp_from_images": [(250.0, 20.0), (500.0, 25.0)],
        "mlp_with_grid": [(250.0, 24.0), (500.0, 25.05)],
        "hash_teacher": [(30.0, 26.0)],
        "mlp_converted": [(20.0, 24.0), (40.0, 25.1)],
    }
    page = markdown(
        {
            "machine": {"cpu": "A processor", "cores": 2, "system": "Linux", "python": "3.11"},
            "sampler": [{"model": "unet", "bare": bare, "loads": [load]}],
            "rendering": {
                "sparse": {"num_steps": 96, "speedup": 17.25, "psnr_loss": 0.2},
                "served": {"ratio": 0.957},
                "first": [{"side": 256, "first_ms": 41.5, "last_ms": 900.0}],
            },
            "stages": {"staged": (6.0, 30.5), "pixels": (5.9, 28.0), "pixels_own_colors": (6.1, 27.0)},
            "conversion": {"scene": "procedural", "curves": curves, **conclusions(curves)},
            "steps": [good, slow, broken],
        }
    )
    assert "A processor, 2 cores" in page
    assert "| unet | sampler, 8 clients, 1 images a request | 12.3 | 150 | 0.5 |" in page
    assert "96 samples a ray, times as fast | 17.25 | at least 15 | PASS |" in page
    assert "| PSNR lost by it, dB | 0.2 | at most 0.1 | short |" in page
    assert "| gRPC over bare renderer, views of 128 x 128 a second | 0.957 | at least 0.9 | PASS |" in page
    assert "first picture of 256 x 256, ms (last: 900) | 41.5 | at most 100 | PASS |" in page
    assert "| hash grid from images, the teacher | 30 | 26 |" in page
    assert "as good as from images (12.5 x sooner, asked 10) | 40 | 25 | PASS |" in page
    assert "as good as the converted one" not in page  # 25.05 is not 25.1
    assert "by pixels alone, with the teacher's block 2 | 5.9 | 28 | 2.5 dB less, asked 3: below |" in page
    assert "by pixels alone, block 2 its own | 6.1 | 27 | 3.5 dB less, asked 3: PASS |" in page
    assert "| dmd2 | 128 | 6 | 19 | 287 | 270 | 1.063 | PASS |" in page
    assert "| slow | 128 | 6 | 19 | 300 | 200 | 1.5 | over |" in page
    assert "| broken | 8 |  |  |  |  |  | the loss became nan |" in page


def test_a_conversion_that_never_gets_there_says_so():
    curves = {
        "hash_teacher": [(10.0, 20.0)],
        "mlp_from_images": [(500.0, 25.0)],
        "mlp_with_grid": [(250.0, 24.0), (500.0, 27.0)],
        "mlp_converted": [(25.0, 23.0), (50.0, 24.9)],
    }
    rows = conversion_rows({"scene": "procedural", "curves": curves, **conclusions(curves)})
    assert any("not reached" in row[0] and row[3] == "below" for row in rows)
    assert any("as good as the converted one (10 x later)" in row[0] for row in rows)


def test_a_mistake_in_a_benchmark_is_one_sentence(capsys):
    from benchmarks.__main__ import app
    from distillery_cli.terminal.running import run

    assert run(app, "python -m benchmarks", ["queue", "--rounds", "0"]) == 2
    said = capsys.readouterr().err
    assert "rounds" in said
    assert said.startswith("error: ")
