"""Nobody's server, but what gRPC itself costs: `python server.py GRAPH SIGMA THREADS PORT BATCH`; it never batches.

One handler, one model thread, no checks, no queue, no limits, no figures: 16 bytes in (seed, label), pixels out.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from student import Student

GRAPH, SIGMA, THREADS, PORT, _ = sys.argv[1:6]


class Picture(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers every method."""

    def __init__(self) -> None:
        self._student, self._thread = Student(GRAPH, float(SIGMA), int(THREADS)), ThreadPoolExecutor(1)

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """One handler for all."""
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        pair = np.array([struct.unpack("<QQ", request)])
        loop = asyncio.get_running_loop()
        pictures = await loop.run_in_executor(self._thread, self._student, pair[:, 0], pair[:, 1])
        return bytes(pictures[0].tobytes())


async def main() -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Picture(),))
    server.add_insecure_port(f"127.0.0.1:{PORT}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
