"""Gaussians as the PLY of 3DGS, which viewers read, and back.

One vertex is x y z nx ny nz, f_dc_* and f_rest_* (SH coefficients, of all bands of red first), opacity (logit), scale_*
(logarithm), rot_* (w, x, y, z); float32, little-endian. colour = 0.28209 f_dc + 0.5.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_core.errors import DataError
from distill_core.radiance.export.frame import Similarity, to_input
from distill_core.radiance.light.spherical_harmonics import spherical_harmonics
from distill_core.radiance.scenes.gaussians import GaussianModel, GaussianScene

HEADER_BYTES = 2**16  # at most
SH_SIZES = {0: 0, 9: 1, 24: 2, 45: 3}  # f_rest properties by degree


def save_splats(scene: GaussianScene, path: Path) -> None:
    """Write `scene` to `path`, in the input's frame."""
    gaussians = moved(scene.gaussians, to_input(scene.spec))
    rest = gaussians.sh[:, 1:].transpose(1, 2).flatten(1)  # channel-major
    columns = [
        gaussians.means,
        torch.zeros_like(gaussians.means),
        gaussians.sh[:, 0],
        rest,
        gaussians.logit_opacity[:, None],
        gaussians.log_scales,
        torch.nn.functional.normalize(gaussians.quats, dim=-1),
    ]
    table = torch.cat([column.detach().float().cpu() for column in columns], -1)
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(table)}",
        *(f"property float {name}" for name in _names(rest.shape[1])),
        "end_header",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join([*header, ""]).encode("ascii") + table.numpy().astype("<f4").tobytes())


def load_splats(path: Path) -> GaussianModel:
    """The Gaussians of a 3DGS PLY file, in the file's own frame.

    Raises:
        DataError: no such file, of another layout, cut off, or with NaN or infinity.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    names, count, body = _header(data, path)
    rest = sum(name.startswith("f_rest_") for name in names)
    missing = [name for name in _names(rest) if name not in names and name not in ("nx", "ny", "nz")]
    if missing or rest not in SH_SIZES:
        raise DataError(
            f"{path} is no PLY file of 3DGS: it lacks {missing[0] if missing else 'whole SH bands'}"
        )
    if count == 0 or len(set(names)) != len(names):
        raise DataError(f"{path} holds no Gaussians, or names a property twice; export it again")
    if len(data) < body + 4 * count * len(names):
        raise DataError(
            f"{path} is cut off: it holds fewer than the {count} Gaussians that its header counts"
        )
    values = np.frombuffer(data, "<f4", count * len(names), body).reshape(count, len(names))
    table = {name: torch.from_numpy(values[:, index].astype(np.float32)) for index, name in enumerate(names)}

    def columns(prefix: str, size: int) -> Tensor:
        return torch.stack([table[f"{prefix}_{index}"] for index in range(size)], -1)

    sh = columns("f_dc", 3)[:, None]
    if rest:
        sh = torch.cat([sh, columns("f_rest", rest).reshape(count, 3, rest // 3).transpose(1, 2)], 1)
    gaussians = GaussianModel(
        torch.stack([table[axis] for axis in "xyz"], -1),
        columns("scale", 3),
        columns("rot", 4),
        table["opacity"],
        sh,
        torch.zeros(count, 0),
    )
    if not all(bool(torch.isfinite(value).all()) for value in gaussians.tensors().values()):
        raise DataError(f"{path} holds NaN or infinity")
    return gaussians


@torch.no_grad()
def moved(gaussians: GaussianModel, by: Similarity) -> GaussianModel:
    """A copy of `gaussians` after a similarity: the picture through an equally moved camera stays what it was."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(by.rotation.numpy()).as_quat().tolist()
    turn = torch.tensor([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])  # q -> (w, x, y, z) q
    harmonics = turned_harmonics(by.rotation, gaussians.sh_degree + 1).to(gaussians.sh)
    return replace(
        gaussians,
        means=by.points(gaussians.means),
        log_scales=gaussians.log_scales + math.log(by.scale),
        quats=gaussians.quats @ turn.to(gaussians.quats).T,
        sh=torch.einsum("ij,njc->nic", harmonics, gaussians.sh),
    )


def turned_harmonics(rotation: Tensor, bands: int) -> Tensor:
    """T (bands^2, bands^2) with T c the coefficients of d -> f(rotation^T d), where c are those of f.

    Bands of harmonics are closed under rotation, so T follows exactly from enough directions.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    before = spherical_harmonics(directions @ rotation, bands)  # each row is rotation^T d
    solution: Tensor = torch.linalg.lstsq(spherical_harmonics(directions, bands), before).solution
    return solution


def _names(rest: int) -> list[str]:
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{index}" for index in range(3)),
        *(f"f_rest_{index}" for index in range(rest)),
        "opacity",
        *(f"scale_{index}" for index in range(3)),
        *(f"rot_{index}" for index in range(4)),
    ]


def _header(data: bytes, path: Path) -> tuple[list[str], int, int]:
    """Property names, count, and where the values begin."""
    end = data.find(b"end_header\n", 0, HEADER_BYTES)
    lines = data[: max(end, 0)].decode("ascii", "replace").split("\n")
    elements = [line.split() for line in lines if line.startswith("element ")]
    properties = [line.split() for line in lines if line.startswith("property ")]
    plain = [line for line in properties if len(line) == 3 and line[1] in ("float", "float32")]
    if (
        lines[0].strip() != "ply"
        or "format binary_little_endian 1.0" not in (line.strip() for line in lines)
        or [element[1:2] for element in elements] != [["vertex"]]
        or len(elements[0]) != 3
        or not elements[0][2].isdecimal()
        or len(plain) != len(properties)
    ):
        raise DataError(
            f"{path} is no PLY file of 3DGS: it must be binary little-endian, with float properties of vertices only"
        )
    return [line[2] for line in plain], int(elements[0][2]), end + len(b"end_header\n")
