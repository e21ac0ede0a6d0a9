"""Four requests at once from one asyncio program: python examples/generate_asyncio.py [HOST:PORT]."""

import asyncio
import sys

from distillery_sampler.client import AsyncSamplerClient


async def main() -> None:
    """Ask for four digits and print how large each is."""
    async with AsyncSamplerClient(*sys.argv[1:]) as sampler:
        asked = [sampler.generate("dmd2-digits", class_labels=[label], seed=1) for label in range(4)]
        for (digit,) in await asyncio.gather(*asked):
            print(digit.shape, digit.dtype)


asyncio.run(main())
