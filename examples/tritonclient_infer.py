"""Triton's own client, unchanged: list, describe, run. python examples/tritonclient_infer.py [HOST:PORT].

pip install 'tritonclient[grpc]'
"""

import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

client = InferenceServerClient(*sys.argv[1:] or ["127.0.0.1:50052"])
print([model.name for model in client.get_model_repository_index().models])
print(client.get_model_metadata("dmd2-digits", as_json=True)["inputs"])
seeds, labels = InferInput("seed", [10, 1], "UINT64"), InferInput("class_label", [10, 1], "INT64")
seeds.set_data_from_numpy(np.arange(10, dtype=np.uint64)[:, None])
labels.set_data_from_numpy(np.arange(10, dtype=np.int64)[:, None])
print(client.infer("dmd2-digits", [seeds, labels]).as_numpy("images").shape)
