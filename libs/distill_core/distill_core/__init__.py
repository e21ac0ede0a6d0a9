"""Distillation methods, and what they are trained, published and measured with."""

import os

# Libraries report home unless they are told not to before their first import: ONNX Runtime does, from 1.29 on.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
