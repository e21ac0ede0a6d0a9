"""Masks, and encoders on what they leave: what is hidden has no influence, and blocks that nobody asks for rest."""

from __future__ import annotations

import pytest
import torch
import transformers

from distill_core.errors import ConfigError
from distill_core.networks.masked import (
    MaskedEncoder,
    TokenMask,
    hidden_pixel_loss,
    mask_of,
    new_decoder,
    patches_of,
    random_mask,
)
from distill_core.networks.operations import counted_operations
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import NetworkConfig

SHAPE = (3, 12, 12)  # 9 patches of 4 pixels
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
NOISE = torch.tensor(
    [[0.9, 0.1, 0.4, 0.8, 0.2, 0.7, 0.3, 0.6, 0.5], [0.1, 0.9, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5]]
)


def encoder(name: str) -> MaskedEncoder:
    torch.manual_seed(3)
    network = build_network(NetworkConfig(name=name, args=SMALL), {"shape": SHAPE, "num_classes": 5})
    return MaskedEncoder(network.eval().requires_grad_(False), "the network", field="network.name")


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_a_mask_keeps_the_patches_of_least_noise_and_knows_where_each_came_from():
    mask = mask_of(NOISE, 0.6)
    assert mask.kept.tolist() == [[1, 4, 6], [0, 3, 5]]
    assert mask.hidden.tolist()[0] == [True, False, True, True, False, True, False, True, True]
    tokens = torch.arange(2 * 11.0).reshape(2, 11, 1)  # two tokens before the patches
    assert mask.select(tokens).squeeze(2).tolist() == [[0, 1, 3, 6, 8], [11, 12, 13, 16, 18]]
    shuffled = torch.cat([mask.select(tokens)[:, 2:], torch.full((2, 6, 1), -1.0)], dim=1)
    restored = shuffled.gather(1, mask.restore[..., None])
    assert torch.equal(restored[~mask.hidden], tokens[:, 2:][~mask.hidden])


@pytest.mark.parametrize(("ratio", "count"), [(0.75, 4), (0.8, 3), (0.95, 1), (0.6, 6)])
def test_the_number_of_seen_patches_is_the_share_rounded_down_and_never_none(ratio, count):
    assert mask_of(torch.rand(3, 16), ratio).kept.shape == (3, count)


