"""Other servers beside ours: each in an environment of its own, with the same graph, by its own client.

What they serve is in `benchmarks/peers` of a checkout. One that does not install or start is reported with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import Asked, Child, Served, load
from benchmarks.sampler import SIGMA
from distill_core.errors import Unavailable
from distillery_cli.stack.up import free_port

FOLDER = Path(__file__).resolve().with_name("peers")
INSTALL_S = 600.0
START_S = 60.0
BATCHING = 8  # requests at most; the model itself gains nothing from more
KSERVE = "kserve_client.py"


class Peer(NamedTuple):
    """A server people would pick instead, with its adaptive batching or without."""

    name: str
    client: str  # inside FOLDER
    remark: str  # where it differs
    batches: tuple[int, ...] = (1, BATCHING)
    is_server: bool = True  # or the least that any server could do: shown, and no rival

    @property
    def folder(self) -> Path:
        """Its server and requirements."""
        return FOLDER / self.name


PEERS = (
    Peer("mlserver", KSERVE, "tritonclient over gRPC; one inference worker, its default"),
    Peer("litserve", "litserve/client.py", "aiohttp; the picture's bytes as an HTTP body; one worker"),
    Peer("bentoml", "bentoml/client.py", "its AsyncHTTPClient; pixels travel as JSON numbers; one worker"),
    Peer("pytriton", KSERVE, "tritonclient over gRPC"),
    Peer(
        "grpcaio", "grpcaio/client.py", "no server: grpc.aio, a thread and the model", (1,), is_server=False
    ),
)


def environment_of(peer: Peer, root: Path, say: Callable[[str], object]) -> Path:
    """The Python of a peer's environment under `root`, created once per list of requirements.

    Raises:
        Unavailable: it cannot be installed; the sentence quotes the end of pip's log.
    """
    import onnxruntime

    home, requirements = root / peer.name, peer.folder / "requirements.txt"
    if not requirements.exists():
        raise Unavailable(f"{requirements} is missing: peers are measured from a checkout of the repository")
    program, version = home / "bin" / "python", onnxruntime.__version__
    stamp = home / f".installed-{zlib.crc32(requirements.read_bytes() + version.encode()):08x}"
    if stamp.exists():
        return program
    say(f"{peer.name}: installing into {home}, once")
    shutil.rmtree(home, ignore_errors=True)
    log = root / f"{peer.name}.log"
    root.mkdir(parents=True, exist_ok=True)
    install = [str(program), "-m", "pip", "install", "-r", str(requirements), f"onnxruntime=={version}"]
    with log.open("wb") as output:
        for command in ([sys.executable, "-m", "venv", str(home)], install):
            try:
                subprocess.run(command, stdout=output, stderr=output, check=True, timeout=INSTALL_S)
            except (subprocess.SubprocessError, OSError):
                raise Unavailable(f"does not install: {said(log)}") from None
    stamp.touch()
    return program


class PeerServer(Child):
    """`python server.py GRAPH SIGMA THREADS PORT BATCH` in the peer's environment."""

    def __init__(
        self, peer: Peer, program: Path, served: Served, threads: int, batch: int, work: Path
    ) -> None:
        import distill_core

        self.port = free_port()
        core = Path(str(distill_core.__file__)).parents[1]
        paths = map(str, (peer.folder, FOLDER, core))
        arguments = [str(served.graph), str(SIGMA), str(threads), str(self.port), str(batch)]
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": f"{program.parent}{os.pathsep}{os.defpath}",
            "OMP_NUM_THREADS": str(threads),
        }
        self.folder = work / "peers" / peer.name
        log = self.folder / f"batch-{batch}.log"
        log.unlink(missing_ok=True)
        super().__init__([str(program), str(peer.folder / "server.py"), *arguments], log, variables)


def measure_peer(
    peer: Peer,
    served: Served,
    root: Path,
    work: Path,
    threads: int,
    measure: Callable[..., dict[str, Any]],
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    """`measure(name, server, generator)` of a peer without and with its batching; a reason where that failed."""
    try:
        program = environment_of(peer, root, say)
    except Unavailable as error:
        return [{"name": peer.name, "error": str(error), "remark": peer.remark}]
    rows: list[dict[str, Any]] = []
    for batch in peer.batches:
        name = f"{peer.name}, {'adaptive batching' if batch > 1 else 'no batching'}"
        server = PeerServer(peer, program, served, threads, batch, work)
        try:
            with server, generator_of(peer, program, server, work) as generator:
                row = measure(name, server, generator)
                rows.append({"name": name, "remark": peer.remark, "is_server": peer.is_server, **row})
        except Unavailable:
            reason = f"does not start, or broke off: {said(server.log)}"
            say(f"{name}: {reason}")
            return [*rows, {"name": name, "remark": peer.remark, "error": reason}]
    return rows


def generator_of(peer: Peer, program: Path, server: PeerServer, work: Path) -> Asked:
    """The load generator with the peer's client."""
    address = f"127.0.0.1:{server.port}"
    return load(str(program), FOLDER / peer.client, address, "student", work, START_S)


def said(log: Path) -> str:
    """The last error in a log, shortened; its last line if it holds none."""
    from distillery_cli.stack.up import last_words

    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    errors = [line.strip() for line in lines if "Error" in line or "ERROR" in line]
    return errors[-1][-300:] if errors else last_words(log)
