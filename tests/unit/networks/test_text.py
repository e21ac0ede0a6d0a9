"""Text encoders: what is kept changes no bit, and a small one made from a data set's own words."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch

from distill_core.errors import ArtifactError
from distill_core.networks import prompts as texts
from distill_core.networks.diffusers_io import load_denoiser
from distill_core.networks.text import load_text_encoder, new_text_encoder
from tests.helpers import tiny_sdxl, tiny_text_to_image

PROMPTS = ["a cat", "a dog", "", "a cat", "two very long cats and dogs"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("text")
    return {"sd": tiny_text_to_image(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl")}


@pytest.fixture(params=["sd", "sdxl"])
def encoder(request, folders):
    return load_text_encoder(folders[request.param])


def counted(encoder):
    """Prompts that reach the model, from now on."""
    seen = []
    encoder.model.register_forward_hook(lambda *_: seen.append(1))
    return seen


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_kept_embedding_is_bit_identical_to_one_made_anew(encoder):
    first = encoder.encode(PROMPTS)
    kept = encoder.encode(PROMPTS)
    encoder._embedded.cache_clear()
    alone = [encoder._embed(prompt, "cpu") for prompt in PROMPTS]
    assert same(first, kept)
    assert same(first, {name: torch.cat([cond[name] for cond in alone]) for name in first})


def test_a_prompt_is_encoded_once_whatever_batch_it_is_in(encoder):
    seen = counted(encoder)
    encoder.encode(PROMPTS)
    assert len(seen) == 4
    encoder.encode(PROMPTS[::-1])
    encoder.null()
    assert len(seen) == 4


def test_the_prompt_used_longest_ago_is_forgotten_first(folders, monkeypatch):
    plain = load_text_encoder(folders["sd"])
    monkeypatch.setattr(texts, "CACHE_BYTES", 2 * 4 * plain.max_tokens * plain.embed_dim)
    encoder = load_text_encoder(folders["sd"])
    seen = counted(encoder)
    encoder.encode(["a", "b", "a", "c", "a"])  # b goes
    assert len(seen) == 3
    encoder.encode(["b"])
    assert len(seen) == 4


def test_an_encoder_that_moves_forgets_what_it_kept(encoder):
    seen = counted(encoder)
    encoder.encode(["a"])
    encoder.to("cpu").encode(["a"])
    assert len(seen) == 2


def test_neither_autocast_nor_inference_mode_changes_what_is_kept(encoder):
    expected = encoder.encode(["a cat"])
    encoder.to("cpu")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder.encode(["a cat"])
    kept = encoder.encode(["a cat"])
    assert same(kept, expected)
    weight = torch.ones(kept["prompt_embeds"].shape[-1], requires_grad=True)
    (kept["prompt_embeds"] @ weight).sum().backward()  # a tensor of inference mode would refuse


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_guidance_does_not_run_the_encoder_again(folders, name):
    denoiser = load_denoiser(folders[name])
    cond = denoiser.encode_prompts(["a cat", "a dog"])
    seen = counted(denoiser.text)
    x, sigma = torch.randn(2, 4, 8, 8), torch.ones(2)
    with torch.no_grad():
        first = denoiser.guided(x, sigma, cond, 3.0)
        used = len(seen)
        assert torch.equal(copy.deepcopy(denoiser).guided(x, sigma, cond, 3.0), first)
        assert torch.equal(denoiser.guided(x, sigma, cond, 3.0), first)
    assert used == 1
    assert len(seen) == used


@pytest.mark.parametrize("zero_null", [True, False])
def test_sdxl_encodes_as_its_pipeline_does(tmp_path, zero_null):
    folder = tiny_sdxl(tmp_path / "sdxl", zero_null=zero_null)
    denoiser = load_denoiser(folder)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS, negative_prompt=None)
    ours, null = denoiser.encode_prompts(PROMPTS), denoiser.null_cond(len(PROMPTS))
    values = ours["prompt_embeds"], null["prompt_embeds"], ours["pooled_embeds"], null["pooled_embeds"]
    for mine, other in zip(values, theirs):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert bool(null["prompt_embeds"].any()) != zero_null


def test_a_missing_part_is_named_in_a_sentence(folders, tmp_path):
    load_denoiser(folders["sdxl"]).save(tmp_path / "xl")
    (tmp_path / "xl" / "text_encoder_2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="text encoder or tokenizer in .* is damaged or incomplete"):
        load_text_encoder(tmp_path / "xl")


WORDS = ["red circle", "circle", "Grüne Ellipse, 2 red", "squared square"]


def test_each_word_of_the_data_is_one_token_and_other_words_are_spelt():
    encoder = new_text_encoder(WORDS)
    ids = encoder.tokenizer(["red circle", "RED  Circle", "squared square", "grüne ellipse", "rad"]).input_ids
    assert [len(found) for found in ids] == [4, 4, 4, 4, 5]
    assert ids[0] == ids[1]
    assert encoder.max_tokens == 7  # "grüne ellipse , 2 red" between beginning and end
    assert len(set(map(tuple, ids))) == 4


def test_the_words_alone_decide_the_tokens_and_the_generator_the_weights():
    torch.manual_seed(0)
    one = new_text_encoder(WORDS)
    torch.manual_seed(0)
    two = new_text_encoder([*reversed(WORDS), "red"])
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    assert same(one.encode(WORDS), two.encode(WORDS))
    assert not any(p.requires_grad for p in one.model.parameters())


def test_an_encoder_made_from_words_is_saved_as_diffusers_keeps_it(tmp_path):
    encoder = new_text_encoder(WORDS)
    encoder.save(tmp_path)
    assert same(load_text_encoder(tmp_path).encode(WORDS), encoder.encode(WORDS))
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"].startswith("CLIPTokenizer")


def test_a_tokenizer_without_its_words_is_refused_instead_of_reading_every_word_as_unknown(tmp_path):
    folder = tiny_text_to_image(tmp_path / "pipeline")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_text_encoder(folder)
