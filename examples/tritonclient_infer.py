"""The same sampler through Triton's own client, unchanged: metadata, then digits.

pip install 'tritonclient[grpc]'
python examples/tritonclient_infer.py dmd2-digits
"""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.grpc as triton


def main(model: str, address: str = "127.0.0.1:50052") -> np.ndarray:
    """Print what the server says of itself and the model; ask for the digits 0 to 9."""
    client = triton.InferenceServerClient(address)
    print(
        client.get_server_metadata(as_json=True)["name"],
        client.get_model_metadata(model, as_json=True)["inputs"],
    )
    seeds = triton.InferInput("seed", [10, 1], "UINT64")
    seeds.set_data_from_numpy(np.arange(10, dtype=np.uint64)[:, None])
    labels = triton.InferInput("class_label", [10, 1], "INT64")
    labels.set_data_from_numpy(np.arange(10, dtype=np.int64)[:, None])
    images = client.infer(model, [seeds, labels]).as_numpy("images")
    print("images", images.shape, images.dtype)  # (10, height, width, channels) uint8
    return images


if __name__ == "__main__":
    main(*sys.argv[1:])
