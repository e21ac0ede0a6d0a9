"""What a GPU is given: fixed sizes, bfloat16, recorded graphs. On a CPU; what is marked `gpu` needs one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.kinds.cards import described
from distill_core.networks.adapters import LoraDenoiser
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import LoraConfig, NetworkConfig
from distillery_sampler.backends.fixed import OneThread
from distillery_sampler.backends.torch_backend import TorchGenerator
from distillery_sampler.backends.torch_device import Replayed
from distillery_sampler.engine.requests import GenerateRequest, ImageItem, ImageKey
from tests.helpers import tiny_text_to_image
from tests.services.sampler.helpers import answer

LABELS = (3, 1, 4, 1, 5)
WANTED = GenerateRequest("unet", class_labels=LABELS, seed=7, num_steps=2)
TORCH = {"backend": "torch", "instances": 1, "max_batch": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    """A small UNet, an adapter over it, and a text-to-image model."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("gpu")
    store = ArtifactStore(root / "store")
    args = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    network = NetworkConfig(name="UNet2DModel", args=args)
    denoiser = build_denoiser(network, parameterisation="edm", shape=(1, 8, 8), num_classes=10, num_steps=4)
    denoiser.save(root / "unet")
    store.publish(root / "unet", Manifest(name="unet", **described(denoiser)))
    base = load_denoiser(store.fetch("unet"))
    base.ref = "unet@1"
    lora = LoraDenoiser(base, LoraConfig(rank=2, alpha=2.0, targets=["conv1"]))
    with torch.no_grad():
        for value in lora.parameters():
            value.normal_(std=0.1)
    lora.form = "adapter"
    lora.save(root / "lora")
    store.publish(root / "lora", Manifest(name="lora", **described(lora)))
    prompted = load_denoiser(tiny_text_to_image(root / "pipeline"))
    store.publish(root / "pipeline", Manifest(name="prompted", **described(prompted)))
    return store


def test_filled_up_batches_of_torch_differ_by_one_grey_level_at_most(store, tmp_path):
    (plain,) = answer(store, tmp_path, WANTED, **TORCH)
    (padded,) = answer(store, tmp_path, WANTED, **TORCH, buckets=(2, 4))
    grey = [np.rint((pictures + 1) * 127.5) for pictures in (padded, plain)]
    assert np.abs(grey[0] - grey[1]).max() <= 1
    assert padded.shape == plain.shape == (5, 1, 8, 8)


@pytest.mark.parametrize(
    "request_",
    [
        WANTED,
        GenerateRequest("prompted", prompts=("a", "b"), seed=1, guidance=2.0),
        GenerateRequest("lora", class_labels=LABELS),
    ],
    ids=lambda request: request.model,
)
def test_bfloat16_is_near_float32_and_is_not_float32(store, tmp_path, request_):
    (exact,) = answer(store, tmp_path, request_, **TORCH)
    (rounded,) = answer(store, tmp_path, request_, **TORCH, precision="bf16")
    assert rounded.dtype == np.float32
    difference = np.abs(rounded - exact)  # random weights overshoot: a few pixels are anywhere
    assert difference.max() > 0
    assert np.quantile(difference, 0.9) < 0.05


def test_an_adapter_in_bfloat16_leaves_its_bases_float32_weights_alone(store, tmp_path):
    both = [GenerateRequest(name, class_labels=LABELS, seed=7) for name in ("unet", "lora")]
    together = answer(store, tmp_path, *both, **TORCH, precision="bf16")
    for wanted, pictures in zip(both, together, strict=True):
        (alone,) = answer(store, tmp_path, wanted, **TORCH, precision="bf16")
        np.testing.assert_array_equal(pictures, alone)


class Recorded:
    """What a CUDA graph does, on a CPU: it runs the same call over the same tensors again."""

    made = 0

    def __init__(self, call, inputs):
        type(self).made += 1
        self.call, self.inputs, self.output = call, inputs, call(*inputs)

    def replay(self):
        self.output.copy_(self.call(*self.inputs))


def record(call, given):
    graph = Recorded(call, [value.clone() for value in given])
    return graph, graph.inputs, graph.output


