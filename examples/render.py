"""Once around a scene, as an animation: python examples/render.py [HOST:PORT]."""

import sys

from distillery_sampler.client import SamplerClient, to_pil

with SamplerClient(*sys.argv[1:]) as sampler:
    path = sampler.render_path("procedural-scene", count=12, elevation=20, width=96, height=96)
    first, *others = [to_pil(view.rgb) for view in path]
    first.save("orbit.gif", save_all=True, append_images=others, duration=80, loop=0)
