"""`distillery demo`: digits to teacher to one-step student to ONNX to server, and a radiance field."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError, DistilleryError
from distillery_cli.jobs.listing import shown_until_end
from distillery_cli.jobs.values import state_name
from distillery_cli.models.generate import save_pictures
from distillery_cli.scenes.render import save_gif
from distillery_cli.stack import demo_report as reports
from distillery_cli.stack.up import Stack, free_port
from distillery_cli.terminal.output import AsJson, Bars, StoreUrl, emit_json, notes, results, styled

if TYPE_CHECKING:
    import numpy as np

    from distill_service.settings import Settings
    from distillery.v1.jobs_pb2 import Job, WatchResponse
    from distillery_sampler.client import SamplerClient
    from distillery_trainer.client import JobsClient

PIPELINE = Path(__file__).with_name("demo_pipeline.toml")
FIELD_RECIPE = "nerf_procedural"
TEACHER_STEPS = 32
NUM_SAMPLES = 1797  # as many as there are real digits
CHUNK = 256  # pictures in one request
SHEET = 80  # pictures on each side of the contact sheet
FRAMES, FRAME_SIDE = 36, 128


@dataclass
class Trained:
    """Results of the jobs: what they published, how their losses went, and how long each took."""

    models: dict[str, str] = field(default_factory=dict)  # stage -> name@version
    curves: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(epilog="Examples: distillery demo  ·  distillery demo --out out/demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the table and the pictures go.")] = Path(
        "out/demo"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the jobs of the run before.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> int:
    """Train, distil, convert, publish, serve and measure on real digits, and a radiance field: 5 minutes."""
    began = time.monotonic()
    out = out.absolute()
    settings = stack_settings(_state_folder(out / "state", keep), store or users_store())
    with Stack(settings) as stack:
        stack.start(lambda name, state: notes.print(f"{name} {state}"))
        trained = _run_jobs(settings.jobs_address)
        measured = _ask_sampler(settings, trained, out)
    trained.seconds["total"] = round(time.monotonic() - began, 1)
    report = reports.Report(
        **measured,
        field=trained.metrics["field"],
        seconds=trained.seconds,
        models=trained.models,
        num_samples=NUM_SAMPLES,
    )
    reports.save_curves(trained.curves, out / "loss_curve.png")
    (out / "report.json").write_text(
        json.dumps(report.values(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return _conclude(report, out, settings.store_url, as_json)


def users_store() -> str | None:
    """The user's own store, where the next command looks; None if it is shared with others or cannot be written."""
    from distill_core.artifacts import ArtifactStore
    from distill_service.settings import settings

    store = ArtifactStore(settings().store_url)
    present = Path(store.root)
    while not present.exists():
        present = present.parent
    return store.url if store.local and os.access(present, os.W_OK) else None


def serving_command(store: str) -> str:
    """Command that serves the models of `store`."""
    from distill_service.settings import settings

    script, module = [sys.argv[0]], [sys.executable, "-m", "distillery_cli"]
    typed = script if Path(sys.argv[0]).name == "distillery" else module
    program = ["distillery"] if shutil.which("distillery") else typed
    return shlex.join([*program, "up", *([] if store == settings().store_url else ["--store", store])])


def _conclude(report: reports.Report, out: Path, store: str, as_json: bool) -> int:
    demands = reports.demands(report)
    if as_json:
        emit_json(report.values())
    else:
        results.print(reports.table(report))
        results.print(f"radiance field: PSNR {report.field['psnr']:.1f} dB on views it was not trained on")
        results.print(f"took {report.seconds['total']:.0f} s; pictures and report.json are in {out}")
        for demand in demands:
            word = ("holds", "green") if demand.holds else ("FAILS", "red")
            results.print(styled(word, f": {demand.said}"))
        results.print(f"published in {store}: {', '.join(dict.fromkeys(report.models.values()))}")
        results.print(f"to serve them: {serving_command(store)}")
    return 0 if all(demand.holds for demand in demands) else 1


def _state_folder(state: Path, keep: bool) -> Path:
    """The stack's own folder, emptied unless `keep`; a folder that no stack made is left alone."""
    if state.exists() and not keep:
        if any(state.iterdir()) and not (state / "logs").is_dir():
            raise ConfigError(
                f"{state} was not made by a demo and would be deleted; choose another --out", field="out"
            )
        shutil.rmtree(state)
    state.mkdir(parents=True, exist_ok=True)
    return state


def stack_settings(state: Path, store: str | None = None) -> Settings:
    """A stack of its own beside any other on this machine: own folders, own broker, free ports, no TLS."""
    from distill_service.settings import load_settings

    return load_settings(
        state_dir=state,
        store_url=store or str(state / "store"),
        runs_dir=state / "runs",
        cache_dir=state / "cache",
        database_url="",
        broker_url="",
        jobs_host="127.0.0.1",
        jobs_port=free_port(),
        sampler_host="127.0.0.1",
        sampler_port=free_port(),
        jobs_metrics_port=0,
        worker_metrics_port=0,
        sampler_metrics_port=0,
        converter_metrics_port=0,
        tls_cert=None,
        tls_key=None,
        tls_client_ca=None,
        tls_ca=None,
        tls_client_cert=None,
        tls_client_key=None,
        tokens_file=None,
        audit_log=None,
    )


