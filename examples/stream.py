"""Pictures one by one, each as soon as it is ready: python examples/stream.py [HOST:PORT]."""

import sys

from distillery_sampler.client import SamplerClient

with SamplerClient(*sys.argv[1:]) as sampler:
    for index, digit in sampler.generate_stream("dmd2-digits", class_labels=range(10), seed=1):
        print(f"picture {index} is here: {digit.shape}, {digit.mean():.0f} of 255 on average")
