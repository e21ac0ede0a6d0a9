"""Digits from a running sampler (`distillery up`), saved as one picture.

python examples/generate_with_client.py dmd2-digits digits.png
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from distill_core.errors import DistilleryError
from distillery_sampler.client import SamplerClient


def main(model: str, path: str, address: str = "127.0.0.1:50052") -> None:
    """Ask for the digits 0 to 9 and save them side by side."""
    with SamplerClient(address) as sampler:
        digits = sampler.generate(model, class_labels=range(10), seed=1)
    row = np.concatenate(digits, axis=1).squeeze()
    Image.fromarray(row).resize((row.shape[1] * 4, row.shape[0] * 4), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DistilleryError as error:
        sys.exit(f"error: {error}")
