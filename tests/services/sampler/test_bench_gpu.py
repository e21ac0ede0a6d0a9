"""The GPU bench: its plumbing with tiny networks on the CPU, and its refusal where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import CONCURRENCY, SD15, Size, gpu_rows, measure_gpu, require_device
from distill_core.errors import Unavailable

TINY = Size(
    "tiny",
    8,
    {
        "block_out_channels": (16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 8},
    {
        "vocab_size": 1000,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
    },
)


def test_a_student_is_served_and_timed_beside_its_bare_forwards(tmp_path):
    said: list[str] = []
    report = measure_gpu(tmp_path, 0.1, said.append, size=TINY, device="cpu", precision="fp32")
    assert [load["concurrency"] for load in report["loads"]] == list(CONCURRENCY)
    assert all(load["requests"] >= load["concurrency"] for load in report["loads"])
    bare = report["bare"]
    assert bare["sum_ms"] == pytest.approx(bare["text_encoder_ms"] + bare["unet_ms"] + bare["vae_ms"])
    assert report["p50_over_bare"] == report["loads"][0]["p50_ms"] / bare["sum_ms"]
    assert report["picture"] == 16
    rows = gpu_rows(report)
    assert len(rows) == 1 + len(CONCURRENCY)
    assert rows[0][-1] == 1.0
    assert any("SERVING after" in line for line in said)


def test_without_a_gpu_it_is_refused_in_a_sentence(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    from benchmarks.__main__ import app

    with pytest.raises(Unavailable, match="needs an NVIDIA GPU and a CUDA build of torch"):
        require_device("cuda")
    done = CliRunner().invoke(app, ["overview", "--only", "gpu", "--out", str(tmp_path)])
    assert isinstance(done.exception, Unavailable)
    wrong = CliRunner().invoke(app, ["overview", "--only", "gpus", "--out", str(tmp_path)])
    assert "choose from steps" in str(wrong.exception)


@pytest.mark.gpu
def test_a_student_of_the_size_of_sd15_is_measured_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    report = measure_gpu(tmp_path, 5, print, size=SD15)
    print(report)
    assert report["picture"] == 512
