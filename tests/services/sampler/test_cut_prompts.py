"""A prompt that is longer than its model reads is cut, and everybody who asked is told."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
from tritonclient.grpc import InferenceServerClient, InferInput

from distill_core.artifacts import ArtifactStore, Manifest
from distill_core.kinds.cards import described
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.text import load_text_encoder
from distill_service.settings import settings
from distillery_cli.app import main
from distillery_sampler.backends.tokens import PromptTokens
from distillery_sampler.client import AsyncSamplerClient
from tests.helpers import tiny_sdxl, tiny_text_to_image
from tests.services.sampler.helpers import SamplerProcess

FITS, LONG = "abcdef", "abcdefg"  # of 8 tokens, two mark the beginning and the end
SAID = "2 of 3 pictures have a prompt of more than the 8 tokens that prompted@1 reads, and its end was left out: 1, 2"


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    root = tmp_path_factory.mktemp("cut")
    folder = tiny_text_to_image(root / "pipeline")
    store = ArtifactStore(root / "store")
    store.publish(folder, Manifest(name="prompted", **described(load_denoiser(folder))))
    with SamplerProcess(store.url) as running:
        with running.client(timeout_s=250) as client:  # loads it, which may take long beside other work
            client.generate("prompted", prompts=[FITS], num_steps=1)
        yield running


@pytest.mark.parametrize("make", [tiny_text_to_image, tiny_sdxl])
def test_cut_is_what_changes_nothing_of_what_is_read(make, tmp_path):
    text = load_text_encoder(make(tmp_path / "pipeline"))
    for each in text.reads():
        text.parts[each.tokenizer].backend_tokenizer.save(
            str(tmp_path / "pipeline" / each.tokenizer / "tokenizer.json")
        )
    tokens = PromptTokens(tmp_path / "pipeline", text.reading)
    for prompt, cut in (
        (FITS, False),
        (LONG, True),
        ("", False),
        ("é" * 3, False),
        ("猫" * 9, True),
        ("a b " * 20, True),
    ):
        same = torch.equal(
            text.encode([prompt])["prompt_embeds"], text.encode([f"{prompt} z"])["prompt_embeds"]
        )
        assert text.cuts(prompt) is tokens.cuts(prompt) is cut, prompt
        assert same or not cut  # what follows a cut is not read either


def test_the_summary_names_the_pictures(sampler):
    with sampler.client() as client:
        with pytest.warns(UserWarning, match="2 of 3 pictures") as caught:
            client.generate("prompted", prompts=[FITS, LONG, LONG + "h"], num_steps=1)
        assert str(caught[0].message) == SAID
        with pytest.warns(UserWarning, match="1 of 1 pictures"):
            list(
                client.generate_stream(
                    "prompted", prompts=[FITS], negative_prompts=[LONG], guidance=2.0, num_steps=1
                )
            )
        told = []
        client.generate("prompted", prompts=[FITS, FITS], num_steps=1, on_summary=told.append)
        assert (list(told[0].cut_prompts), told[0].prompt_tokens) == ([], 8)

    async def ask() -> list[int]:
        told = []
        async with AsyncSamplerClient(sampler.address) as client:
            await client.generate("prompted", prompts=[LONG], num_steps=1, on_summary=told.append)
            async for _ in client.generate_stream(
                "prompted", prompts=[FITS, LONG], num_steps=1, on_summary=told.append
            ):
                pass
        return [list(summary.cut_prompts) for summary in told]

    assert asyncio.run(ask()) == [[0], [1]]


def test_the_command_warns(sampler, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLERY_SAMPLER_PORT", sampler.address.rpartition(":")[2])
    settings.cache_clear()
    ask = ["generate", "prompted", "--steps", "1", "--out", str(tmp_path / "x.png"), "--json"]
    assert main([*ask, "--prompt", FITS, "--prompt", LONG, "--prompt", LONG]) == 0
    said = capsys.readouterr()
    assert f"warning: {SAID}" in said.err.splitlines()
    assert json.loads(said.out)["cut_prompts"] == [1, 2]
    assert main([*ask, "--prompt", FITS]) == 0
    assert "warning" not in capsys.readouterr().err
    settings.cache_clear()


def test_a_kserve_client_finds_it_in_the_reply(sampler):
    def cut(*prompts: str) -> str | None:
        values = {"seed": np.arange(len(prompts), dtype=np.uint64), "prompt": np.array(prompts, dtype=object)}
        inputs = []
        for name, kind in (("seed", "UINT64"), ("prompt", "BYTES")):
            inputs.append(InferInput(name, [len(prompts), 1], kind))
            inputs[-1].set_data_from_numpy(values[name][:, None])
        reply = InferenceServerClient(sampler.address).infer("prompted", inputs, parameters={"num_steps": 1})
        return dict(reply.get_response().parameters).get("cut_prompts")

    assert cut(FITS, LONG).string_param == "1"
    assert cut(FITS) is None
