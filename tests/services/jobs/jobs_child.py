"""A small real job process that speaks the supervisor's protocol: it counts steps and checkpoints them.

`[config]` of its recipe says how: step_s (seconds a step), crash_at (kill itself from this step on, in the
first `crashes` attempts, by default one), exit_at and exit_code, error (an error event), ignore_sigterm, keeps
(checkpoints, as it does by default), and publish (into the real store, killing itself right after it the first time).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    task = json.loads(Path(sys.argv[1]).read_text())
    run_dir, attempt = Path(task["run_dir"]), task["attempt"]
    with (run_dir / "attempts").open("a") as file:
        file.write(f"{attempt} {os.getpid()}\n")
    if task["kind"] == "convert":
        return convert(task)
    recipe = task["spec"]["recipe"]
    config, steps = recipe.get("config", {}), recipe["steps"]
    stop = []
    if not config.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    checkpoint = run_dir / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    (run_dir / "started_at").write_text(str(step))
    print(f"starting at {step}", file=sys.stderr, flush=True)
    (run_dir / "samples").mkdir(exist_ok=True)
    while step < steps:
        if stop:
            return 143
        time.sleep(config.get("step_s", 0.0))
        step += 1
        keep(checkpoint, step, config)
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "loss": 1 / step}) + "\n")
        rates = {"rate": 1.0, "eta_s": float(steps - step), "images_per_second": 64.0, "gpu_memory_bytes": 0}
        say(event="progress", step=step, steps=steps, **rates)
        say(event="metrics", step=step, values={"student_loss": 1 / step})
        if step == 1:
            (run_dir / "samples" / "00000001.png").write_bytes(PNG)
            say(event="sample", step=1, path="samples/00000001.png")
        if step >= config.get("crash_at", steps + 1) and attempt <= config.get("crashes", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == config.get("exit_at"):
            if "error" in config:
                say(event="error", **config["error"])
            print("last words", file=sys.stderr, flush=True)
            return config["exit_code"]
    if config.get("publish"):
        return publish(task, step)
    name = (recipe.get("publish") or {}).get("name")
    say(event="result", artifact=f"{name}@1" if name else "", metrics={"loss": 1 / step})
    return 0


def keep(checkpoint: Path, step: int, config: dict) -> None:
    if not config.get("keeps", True):
        return
    draft = checkpoint.with_suffix(f".{os.getpid()}")  # several processes of a job may be at it
    draft.write_text(str(step))
    os.replace(draft, checkpoint)
    say(event="checkpoint", step=step)


def publish(task: dict, step: int) -> int:
    from distill_core.artifacts import ArtifactStore, Manifest

    folder = Path(task["run_dir"]) / "export"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"step": step}))
    manifest = Manifest(name=task["spec"]["recipe"]["publish"]["name"], kind="model", job=task["job"])
    published = ArtifactStore(task["store"]).publish(folder, manifest, key=task["job"])
    if task["attempt"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    say(event="result", artifact=published.ref, metrics={})
    return 0


def convert(task: dict) -> int:
    (Path(task["run_dir"]) / "converted").write_text(task["spec"]["artifact"])
    name = task["spec"]["artifact"].partition("@")[0]
    say(event="result", artifact=f"{name}@2", metrics={"rel_l2": 2e-6})
    return 0


if __name__ == "__main__":
    sys.exit(main())
