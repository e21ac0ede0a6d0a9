"""`make prove-triton`: an unmodified tritonclient lists, describes and runs every model, over TLS with a token.

What it gets equals what `distillery.v1` answers, byte for byte, also with the noise of its seeds as latents. The store
holds a student and a guided teacher of classes, a scene, and a text-to-image student.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from distill_core.artifacts import ArtifactStore, Manifest, SamplerSpec
from distill_core.diffusion.noise import unit_normal
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.radiance.cameras.camera import orbit_camera
from distillery_sampler.client import SamplerClient
from tests.helpers import tiny_text_to_image
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser, teacher_spec
from tests.services.sampler.test_render import cloud, publish_cloud
from tests.services.stack.tls import Certificates, make_certificates

TOKEN = "open sesame"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
PROMPTS = ["a cat", "zwölf Hunde", ""]
COUNT = 3


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SamplerProcess, Certificates]]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("triton")
    store = ArtifactStore(root / "store")
    publish_denoiser(store, root / "student")
    publish_denoiser(store, root / "teacher", name="teacher", sampler=teacher_spec())
    publish_cloud(store, root / "cloud", cloud(num_steps=4))
    denoiser = load_denoiser(tiny_text_to_image(root / "pipeline"))
    denoiser.sampler = SamplerSpec.few_step((10.0,), noise_scale=10.0)
    denoiser.save(root / "prompted")
    store.publish(root / "prompted", Manifest(name="prompted", **described(denoiser)))
    certificates = make_certificates(root)
    (root / "tokens").write_text(f"app:{hashlib.sha256(TOKEN.encode()).hexdigest()}:use\n")
    settings = certificates.server() | {"DISTILLERY_TOKENS_FILE": str(root / "tokens")}
    del settings["DISTILLERY_TLS_CLIENT_CA"]  # the token says who it is
    with SamplerProcess(store.url, settings) as process:
        yield process, certificates


def tensors(values: dict[str, np.ndarray]) -> list[InferInput]:
    inputs = []
    for name, value in values.items():
        inputs.append(InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def poses() -> tuple[np.ndarray, np.ndarray]:
    cameras = [orbit_camera(40.0 * i, 20.0, 3.0, fov_degrees=40.0, width=24, height=16) for i in range(COUNT)]
    return (
        np.stack([camera.c2w.numpy() for camera in cameras]).astype(np.float32),
        np.array([(c.fx, c.fy, c.cx, c.cy) for c in cameras], np.float32),
    )


def inputs_for(described: dict[str, Any]) -> dict[str, np.ndarray]:
    """Values for what a model's metadata names."""
    c2w, intrinsics = poses()
    known = {
        "seed": np.arange(7, 7 + COUNT, dtype=np.uint64)[:, None],
        "class_label": np.arange(COUNT, dtype=np.int64)[:, None],
        "prompt": np.array([[text.encode()] for text in PROMPTS], dtype=object),
        "negative_prompt": np.array([[text.encode()] for text in reversed(PROMPTS)], dtype=object),
        "guidance_scale": np.full((COUNT, 1), 2.5, np.float32),
        "pose": c2w,
        "intrinsics": intrinsics,
    }
    # noise is said in one of two ways
    return {t["name"]: known[t["name"]] for t in described["inputs"] if t["name"] != "latents"}


def with_latents(described: dict[str, Any], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same request by the noise of its seeds."""
    (shape,) = ([int(side) for side in t["shape"][1:]] for t in described["inputs"] if t["name"] == "latents")
    latents = np.stack([unit_normal(int(seed), 0, 0, tuple(shape)) for seed in values["seed"].ravel()])
    return {"latents": latents, **{name: value for name, value in values.items() if name != "seed"}}


def ours(client: SamplerClient, name: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same through `distillery.v1`."""
    if "pose" in values:
        views = [
            client.render(name, pose=pose, intrinsics=pinhole, width=24, height=16, outputs=("rgb", "depth"))
            for pose, pinhole in zip(values["pose"], values["intrinsics"].tolist())
        ]
        return {"rgb": np.stack([v.rgb for v in views]), "depth": np.stack([v.depth for v in views])}
    options: dict[str, Any] = {"seeds": values["seed"].ravel().tolist()}
    if "class_label" in values:
        options["class_labels"] = values["class_label"].ravel().tolist()
    if "prompt" in values:
        options |= {"prompts": PROMPTS, "negative_prompts": PROMPTS[::-1]}
    if "guidance_scale" in values:
        options["guidance"] = 2.5
    return {"images": np.stack(client.generate(name, **options))}


def test_tritonclient_lists_describes_and_runs_every_model_over_tls_with_a_token(guarded):
    process, certificates = guarded
    ca = certificates["ca.pem"]
    triton = InferenceServerClient(process.address, ssl=True, root_certificates=str(ca))
    with pytest.raises(InferenceServerException, match="token is needed"):
        triton.get_model_repository_index()
    listed = triton.get_model_repository_index(HEADERS, as_json=True)["models"]
    with SamplerClient(process.address, token=TOKEN, ca=ca) as client, triton:
        assert [model["name"] for model in listed] == [model.name for model in client.models()]
        assert [model["name"] for model in listed] == ["cloud", "digits", "prompted", "teacher"]
        for name in (model["name"] for model in listed):
            assert triton.is_model_ready(name, headers=HEADERS)
            described = triton.get_model_metadata(name, headers=HEADERS, as_json=True)
            config = triton.get_model_config(name, headers=HEADERS, as_json=True)["config"]
            assert [t["name"] for t in config["input"]] == [t["name"] for t in described["inputs"]]
            values = inputs_for(described)
            answer = triton.infer(name, tensors(values), headers=HEADERS)
            wanted = ours(client, name, values)
            assert {tensor["name"] for tensor in described["outputs"]} == set(wanted)
            for output, array in wanted.items():
                assert answer.as_numpy(output).tobytes() == array.tobytes(), f"{name}.{output}"
                assert len(np.unique(array)) > COUNT
            if "seed" in values:
                given = triton.infer(name, tensors(with_latents(described, values)), headers=HEADERS)
                assert given.as_numpy("images").tobytes() == wanted["images"].tobytes(), name
            stats = triton.get_inference_statistics(name, headers=HEADERS).model_stats[0]
            assert stats.inference_count == (3 if "seed" in values else 2) * COUNT
