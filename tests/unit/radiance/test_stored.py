"""What every kind of scene refuses to read, and that it says where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_core.config import Config
from distill_core.errors import ArtifactError, DataError
from distill_core.radiance.export.scene import import_splats
from distill_core.radiance.scenes.storage import WEIGHTS, fill, read_description, read_tensors, write_scene


class Wide(Config):
    width: int


def made(described: Wide) -> nn.Linear:
    return nn.Linear(described.width, 2)


def read(folder):
    _, module = read_description(folder, Wide, made, what="a line")
    fill(module, read_tensors(folder), folder)
    return module


def test_what_is_written_is_read(tmp_path):
    line = nn.Linear(3, 2)
    write_scene(tmp_path, Wide(width=3), line.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(read(tmp_path).parameters(), line.parameters()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tmp_path, bad):
    line = nn.Linear(3, 2)
    with torch.no_grad():
        line.bias[1] = bad
    write_scene(tmp_path, Wide(width=3), line.state_dict())
    with pytest.raises(ArtifactError, match=r"model.safetensors holds NaN or infinity"):
        read(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 60])
def test_a_file_that_is_cut_off_is_refused(tmp_path, kept):
    write_scene(tmp_path, Wide(width=3), nn.Linear(3, 2).state_dict())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:kept])
    with pytest.raises(ArtifactError, match=r"model.safetensors is missing or damaged"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"width": "wide"}', '{"width": -3}', '{"wide": 3}'])
def test_a_description_that_describes_nothing_is_refused(tmp_path, text):
    write_scene(tmp_path, Wide(width=3), nn.Linear(3, 2).state_dict())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config.json does not describe a line"):
        read_description(tmp_path, Wide, positive, what="a line")


def positive(described: Wide) -> nn.Linear:
    if described.width < 1:
        raise ValueError(f"width is {described.width}")
    return made(described)


def test_tensors_of_another_module_are_refused(tmp_path):
    write_scene(tmp_path, Wide(width=4), nn.Linear(3, 2).state_dict())
    with pytest.raises(ArtifactError, match=r"is not what config.json describes: .*size mismatch"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("count", "names", "sentence"),
    [
        ("element vertex", "x y z", "no PLY file"),
        ("element", "x y z", "no PLY file"),
        ("element vertex -1", "x y z", "no PLY file"),
        ("element vertex 0", "all", "holds no Gaussians"),
        ("element vertex 1", "all x", "names a property twice"),
        ("element vertex 9999999999999", "all", "cut off"),
    ],
)
def test_a_ply_file_that_lies_is_refused(tmp_path, count, names, sentence):
    whole = "x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    properties = [f"property float {name}" for name in names.replace("all", whole).split()]
    header = ["ply", "format binary_little_endian 1.0", count, *properties, "end_header", ""]
    (tmp_path / "a.ply").write_bytes("\n".join(header).encode() + bytes(100))
    with pytest.raises(DataError, match=sentence):
        import_splats(tmp_path / "a.ply")