def test_each_picture_of_each_step_has_a_mask_of_its_own():
    reader = encoder("ViTForImageClassification")
    torch.manual_seed(7)
    first, second = (random_mask(reader, pictures(6), 0.6) for _ in range(2))
    assert len({tuple(sorted(kept)) for kept in first.kept.tolist()}) > 1
    assert not torch.equal(first.kept, second.kept)
    torch.manual_seed(7)
    assert torch.equal(random_mask(reader, pictures(6), 0.6).kept, first.kept)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "ViTMAEForPreTraining"]
)
def test_what_is_hidden_has_no_influence_and_without_a_mask_it_is_the_network_s_own_pass(name):
    reader, x = encoder(name), pictures()
    mask = mask_of(NOISE, 0.6)
    seen = reader(x, mask)
    assert seen.shape == (2, reader.prefixes + 3, 24)
    pixels = mask.hidden.reshape(2, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(reader(torch.where(pixels, 0.37, x), mask), seen)
    base, given = reader.base, {"pixel_values": x}
    if name.startswith("ViTMAE"):
        given["noise"] = reader.network.in_order(2)
    torch.testing.assert_close(reader(x), base(**given).last_hidden_state)


def test_later_blocks_are_not_run_and_the_middle_is_what_the_early_stop_gives():
    reader, x = encoder("ViTMAEForPreTraining"), pictures()
    mask, run = mask_of(NOISE, 0.6), []
    for number, layer in enumerate(reader.base.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    early = reader(x, mask, 2)
    assert run == [1, 2]
    last, middle = reader.with_middle(x, mask, 2)
    assert torch.equal(middle, early)
    assert torch.equal(last, reader(x, mask))


def test_operations_are_counted_with_those_of_attention():
    query = torch.rand(1, 2, 7, 5)
    run = torch.nn.functional.scaled_dot_product_attention
    assert counted_operations(lambda: run(query, query, query)) == 2 * 2 * (2 * 7 * 7 * 5)
    assert counted_operations(lambda: torch.rand(3, 4) @ torch.rand(4, 5)) == 2 * 3 * 4 * 5


def test_patches_and_their_loss_are_those_of_transformers():
    reader, x = encoder("ViTMAEForPreTraining"), pictures()
    theirs = reader.network.model
    assert torch.equal(patches_of(x, 4), theirs.patchify(x))
    mask = mask_of(NOISE, 0.6)
    predicted = theirs.decoder(reader(x, mask), mask.restore).logits
    ours = hidden_pixel_loss(predicted, x, mask, 4).mean()
    theirs.config.mask_ratio = 0.6  # the same object in all its parts
    torch.testing.assert_close(ours, theirs(pixel_values=x, noise=NOISE).loss)


def test_a_fresh_autoencoder_knows_the_places_of_its_patches():
    """As the published weights have them; a model of transformers without a file has zeros."""
    reader = encoder("ViTMAEForPreTraining")
    for places in (
        reader.base.embeddings.position_embeddings,
        reader.network.model.decoder.decoder_pos_embed,
    ):
        assert not places.requires_grad
        assert not places[0, 0].any()
        assert len(torch.unique(places[0], dim=0)) == 10
    quarter = reader.base.embeddings.position_embeddings[0, 1:].reshape(3, 3, 24)
    torch.testing.assert_close(quarter[1, 2, 0], torch.sin(torch.tensor(2.0)))  # columns come first
    torch.testing.assert_close(quarter[1, 2, 12], torch.sin(torch.tensor(1.0)))
    wide = build_network(NetworkConfig(name="ViTMAEModel", args=SMALL), {"shape": (1, 8, 16)})
    assert len(torch.unique(wide.model.embeddings.position_embeddings[0], dim=0)) == 9


def test_a_decoder_for_a_student_leads_to_every_patch():
    reader = encoder("ViTForImageClassification")
    decoder = new_decoder(reader, 16, 2)
    mask = mask_of(NOISE, 0.6)
    assert decoder(reader(pictures(), mask), mask.restore).logits.shape == (2, 9, 48)
    assert isinstance(decoder, transformers.models.vit_mae.modeling_vit_mae.ViTMAEDecoder)


def test_a_network_that_is_no_vision_transformer_is_refused():
    network = build_network(
        NetworkConfig(name="ResNetForImageClassification"), {"shape": SHAPE, "num_classes": 5}
    )
    with pytest.raises(
        ConfigError, match="the teacher is a ResNetForImageClassification, and masks need"
    ) as error:
        MaskedEncoder(network, "the teacher", field="teacher")
    assert error.value.field == "teacher"


@pytest.mark.parametrize(
    ("args", "shape", "said"),
    [
        ({"hidden_size": 18, "num_attention_heads": 3}, SHAPE, "hidden_size = 18 is not allowed: sines"),
        ({"decoder_hidden_size": 10, "decoder_num_attention_heads": 2}, SHAPE, "decoder_hidden_size = 10 is not"),
        ({}, (1, 8, 16), "takes square pictures, and these are 16 x 8"),
    ],
)  # fmt: skip
def test_an_autoencoder_that_cannot_be_is_said_in_a_sentence(args, shape, said):
    with pytest.raises(ConfigError, match=said):
        build_network(NetworkConfig(name="ViTMAEForPreTraining", args=args), {"shape": shape})


def test_a_mask_without_hidden_patches_costs_nothing():
    mask = TokenMask(torch.tensor([[1, 0]]), torch.tensor([[1, 0]]))
    assert hidden_pixel_loss(torch.zeros(1, 2, 12), torch.ones(1, 3, 2, 4), mask, 2).tolist() == [0.0]
