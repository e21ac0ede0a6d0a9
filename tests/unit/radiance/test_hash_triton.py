"""The Triton hash encoding against the PyTorch one: interpreted on a CPU here, compiled where there is a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from distill_core.networks.fields.hash import HashConfig, HashField, runs_triton
from tests.helpers import REPOSITORY

INTERPRETED = """
import torch
from distill_core.networks.fields import hash_triton
from tests.unit.radiance.test_hash_triton import compare, field, points

compare(hash_triton, "cpu", features=2)
compare(hash_triton, "cpu", features=3)
assert hash_triton.works(torch.device("cpu"))
made = field(2)
empty = hash_triton.encode(torch.zeros(0, 3), made.table, made.levels)
assert empty.shape == (0, 8)
scales, places = torch.tensor([7.0]), torch.tensor([[9, 0, 0, 1023]], dtype=torch.int32)
given = (points(40).requires_grad_(True), made.table.detach().requires_grad_(True), scales, places)
torch.library.opcheck(hash_triton.hash_encode, given, test_utils=("test_schema", "test_faketensor"))
"""


def field(features):
    torch.manual_seed(0)
    config = HashConfig(levels=4, features=features, log2_table_size=10, max_resolution=64)
    made = HashField(config, 1.0)
    torch.nn.init.normal_(made.table)
    assert {level.dense for level in made.levels} == {True, False}
    return made


def points(count=300):
    return (
        torch.rand(count, 3, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    )  # some outside of the box


def compare(hash_triton, device, *, features):
    """Values, and the gradients of table and positions."""
    reference, unit = field(features), points().requires_grad_(True)
    wanted = reference.encode(unit)
    pulled = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    wanted_gradients = torch.autograd.grad(wanted, [unit, reference.table], pulled)
    table = reference.table.detach().to(device).requires_grad_(True)
    there = unit.detach().to(device).requires_grad_(True)
    found = hash_triton.encode(there, table, reference.levels)
    gradients = torch.autograd.grad(found, [there, table], pulled.to(device))
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0].cpu(), wanted_gradients[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradients[1].cpu(), wanted_gradients[1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_interpreted_kernels_equal_pytorch():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [REPOSITORY, *sys.path])),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_cpu_keeps_the_pytorch_version_also_when_it_is_compiled():
    assert not runs_triton(torch.device("cpu"))
    made, unit = field(2), points()
    compiled = torch.compile(made.encode, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(unit), made.encode(unit))


@pytest.mark.gpu
def test_compiled_kernels_equal_pytorch_and_are_chosen():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from distill_core.networks.fields import hash_triton

    compare(hash_triton, "cuda", features=2)
    compare(hash_triton, "cuda", features=3)
    assert runs_triton(torch.device("cuda"))