def _run_jobs(address: str) -> Trained:
    """Submit the pipeline and the field, and follow both to their ends."""
    from distillery_cli.jobs.pipelines import pipeline_message, read_pipeline
    from distillery_trainer.client import JobsClient, train_spec

    trained = Trained()
    with JobsClient(address) as api:
        pipeline = read_pipeline(PIPELINE)
        digits = api.submit(pipeline_message(pipeline, PIPELINE.parent), name=pipeline.name, priority=1)
        scene = api.submit(train_spec(FIELD_RECIPE), name="field")
        for job in (digits, scene):
            _follow(api, job, trained)
    return trained


def _follow(api: JobsClient, job: Job, trained: Trained) -> None:
    names = {one.id: one.stage or one.name for one in (job, *job.stages)}

    def hear(response: WatchResponse) -> None:
        if response.WhichOneof("event") == "metrics":
            curve = trained.curves.setdefault(names[response.job_id], [])
            curve.append((response.metrics.step, dict(response.metrics.values)))

    ended = shown_until_end(api, job, hear=hear)
    for one in ended.stages or [ended]:
        if state_name(one) != "SUCCEEDED":
            raise DistilleryError(f"{names[one.id]} is {state_name(one)}: {one.error.message}")
        trained.models[names[one.id]] = one.artifact
        trained.metrics[names[one.id]] = dict(one.metrics)
        took = one.finished_time.ToDatetime() - one.started_time.ToDatetime()
        trained.seconds[names[one.id]] = round(took.total_seconds(), 1)


def _ask_sampler(settings: Settings, trained: Trained, out: Path) -> dict[str, Any]:
    """The four rows and the difference, measured on the sampler's answers; saves the pictures."""
    from distillery_sampler.client import SamplerClient

    began = time.monotonic()
    address = settings.sampler_address
    with SamplerClient(address) as sampler, Bars() as bars:
        asked = {
            "teacher": ("teacher", TEACHER_STEPS),
            "teacher_one_step": ("teacher", 1),
            "student": ("student", 1),
            "onnx": ("onnx", 1),
        }
        pictures: dict[str, np.ndarray] = {}
        ms: dict[str, float] = {}
        for name, (stage, steps) in asked.items():
            pictures[name], ms[name] = _sampled(sampler, trained.models[stage], steps, bars, name)
        save_pictures(sampler.generate(trained.models["onnx"], class_labels=range(10)), out / "digits.png")
        _save_orbit(sampler, trained.models["field"], bars, out)
    rows = {name: reports.Row(*figures, ms[name]) for name, figures in _judged(settings, trained, pictures)}
    sheet = {
        f"teacher, {TEACHER_STEPS} steps": pictures["teacher"][:SHEET],
        "student, 1 step, ONNX": pictures["onnx"][:SHEET],
    }
    reports.save_contact_sheet(sheet, out / "contact_sheet.png")
    trained.seconds["sampling"] = round(time.monotonic() - began, 1)
    return {**rows, "max_abs_difference": float(abs(pictures["student"] - pictures["onnx"]).max())}


def _sampled(
    sampler: SamplerClient, model: str, num_steps: int, bars: Bars, title: str
) -> tuple[np.ndarray, float]:
    """Class-balanced pictures (N, C, H, W) from the server, and milliseconds each; picture i has seed i."""
    import numpy as np

    from distillery_sampler.client import generate_request, tensor_from

    sampler.load(model)
    line = bars.add(f"sampling {title}", NUM_SAMPLES)
    parts = []
    began = time.perf_counter()
    for start in range(0, NUM_SAMPLES, CHUNK):
        indices = range(start, min(start + CHUNK, NUM_SAMPLES))
        request = generate_request(
            model,
            class_labels=[index % 10 for index in indices],
            seeds=indices,
            num_steps=num_steps,
            image_format="RAW_U8",
            with_tensor=True,
        )
        parts.append(tensor_from(sampler.call_generate(request).tensor))
        line.update(indices.stop, NUM_SAMPLES)
    took = time.perf_counter() - began
    line.done()
    return np.concatenate(parts), 1000 * took / NUM_SAMPLES


def _judged(
    settings: Settings, trained: Trained, pictures: dict[str, np.ndarray]
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Fréchet distance and accuracy of each set, by the judge that the pipeline trained."""
    import torch

    from distill_core.artifacts import ArtifactStore
    from distill_core.data import build_source
    from distill_core.metrics.judge import load_judge
    from distill_core.recipe import load_recipe

    judge = load_judge(ArtifactStore(settings.store_url).fetch(trained.models["judge"]))
    real = build_source(load_recipe("edm_digits").data or {}).all(NUM_SAMPLES)
    labels = torch.arange(NUM_SAMPLES) % 10
    for name, values in pictures.items():
        figures = judge.figures(torch.from_numpy(values), labels, real)
        yield name, (figures["frechet_distance"], figures["accuracy"])


def _save_orbit(sampler: SamplerClient, model: str, bars: Bars, out: Path) -> None:
    line = bars.add("rendering orbit", FRAMES)
    frames = []
    for view in sampler.render_path(model, count=FRAMES, width=FRAME_SIDE, height=FRAME_SIDE):
        frames.append(view.rgb)
        line.update(len(frames), FRAMES)
    line.done()
    save_gif(frames, out / "orbit.gif")
    reports.save_strip(frames, out / "orbit.png")
