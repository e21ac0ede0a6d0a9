"""G2SD: the decoder of a masked teacher is repeated, hidden patches too; then two heads learn from two sources."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill_core.errors import ConfigError
from distill_core.methods.recognition._students import taught
from distill_core.methods.recognition.g2sd import decoded, repeated_loss
from distill_core.networks.masked import random_mask
from tests.helpers import entered, tiny_trainer

PRETRAINING = {"steps": 400, "config.pretrain_steps": 200}
TUNING = {"steps": 400, "config.pretrain_steps": 0, "config.mixup": 0.0, "config.cutmix": 0.0}


def test_the_loss_is_the_formula_written_out():
    own, other = torch.randn(2, 3, 5) * 4, torch.randn(2, 3, 5) * 7 + 2
    found = repeated_loss(own, other)
    for item in range(2):
        total = 0.0
        for token in range(3):
            row = other[item, token]
            target = (row - row.mean()) / torch.sqrt(row.var(correction=0) + 1e-5)
            for distance in (own[item, token] - target).abs().tolist():
                total += distance**2 / 4 if distance < 2 else distance - 1
        assert float(found[item]) == pytest.approx(total / 15, rel=1e-5)
    counted = torch.tensor([[True, False, True], [False, True, False]])
    some = repeated_loss(own, other, counted)
    torch.testing.assert_close(some[1], repeated_loss(own[1:, 1:2], other[1:, 1:2])[0])
    torch.testing.assert_close(some[0], repeated_loss(own[:1, ::2], other[:1, ::2])[0])


def test_what_is_repeated_is_the_teacher_s_decoder_on_every_patch_of_the_same_mask(context, tmp_path):
    trainer = tiny_trainer("g2sd", context, tmp_path, **PRETRAINING, **{"config.decoder_block": 1})
    method = trainer.method
    x0 = trainer.source.all(3).x0
    torch.manual_seed(2)
    mask = random_mask(method.encoder, x0, 0.75)
    network = method.taught.network
    wanted = decoded(method.taught, network.model.decoder, method.block, x0, mask)
    assert wanted.shape == (3, 17, 32)
    theirs = network.model
    hidden = []
    theirs.decoder.decoder_layers[0].register_forward_hook(lambda _m, _i, out: hidden.append(out))
    theirs.decoder(method.taught(x0, mask), mask.restore)
    assert torch.equal(hidden[0], wanted)
    decoder, last = method.student.exits
    own = last(decoded(method.encoder, decoder, "decoder_norm", x0, mask))
    torch.manual_seed(2)
    found = method.pretraining(x0, 0)["repeated_loss"]
    torch.testing.assert_close(found, repeated_loss(own, wanted).mean())
    method.config = method.config.model_copy(update={"repeated": "hidden"})
    torch.manual_seed(2)
    counted = F.pad(mask.hidden, (1, 0))
    torch.testing.assert_close(
        method.pretraining(x0, 0)["repeated_loss"], repeated_loss(own, wanted, counted).mean()
    )


def test_the_first_stage_moves_what_is_left_behind_and_the_second_begins_with_its_encoder(context, tmp_path):
    trainer = tiny_trainer("g2sd", context, tmp_path, **PRETRAINING)
    student = trainer.method.student
    before = {name: value.clone() for name, value in student.named_parameters() if value.requires_grad}
    trainer.step = 100  # past the warmup's first step, whose rate is 0
    trainer.train_step()
    after = dict(student.named_parameters())
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert all("classifier" in name for name in still)
    encoder = student.predictor.state_dict()
    kept = {name: value.clone() for name, value in encoder.items()}
    entered(trainer.method, 200)
    assert all(torch.equal(kept[name], value) for name, value in student.predictor.state_dict().items())
    assert not any("decoder" in name for name, _ in trainer.method.published()["student"].named_parameters())


def test_one_head_learns_the_labels_and_the_other_what_the_teacher_says(context, tmp_path):
    trainer = tiny_trainer("g2sd", context, tmp_path, **TUNING)
    method, x0 = trainer.method, trainer.source.all(9).x0
    labels = torch.arange(9)
    by_class, by_teacher = method.heads(x0)
    said = taught(method.teacher, x0).argmax(1)
    expected = (F.cross_entropy(by_class, labels) + F.cross_entropy(by_teacher, said)) / 2
    torch.testing.assert_close(method.tuning(x0, labels).loss, expected)
    assert not torch.equal(said, labels)
    method.config = method.config.model_copy(update={"specific": False})
    method.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    both = (F.cross_entropy(by_class, labels) + F.cross_entropy(by_teacher, labels)) / 2
    torch.testing.assert_close(method.tuning(x0, labels).loss, both)


def test_the_teacher_is_asked_about_the_mixed_pictures(context, tmp_path):
    trainer = tiny_trainer("g2sd", context, tmp_path, **{**TUNING, "config.mixup": 0.8})
    seen = []
    trainer.method.teacher.network.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    trainer.method.student.predictor.network.model.register_forward_pre_hook(
        lambda _m, _i, given: seen.append(given["pixel_values"]), with_kwargs=True
    )
    x0 = trainer.source.all(8).x0
    torch.manual_seed(1)
    trainer.method.tuning(x0, torch.arange(8))
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], x0)


@pytest.mark.parametrize(
    ("changes", "said", "field"),
    [
        ({"network.name": "ViTForImageClassification"}, "needs a network with a distillation token", "network.name"),
        ({"teachers.generic": {"recipe": "vit_digits"}}, "is a ViTForImageClassification; choose", "teachers.generic"),
        ({"config.decoder_block": 3}, "has 2 blocks; name one of these", "config.decoder_block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_trained(context, tmp_path, changes, said, field):
    with pytest.raises(ConfigError, match=said) as error:
        tiny_trainer("g2sd", context, tmp_path, **changes)
    assert error.value.field == field