def test_a_recording_is_made_once_per_shape_and_answers_as_the_call_does(store):
    denoiser = load_denoiser(store.fetch("unet"))
    replayed = Replayed(denoiser.guided, (1.0, 2.0), record)
    Recorded.made = 0
    torch.manual_seed(0)
    with torch.inference_mode():
        for batch, guidance in ((2, 1.0), (2, 1.0), (3, 1.0), (2, 2.0), (2, 1.7), (2, 1.7)):
            x, sigma = torch.randn(batch, 1, 8, 8), torch.full((batch,), 3.0)
            cond = {"class_label": torch.randint(10, (batch,))}
            torch.testing.assert_close(
                replayed(x, sigma, cond, guidance),
                denoiser.guided(x, sigma, cond, guidance),
                rtol=0,
                atol=1e-5,
            )
    assert Recorded.made == 3  # (2, 1), (3, 1), (2, 2): a client's own scale is not recorded


def test_an_answer_is_not_overwritten_by_the_next_replay(store):
    denoiser = load_denoiser(store.fetch("unet"))
    replayed = Replayed(denoiser.guided, (1.0,), record)
    with torch.inference_mode():
        cond, sigma = {"class_label": torch.zeros(1, dtype=torch.long)}, torch.full((1,), 3.0)
        replayed(torch.zeros(1, 1, 8, 8), sigma, cond, 1.0)
        first = replayed(torch.zeros(1, 1, 8, 8), sigma, cond, 1.0)
        kept = first.clone()
        replayed(torch.ones(1, 1, 8, 8), sigma, cond, 1.0)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_a_network_that_cannot_be_recorded_runs_without(store, caplog):
    def refuse(call, given):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    denoiser = load_denoiser(store.fetch("unet"))
    replayed = Replayed(denoiser.guided, (1.0,), refuse)
    x, sigma, cond = (
        torch.zeros(1, 1, 8, 8),
        torch.full((1,), 3.0),
        {"class_label": torch.zeros(1, dtype=torch.long)},
    )
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(replayed(x, sigma, cond, 1.0), denoiser.guided(x, sigma, cond, 1.0))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "a network cannot be recorded as a CUDA graph, so it runs without: "
        "operation not permitted when stream is capturing"
    ]


def test_a_backend_of_one_thread_is_opened_and_called_there(store):
    import threading

    from distillery_sampler.backends.shared import SharedWeights
    from distillery_sampler.settings import SamplerSettings

    seen: list[str] = []

    class Watched(TorchGenerator):
        def generate(self, key, items):
            seen.append(threading.current_thread().name)
            return super().generate(key, items)

    weights = SharedWeights(lambda ref: store.fetch(ref))
    one = OneThread(
        lambda: Watched(store.fetch("unet"), store.manifest("unet"), SamplerSettings(), weights, threads=1)
    )
    for _ in range(2):
        assert one.generate(ImageKey(1, 1.0), [ImageItem(1, class_label=2)]).shape == (1, 1, 8, 8)
    assert set(seen) == {"device_0"}
    assert sum(one.held().values()) > 1000


# -- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["unet", "prompted", "lora"])
def test_a_gpu_answers_as_the_cpu_does(store, tmp_path, model, precision, graphs):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    given = {"prompts": ("a", "b", "c")} if model == "prompted" else {"class_labels": LABELS}
    wanted = GenerateRequest(model, seed=7, **given)
    (expected,) = answer(store, tmp_path, wanted, **TORCH)
    (found,) = answer(
        store, tmp_path, wanted, **TORCH, device="cuda", precision=precision, cuda_graphs=graphs
    )
    assert np.abs(found - expected).max() < (0.02 if precision == "fp32" else 0.2)


@pytest.mark.gpu
def test_a_network_is_recorded_on_a_gpu_and_its_buckets_are_warm(store, tmp_path, caplog):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    answer(store, tmp_path, WANTED, backend="torch", device="cuda")
    answer(store, tmp_path, GenerateRequest("prompted", prompts=("a",)), backend="torch", device="cuda")
    assert "cannot be recorded" not in caplog.text
