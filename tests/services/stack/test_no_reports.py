"""Nothing reports home: ONNX Runtime keeps no identifier of this machine and opens no connection for its makers."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import distill_core
import onnx, onnxruntime
from onnx import TensorProto, helper
shape = {"shape": [1, 3], "elem_type": TensorProto.FLOAT}
graph = helper.make_graph(
    [helper.make_node("Relu", ["x"], ["y"])],
    "graph",
    [helper.make_tensor_value_info("x", **shape)],
    [helper.make_tensor_value_info("y", **shape)],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""


def test_a_session_leaves_no_identifier_in_the_home(tmp_path):
    silent = {
        "ORT_DISABLE_TELEMETRY",
        "CI",
        "GITHUB_ACTIONS",
        "TF_BUILD",
        "XDG_CACHE_HOME",
    }  # keep it quiet as well
    environment = {name: value for name, value in os.environ.items() if name not in silent}
    subprocess.run([sys.executable, "-c", PROGRAM], env={**environment, "HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.rglob("*"))


def test_who_wants_the_reports_can_have_them(tmp_path):
    program = "import os, distill_core; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0"
