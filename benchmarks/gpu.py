"""A one-step text-to-image student over gRPC on a GPU, beside the sum of its bare forwards."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import Child, Sampler
from distill_core.errors import Unavailable
from distill_core.kinds.cards import described, generator_card

CONCURRENCY = (1, 2, 8, 32)
BARE_RUNS = 20
SIGMA = 14.6  # the level that a student of Stable Diffusion 1.5 starts from
NUMBERS = tuple("0123456789")
Say = Callable[[str], object]


class Size(NamedTuple):
    """Sizes of the three networks."""

    name: str
    latent: int  # side
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]


SD15 = Size(
    "sd15-sized",
    64,
    {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
    },
)


def measure_gpu(
    work: Path,
    seconds: float,
    say: Say,
    *,
    size: Size = SD15,
    device: str = "cuda",
    precision: str = "bf16",
) -> dict[str, Any]:
    """Milliseconds p50 and images/s at each concurrency, JPEG included, and those of the networks alone.

    The weights are random; times do not depend on them. Every prompt is new, so that no embedding is kept.

    Raises:
        Unavailable: there is no GPU, or the sampler does not start.
    """
    require_device(device)
    work.mkdir(parents=True, exist_ok=True)
    say(f"{size.name}: making the networks")
    published, folder = _published(size, work)
    ref, image = published.ref, generator_card(published).image
    assert image is not None
    loads = []
    with _GpuSampler(ref, work, device, precision) as sampler:
        say(f"{size.name}: SERVING after {sampler.start_seconds():.1f} s")
        for clients in CONCURRENCY:
            loads.append(_load(sampler.address, ref, clients, seconds))
            say(f"{size.name}: {clients} clients, p50 {loads[-1]['p50_ms']:.1f} ms")
    bare = bare_forwards(folder, device, precision)
    alone = loads[0]["p50_ms"]
    return {
        "model": size.name,
        "device": _device_name(device),
        "precision": precision,
        "picture": image.picture[-1],
        "loads": loads,
        "bare": bare,
        "p50_over_bare": alone / bare["sum_ms"],
    }


def gpu_rows(report: dict[str, Any]) -> list[list[Any]]:
    """The report's rows for a table."""
    bare, model = report["bare"], report["model"]
    what = f"bare text encoder, UNet, VAE ({report['precision']}, {report['device']})"
    rows: list[list[Any]] = [[model, what, f"{bare['sum_ms']:.3g}", 1000 / bare["sum_ms"], 1.0]]
    for load in report["loads"]:
        ratio = load["images_per_s"] * bare["sum_ms"] / 1000
        how = f"sampler, {load['concurrency']} clients, JPEG"
        rows.append([model, how, f"{load['p50_ms']:.3g}", load["images_per_s"], ratio])
    return rows


def require_device(device: str) -> None:
    """Refuse a GPU that is not there.

    Raises:
        Unavailable: torch sees none.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable(
            "bench --only gpu needs an NVIDIA GPU and a CUDA build of torch, and torch sees none here; run it on a "
            "machine that has one"
        )


class _GpuSampler(Sampler):
    """A sampler with the torch backend on a device."""

    def __init__(self, ref: str, state: Path, device: str, precision: str) -> None:
        from distillery_cli.stack.demo import stack_settings
        from distillery_cli.stack.up import environment

        shared = stack_settings(state)
        self.address = shared.sampler_address
        own = {
            "DISTILLERY_SAMPLER_PRELOAD": json.dumps([ref]),
            "DISTILLERY_SAMPLER_BACKEND": "torch",
            "DISTILLERY_SAMPLER_DEVICE": device,
            "DISTILLERY_SAMPLER_PRECISION": precision,
            "DISTILLERY_LOG_LEVEL": "warning",
        }
        module = [sys.executable, "-m", "distillery_sampler.server"]
        Child.__init__(self, module, state / "logs" / "sampler.log", {**environment(shared), **own})


def _published(size: Size, work: Path) -> tuple[Any, Path]:
    """A one-step student with random weights in the store of `work`: its manifest and its folder."""
    from distill_core.artifacts import ArtifactStore, Manifest
    from distillery_cli.stack.demo import stack_settings

    denoiser = new_student(size)
    folder = work / f"untrained-{size.name}"
    denoiser.save(folder)
    store = ArtifactStore(stack_settings(work).store_url)
    draft = Manifest(name=size.name, title="untrained, for timing", **described(denoiser))
    return store.publish(folder, draft), folder


def new_student(size: Size) -> Any:
    """Text encoder, UNet and VAE with random weights, as a denoiser of one step."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from distill_core.artifacts import CondSpec, ImageSpec, SamplerSpec
    from distill_core.networks.diffusers_denoiser import DiffusersDenoiser, Sidecar
    from distill_core.networks.text import TextEncoder, new_text_encoder

    tokenizer = new_text_encoder([f"picture {number}" for number in NUMBERS]).tokenizer
    tokenizer.model_max_length = size.text["max_position_embeddings"]
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextModel(CLIPTextConfig(**size.text, **ids))
    blocks = len(size.vae["block_out_channels"])
    codec: Any = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        scaling_factor=0.18215,
        **size.vae,
    )
    picture = size.latent * 2 ** (blocks - 1)
    sidecar = Sidecar(
        image=ImageSpec(channels=4, height=size.latent, width=size.latent, picture=(3, picture, picture)),
        cond=CondSpec(
            kind="prompt",
            max_tokens=tokenizer.model_max_length,
            embed_dim=size.text["hidden_size"],
        ),
        sampler=SamplerSpec.few_step((SIGMA,), noise_scale=SIGMA),
        parameterisation="eps",
    )
    network: Any = diffusers.UNet2DConditionModel(sample_size=size.latent, **size.unet)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return DiffusersDenoiser(network, scheduler, sidecar, codec=codec, text=TextEncoder(tokenizer, text))


