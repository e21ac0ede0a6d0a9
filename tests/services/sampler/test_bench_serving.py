"""`python -m benchmarks serving`: that its figures are consistent, and that what is slow looks slow."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import other_servers, serving
from benchmarks.load import Refused, closed, offered, settled
from benchmarks.other_servers import FOLDER, Peer, PeerServer, measure_peer
from benchmarks.processes import HERE, Asked, Sampler, Served, bare, load
from benchmarks.sampler import SIGMA, Subject
from benchmarks.serving import Bench, measured, paired, scan
from benchmarks.verdict import PLOT, figures, markdown, save_plot, verdicts
from distill_core.artifacts import ArtifactStore
from distill_core.errors import Unavailable
from tests.services.sampler.helpers import publish_denoiser

SUBJECT = Subject("digits", (1, 8, 8), "", {})
SHORT_S = 0.3
BROKEN = {"name": "other", "error": "does not start: no library"}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    """A published Gaussian, small enough that everything around it is what takes time."""
    state = tmp_path_factory.mktemp("bench")
    store = ArtifactStore(str(state / "store"))
    manifest = publish_denoiser(store, state / "digits")
    return Served(
        SUBJECT, manifest.ref, store.fetch(manifest.ref) / "exports" / "onnx-fp32" / "denoiser.onnx"
    )


@pytest.fixture
def work(served, tmp_path) -> Path:
    """A state folder with the store."""
    (tmp_path / "store").symlink_to(served.graph.parents[5])
    return tmp_path


# -- the load generator


def test_latency_counts_from_when_a_call_was_due_not_from_when_it_was_sent():
    async def blocks(seed: int, labels: list[int], timeout_s: float) -> bytes:
        time.sleep(0.02)  # noqa: ASYNC251 - the generator itself is held up
        return b""

    found = asyncio.run(offered(blocks, rate=200, seconds=0.2))
    assert found["ok"] > 20
    assert found["p99_ms"] > 20 * found["ok"] / 2  # the last ones had waited for all before them
    assert found["lag_p99_ms"] > 20


def test_a_late_sender_leaves_the_call_only_what_is_left_of_its_deadline():
    given = []

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        given.append(timeout_s)
        time.sleep(0.02)  # noqa: ASYNC251
        return b""

    asyncio.run(offered(call, rate=200, seconds=0.1, deadline_s=0.1))
    assert 0 < min(given) < 0.05
    assert max(given) <= 0.1


def test_every_call_is_counted_once_and_refusals_are_no_throughput():
    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        if seed % 4 == 1:
            raise Refused
        if seed % 4 == 2:
            raise TimeoutError
        if seed % 4 == 3:
            raise ValueError("broken")
        return b""

    found = asyncio.run(offered(call, rate=2000, seconds=0.2))
    counts = [found[name] for name in ("ok", "refused", "late", "failed")]
    assert sum(counts) == pytest.approx(found["offered"] * 0.2)
    assert max(counts) - min(counts) <= 1
    assert found["images_per_s"] * found["seconds"] == pytest.approx(found["ok"])
    assert found["errors"] == {"ValueError: broken": found["failed"]}
    assert found["refusal_p99_ms"] is not None


def test_what_is_answered_after_the_load_is_no_throughput_of_it():
    async def slow(seed: int, labels: list[int], timeout_s: float) -> bytes:
        await asyncio.sleep(0.5)
        return b""

    found = asyncio.run(offered(slow, rate=100, seconds=0.1))
    assert found["ok"] > 0
    assert found["images_per_s"] == 0


def test_closed_callers_wait_for_their_answers():
    running = most = 0

    async def call(seed: int, labels: list[int], timeout_s: float) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return b""

    found = asyncio.run(closed(call, concurrency=3, seconds=0.1, images=2))
    assert most == 3
    assert found["images_per_s"] * found["seconds"] == pytest.approx(2 * found["ok"])


def test_a_load_begins_when_the_server_answers_again():
    calls = []

    async def busy(seed: int, labels: list[int], timeout_s: float) -> bytes:
        calls.append(seed)
        if len(calls) < 3:
            raise Refused
        return b""

    assert asyncio.run(settled(busy)) == {"settled": True}
    assert len(calls) == 3


def test_a_server_that_answers_nothing_is_no_figure(served, work):
    answer = {"ok": 0, "p50_ms": None, "images_per_s": 0.0, "errors": {"X": 1}}
    script = f"import sys\nprint({json.dumps(answer)!r}, flush=True)\n"
    script += f"for line in sys.stdin: print({json.dumps(answer)!r}, flush=True)"
    dead = [sys.executable, "-c", script]
    with (
        bare(served, 1, work) as lone,
        Asked(dead, work / "dead.log") as server,
        pytest.raises(Unavailable, match="no call was answered: {'X': 1}"),
    ):
        paired(lone, server, 1, 1, 0.05)


# -- servers


def student(served: Served) -> bytes:
    """The picture of seed 3, label 4, as the peers make it."""
    spec = importlib.util.spec_from_file_location("student", FOLDER / "student.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Student(str(served.graph), SIGMA, 1)([3], [4]).tobytes()


@pytest.mark.parametrize(
    "client", [HERE / "our_client.py", FOLDER / "kserve_client.py"], ids=lambda p: p.stem
)
def test_peers_make_the_very_picture_that_the_sampler_makes(served, work, client):
    with Sampler(served.ref, work, 1) as server:
        assert 0 < server.start_seconds() < 60
        with load(sys.executable, client, server.address, served.ref, work, 30) as generator:
            found = base64.b64decode(generator.ask(kind="picture", seed=3, labels=[4])["picture"])
    assert found == student(served)


def bench(served: Served, work: Path, lone, **options) -> Bench:
    alone = scan(lone, 0.1)
    return Bench(served, lone, alone, work, 0.1, (), False, lambda text: None, **options)


def test_a_sampler_slowed_on_purpose_looks_slow(served, work, monkeypatch):
    monkeypatch.setattr(serving, "ROUNDS", 1)
    slow = {"DISTILLERY_SAMPLER_MAX_DELAY_S": "0.2", "DISTILLERY_SAMPLER_MAX_BATCH": "8"}
    found = {}
    with bare(served, 1, work) as lone:
        with_what = bench(served, work, lone)
        for name, more in (("plain", {}), ("slow", slow)):
            with Sampler(served.ref, work, 1, **more) as server:
                server.start_seconds()
                with load(sys.executable, HERE / "our_client.py", server.address, served.ref, work) as one:
                    found[name] = measured(with_what, name, server, one, callers=(1, 2))
    assert found["slow"]["overhead_ms"] > 190
    assert found["slow"]["overhead_ms"] > found["plain"]["overhead_ms"]
    assert found["slow"]["ratio"] < found["plain"]["ratio"]
    assert all(row["server_cores"] >= 0 and row["failed"] == 0 for row in found["plain"]["loads"])


def test_the_report_is_consistent_and_becomes_page_and_plot(served, work, monkeypatch):
    monkeypatch.setattr(serving, "ROUNDS", 1)
    monkeypatch.setattr(serving, "CONCURRENCY", (1, 4))
    monkeypatch.setattr(serving, "SHARES", (0.01,))
    monkeypatch.setattr(serving, "publish", lambda subject, state: served)
    report = serving.measure([SUBJECT], work, ("ours", "overload"), SHORT_S, lambda text: None)
    (subject,) = report["subjects"]
    ours = subject["ours"]
    assert report["p50_overhead_ms"] == ours["p50_ms"] - ours["forward_p50_ms"]
    assert report["throughput_ratio"] == ours["images_per_s"] / ours["bare_images_per_s"] < 1
    over = ours["overload"]
    assert over["offered"] == pytest.approx(4 * ours["images_per_s"], rel=0.3)
    assert report["overload_throughput_ratio"] == pytest.approx(over["images_per_s"] / ours["images_per_s"])
    assert over["errors"] == {}
    assert subject["bare"]["images_per_s"] == max(row["images_per_s"] for row in subject["bare"]["all"])

    save_plot(subject, work / PLOT)
    page = markdown(report, with_plot=True)
    assert (work / PLOT).read_bytes().startswith(b"\x89PNG")
    assert all(row["claim"] in page for row in report["claims"])
    assert "| Distillery | " in page
    assert report["plain_overhead_ms"] == subject["plain"]["overhead_ms"] > 0
    assert "| Distillery, graphs not rewritten | " in page
    assert "does not start: no library" in markdown(
        {**report, "subjects": [{**subject, "peers": [BROKEN]}]}, with_plot=False
    )


# -- verdicts


def test_what_does_not_hold_is_shown_as_not_holding():
    ours = {"overhead_ms": 2.0, "ratio": 0.97}
    peers = [
        {"overhead_ms": 4.0, "ratio": 0.5, "is_server": True},
        {"overhead_ms": 8.0, "ratio": 0.9, "is_server": True},
        {"overhead_ms": 1.0, "ratio": 0.99, "is_server": False},
        {"error": "did not start"},
    ]
    found = figures({"ours": ours, "start_s": 1.0, "peers": peers})
    assert found["best_peer_overhead_ratio"] == 0.5  # against the quickest of them
    assert found["best_peer_throughput_ratio"] == pytest.approx(
        0.97 / 0.9
    )  # and the one with the most images
    assert found["grpc_alone_overhead_ms"] == 1.0  # shown, and no rival
    plain = {"overhead_ms": 2.5, "ratio": 0.72}
    found_plain = figures({"ours": ours, "plain": plain, "start_s": 1.0, "peers": peers})
    assert found_plain["plain_peer_throughput_ratio"] == pytest.approx(0.72 / 0.9)
    assert found_plain["best_peer_throughput_ratio"] == found["best_peer_throughput_ratio"]
    held = {row["claim"]: row["holds"] for row in verdicts(found)}
    assert list(held.values()) == [False, True, False, True, True]
    flat = figures({"ours": ours, "start_s": 1.0}, {"memory": [{"change": 0.01}, {"change": -0.06}]})
    assert not verdicts(flat)[-1]["holds"]  # 6 % less is not flat either
    assert len(verdicts({"overload_p99_ms": 251.0, "overload_deadline_ms": 250.0})) == 1
    assert not verdicts({"overload_p99_ms": 251.0, "overload_deadline_ms": 250.0})[0]["holds"]


# -- peers


def test_a_peer_that_cannot_be_installed_is_reported_with_the_reason(served, tmp_path):
    rows = measure_peer(
        Peer("nobody", "", "a remark"), served, tmp_path, tmp_path, 1, dict, lambda text: None
    )
    assert len(rows) == 1
    assert "requirements.txt is missing" in rows[0]["error"]


def test_a_peer_that_does_not_start_is_reported_with_its_last_error(served, tmp_path, monkeypatch):
    home = tmp_path / "broken"
    home.mkdir()
    (home / "server.py").write_text("raise OSError('libnothing.so is not here')\n")
    (home / "client.py").write_text(
        "async def connect(address, model):\n    raise ConnectionError('nobody')\n"
    )
    monkeypatch.setattr(other_servers, "FOLDER", tmp_path)
    monkeypatch.setattr(other_servers, "START_S", 1.0)
    monkeypatch.setattr(other_servers, "environment_of", lambda peer, root, say: Path(sys.executable))
    rows = measure_peer(
        Peer("broken", "broken/client.py", ""),
        served,
        tmp_path,
        tmp_path / "work",
        1,
        dict,
        lambda text: None,
    )
    assert [row["name"] for row in rows] == ["broken, no batching"]  # its batching would not start either
    assert rows[0]["error"] == "does not start, or broke off: OSError: libnothing.so is not here"


def test_a_peer_is_given_the_graph_and_finds_the_noise_function(served, tmp_path, monkeypatch):
    home = tmp_path / "echo"
    home.mkdir()
    script = (
        "import sys, student\nprint(sys.argv[1:4], student.unit_normal(0, 0, 0, (2,)).shape, flush=True)\n"
    )
    (home / "server.py").write_text(script)
    (tmp_path / "student.py").write_text((FOLDER / "student.py").read_text())
    monkeypatch.setattr(other_servers, "FOLDER", tmp_path)
    with PeerServer(Peer("echo", "", ""), Path(sys.executable), served, 1, 8, tmp_path) as server:
        server.process.wait()
    assert server.log.read_text() == f"['{served.graph}', '{SIGMA}', '1'] (2,)\n"


def test_a_generator_without_a_server_says_so(tmp_path):
    with (
        pytest.raises(Unavailable, match="load.py ended"),
        load(sys.executable, HERE / "our_client.py", "127.0.0.1:1", "digits", tmp_path, 0.1),
    ):
        pass
