"""LPIPS against its definition on a network laid out independently, and its errors."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distill_core import api
from distill_core.errors import DataError, NotFound
from distill_core.metrics.lpips import LPIPS
from distill_core.recipe import load_recipe

CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def features(net):
    """torchvision's `features`, and after which of its modules LPIPS looks."""
    if net == "alex":
        conv = [
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        ]  # fmt: skip
        return nn.Sequential(*conv), (1, 4, 7, 9, 11)
    layers, wide = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(wide, width, 3, padding=1), nn.ReLU()]
            wide = width
    return nn.Sequential(*layers), (3, 8, 15, 22, 29)


def write(folder, net):
    torch.manual_seed(0)
    backbone, looks = features(net)
    folder.mkdir(exist_ok=True)
    names = {"alex": "alexnet", "vgg": "vgg16"}
    save_file(
        {f"features.{k}": v.contiguous() for k, v in backbone.state_dict().items()},
        folder / f"{names[net]}.safetensors",
    )
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS[net])}
    save_file(heads, folder / f"lpips_{net}.safetensors")
    return backbone, looks, heads


@pytest.fixture
def pictures():
    return torch.rand(2, 40, 36, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_distance_is_that_of_the_definition(net, tmp_path, pictures):
    backbone, looks, heads = write(tmp_path, net)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((pictures - mean) / std).permute(
        0, 3, 1, 2
    )  # ImageNet's, to three digits what LPIPS shifts and scales by
    total, found = 0.0, []
    with torch.no_grad():
        for index, module in enumerate(backbone):
            x = module(x)
            if index in looks:
                found.append(x)
    for index, maps in enumerate(found):
        unit = torch.nn.functional.normalize(maps, dim=1)
        weighted = (unit[0] - unit[1]) ** 2 * heads[f"lin{index}.model.1.weight"][0]
        total += float(weighted.sum(0).mean())
    lpips = LPIPS(tmp_path)
    assert lpips.name == f"lpips_{net}"
    assert lpips(pictures[0], pictures[1]) == pytest.approx(total, rel=2e-2)
    assert lpips(pictures[0], pictures[1]) == pytest.approx(lpips(pictures[1], pictures[0]), rel=1e-5)
    assert lpips(pictures[0], pictures[0]) == 0


def test_missing_weights_are_named_and_never_replaced(tmp_path, pictures):
    with pytest.raises(NotFound, match=r"alexnet\.safetensors with lpips_alex\.safetensors"):
        LPIPS(tmp_path)
    write(tmp_path, "alex")
    save_file({"lin0.model.1.weight": torch.rand(1, 64, 1, 1)}, tmp_path / "lpips_alex.safetensors")
    with pytest.raises(DataError, match=r"lin1\.model\.1\.weight"):
        LPIPS(tmp_path)
    (tmp_path / "lpips_alex.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        LPIPS(tmp_path)


def test_pictures_too_small_are_refused(tmp_path, pictures):
    write(tmp_path, "alex")
    with pytest.raises(DataError, match="at least 32"):
        LPIPS(tmp_path)(pictures[0, :16], pictures[1, :16])


TINY = {
    "method": "radiance_field",
    "steps": 2,
    "batch_size": 32,
    "threads": 1,
    "data": {"name": "procedural_scene", "num_views": 2, "num_test_views": 1, "size": 32},
    "network": {"name": "mlp", "args": {"width": 8, "layers": 1}},
    "config": {"max_samples": 256, "num_steps": 16, "grid_resolution": 8},
}


def test_a_field_is_measured_where_the_weights_are_given(tmp_path):
    where = api.context(tmp_path / "store", tmp_path / "cache")
    plain = api.train(load_recipe(TINY), tmp_path / "plain", where).figures
    assert not [name for name in plain if name.startswith("lpips")]
    write(tmp_path / "weights", "alex")
    measured = load_recipe(TINY, {"evaluate.lpips": str(tmp_path / "weights")})
    assert api.train(measured, tmp_path / "measured", where).figures["lpips_alex"] > 0
    with pytest.raises(NotFound, match="LPIPS weights"):  # said before the training
        api.train(load_recipe(TINY, {"evaluate.lpips": str(tmp_path)}), tmp_path / "wrong", where)
    assert not (tmp_path / "wrong" / "metrics.jsonl").exists()