def _load(address: str, ref: str, clients: int, seconds: float) -> dict[str, Any]:
    """`clients` threads that each ask for one JPEG after the other."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    failures: list[BaseException] = []
    stop = threading.Event()

    def loop(number: int) -> None:
        try:
            _ask_until(stop, address, ref, number, latencies[number])
        except BaseException as error:  # told by the main thread
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - began
    if failures:
        raise failures[0]
    every = sorted(latency for own in latencies for latency in own)
    return {
        "concurrency": clients,
        "p50_ms": 1000 * statistics.median(every),
        "p95_ms": 1000 * every[int(0.95 * (len(every) - 1))],
        "images_per_s": len(every) / taken,
        "requests": len(every),
    }


def _ask_until(stop: threading.Event, address: str, ref: str, number: int, latencies: list[float]) -> None:
    """One call at least, each with a prompt that nobody has sent before."""
    from distill_service.channels import channel
    from distillery.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc

    with channel(address) as connection:
        generate = sampler_pb2_grpc.SamplerServiceStub(connection).Generate
        while True:
            request = sampler_pb2.GenerateRequest(
                model=ref,
                prompts=[f"picture {number} {len(latencies)} {time.monotonic_ns()}"],
                seed=len(latencies),
                image_format=common_pb2.IMAGE_FORMAT_JPEG,
            )
            began = time.perf_counter()
            generate(request, timeout=120)
            latencies.append(time.perf_counter() - began)
            if stop.is_set():
                return


def bare_forwards(folder: Path, device: str, precision: str) -> dict[str, float]:
    """Median milliseconds of each network for one picture, and their sum; each is run by itself, and waited for."""
    import torch

    from distill_core.networks.diffusers_io import load_denoiser

    denoiser: Any = load_denoiser(folder, device=device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    for network in (denoiser.network, denoiser.codec):
        torch.nn.Module.to(network, dtype)  # diffusers' own warns
        network.to(memory_format=torch.channels_last)
    image, cond = denoiser.image, denoiser.cond
    latent = torch.randn(1, image.channels, image.height, image.width, **like)
    embeds = torch.randn(1, cond.max_tokens, cond.embed_dim, **like)
    time_step = torch.full((1,), 999.0, device=device)
    tokens = torch.zeros(1, cond.max_tokens, dtype=torch.long, device=device)
    calls: dict[str, Callable[[], object]] = {
        "text_encoder_ms": lambda: denoiser.text.model(tokens),
        "unet_ms": lambda: denoiser.network(latent, time_step, encoder_hidden_states=embeds),
        "vae_ms": lambda: denoiser.codec.decode(latent),
    }
    with torch.inference_mode():
        medians = {name: _median_ms(call, device) for name, call in calls.items()}
    return {**medians, "sum_ms": sum(medians.values())}


def _median_ms(call: Callable[[], object], device: str) -> float:
    import torch

    times = []
    for _ in range(BARE_RUNS + 3):
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
