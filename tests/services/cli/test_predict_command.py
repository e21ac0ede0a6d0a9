"""`distillery predict`: pictures and arrays in, classes and outputs out, against a live sampler."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from distill_core.artifacts import ArtifactStore
from distill_service.settings import settings
from distillery_cli.app import main
from tests.services.sampler.helpers import SamplerProcess, publish_denoiser
from tests.services.sampler.predictor_helpers import (
    CLASSES,
    SHAPE,
    classifier,
    publish_classifier,
    publish_mixed,
)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    store = ArtifactStore(root / "store")
    publish_classifier(store, root / "animals", classifier(5))
    publish_mixed(store, root / "mixed")
    publish_denoiser(store, root / "digits")
    with SamplerProcess(store.url, {"DISTILLERY_SAMPLER_PRELOAD": '["animals"]'}) as process:
        yield process


@pytest.fixture
def ask(sampler, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_SAMPLER_PORT", str(sampler.port))
    settings.cache_clear()

    def command(*arguments: object) -> tuple[int, str, str]:
        code = main(["predict", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    yield command
    settings.cache_clear()


def save_picture(path, seed: int, width: int = SHAPE[2], height: int = SHAPE[1]) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def probabilities(pixels: np.ndarray) -> np.ndarray:
    image = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)) / 127.5 - 1
    with torch.no_grad():
        return classifier(5).network(image).softmax(1)[0].numpy()


def test_pictures_get_their_likeliest_classes_by_name(ask, tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    wanted = [probabilities(save_picture(path, seed)) for seed, path in enumerate(paths)]
    code, out, _ = ask("animals", *paths, "--top", 2, "--json")
    said = json.loads(out)
    assert (code, said["model"], said["function"]) == (0, "animals@1", "predict")
    assert [item["item"] for item in said["items"]] == list(map(str, paths))
    for item, shares in zip(said["items"], wanted, strict=True):
        best = np.argsort(-shares)[:2]
        assert [one["class"] for one in item["classes"]] == [CLASSES[k] for k in best]
        np.testing.assert_allclose([one["probability"] for one in item["classes"]], shares[best], rtol=1e-3)
    code, out, _ = ask("animals", paths[0])
    assert code == 0
    assert CLASSES[int(np.argmax(wanted[0]))] in out


def test_a_picture_of_another_size_is_resized_only_if_that_is_asked_for(ask, tmp_path):
    save_picture(tmp_path / "large.png", 1, width=40, height=24)
    code, _, said = ask("animals", tmp_path / "large.png")
    assert code == 65
    assert "is 40x24, the model takes 10x6; add --resize" in " ".join(said.split())
    code, out, _ = ask("animals", tmp_path / "large.png", "--resize", "--json", "--top", 4)
    assert code == 0
    assert sum(one["probability"] for one in json.loads(out)["items"][0]["classes"]) == pytest.approx(1)


def test_arrays_of_a_file_are_sent_as_they_are_and_outputs_written(ask, tmp_path):
    images = np.random.default_rng(2).uniform(-1, 1, (4, *SHAPE)).astype(np.float32)
    save_file({"image": images}, tmp_path / "rows.safetensors")
    code, out, _ = ask(
        "animals",
        tmp_path / "rows.safetensors",
        "--function",
        "features",
        "--out",
        tmp_path / "o.safetensors",
    )
    assert code == 0
    assert len([line for line in out.splitlines() if "activations:" in line]) == 4
    with torch.no_grad():
        wanted = classifier(5).network.features(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(
        load_file(tmp_path / "o.safetensors")["activations"], wanted, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("digits", "p.png"), 2, "digits@1 is a denoiser and has no functions"),
        (("mixed", "p.png"), 2, "takes no pictures alone but x float16 [2, 3], gain float64 []"),
        (("animals", "p.png", "--function", "nothing"), 2, "it has predict, features"),
        (("animals", "none.png"), 65, "none.png does not exist"),
        (("animals", "text.png"), 65, "text.png is not a picture that can be read"),
        (("animals", "text.safetensors"), 65, "cannot be read as .safetensors"),
        (("animals", "scalar.safetensors"), 2, "image is a single value"),
        (("animals", "text.safetensors", "p.png"), 2, "name it alone"),
        (("animals", "p.png", "--out", "o.npz"), 2, "end it in .safetensors"),
        (("nobody", "p.png"), 67, "nobody"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(ask, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "p.png", 1)
    for name in ("text.png", "text.safetensors"):
        (tmp_path / name).write_text("no such thing")
    save_file({"image": np.array(1, np.float32)}, tmp_path / "scalar.safetensors")
    found = ask(*arguments)
    assert found[0] == code
    assert said in " ".join(found[2].split())
    assert "Traceback" not in found[2]
