"""The digits 0 to 9, a PNG file each: python examples/generate.py [HOST:PORT]."""

import sys

from distillery_sampler.client import SamplerClient, to_pil

with SamplerClient(*sys.argv[1:]) as sampler:
    sampler.wait_ready()
    digits = sampler.generate("dmd2-digits", class_labels=range(10), seed=1)
    for label, digit in enumerate(digits):
        to_pil(digit).save(f"digit-{label}.png")
