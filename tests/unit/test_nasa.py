"""NASA-T: what each network is told, and PG-SB bit for bit without negative prompts."""

from __future__ import annotations

import copy

import pytest
import torch

from distill_core.data import build_source
from distill_core.errors import ConfigError
from distill_core.methods.diffusion.nasa import NASA
from distill_core.methods.diffusion.pg_sb import PGSB
from distill_core.networks.diffusers_new import build_denoiser
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig

UNET = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 1,
    "norm_num_groups": 4,
}
CONFIG = {"lora": {"rank": 2, "targets": "all-linear"}, "guidance_min": 1.5}
NEGATIVE = {"negative_prompts": ["red", "green"]}


@pytest.fixture(scope="module")
def source():
    torch.set_num_threads(1)
    return build_source({"name": "shapes", "count": 64})


@pytest.fixture(scope="module")
def teacher(source):
    torch.manual_seed(0)
    network = NetworkConfig(name="UNet2DConditionModel", args=UNET)
    denoiser = build_denoiser(
        network, parameterisation="edm", shape=source.shape, num_classes=None, prompts=source.prompts
    )
    for name, parameter in denoiser.named_parameters():
        if name.endswith("conv_out.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    source.encode_with(denoiser.encode_prompts)
    return denoiser.requires_grad_(False)


def method(teacher, source=None, **config):
    cls = PGSB if source is None else NASA
    torch.manual_seed(1)
    student = copy.deepcopy(teacher).requires_grad_(True)
    needs = {} if source is None else {"data": source}
    return cls(cls.Config.parse({**CONFIG, **config}), teacher=teacher, student=student, **needs)


def trace(method, source, steps=2):
    """Losses of a short training, with every weight of every role at its end."""
    torch.manual_seed(2)
    optimizers = {r: torch.optim.SGD(getattr(method, r).parameters(), 0.1) for r in method.roles}
    seen = []
    for step in range(steps):
        for update in method.updates(source.batch(6, epoch_seed=0, position=step), step):
            update.loss.backward(inputs=list(getattr(method, update.role).parameters()))
            optimizers[update.role].step()
            optimizers[update.role].zero_grad()
            seen.append(update.loss.detach())
    return [*seen, *(p.detach() for role in method.roles for p in getattr(method, role).parameters())]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


def told(module, method, source):
    """What a network is told during one step, call by call."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[2]))
    try:
        trace(method, source, steps=1)
    finally:
        handle.remove()
    return seen


@pytest.mark.slow
def test_without_negative_prompts_it_is_pg_sb_bit_for_bit(teacher, source):
    expected = trace(method(teacher), source)
    assert same(trace(method(teacher, source), source), expected)
    assert not same(trace(method(teacher, source, **NEGATIVE), source), expected)
    assert method(teacher, source).student.cond.nasa_scale is None


def test_the_student_is_steered_by_one_strength_for_the_whole_batch(teacher, source):
    nasa = method(teacher, source, **NEGATIVE, scale_max=0.6)
    (cond,) = told(nasa.student, nasa, source)
    assert cond.keys() == {"prompt_embeds", "negative_prompt_embeds", "nasa_scale"}
    assert len(cond["nasa_scale"].unique()) == 1
    scales = [nasa.with_negatives(source.items(torch.arange(2))).cond["nasa_scale"][0] for _ in range(200)]
    drawn = torch.stack(scales)
    assert 0 <= drawn.min() < 0.05
    assert 0.55 < drawn.max() <= 0.6


def test_the_teachers_guidance_leads_away_from_the_negative_prompt_and_nothing_steers_it(teacher, source):
    nasa = method(teacher, source, **NEGATIVE)
    (student,) = told(nasa.student, nasa, source)
    (cond,) = told(nasa.teacher, nasa, source)
    assert cond.keys() == {"prompt_embeds"}
    prompt, away = cond["prompt_embeds"].chunk(2)
    assert torch.equal(prompt, student["prompt_embeds"])
    assert torch.equal(away, student["negative_prompt_embeds"])
    both = teacher.encode_prompts(["red", "green"])["prompt_embeds"]
    assert all(any(torch.equal(row, known) for known in both) for row in away)


def test_the_fake_score_never_sees_the_negative_prompt(teacher, source):
    nasa = method(teacher, source, **NEGATIVE, condition_dropout=0.0)
    training, guided = told(nasa.fake_score.denoiser, nasa, source)
    assert training.keys() == guided.keys() == {"prompt_embeds"}
    prompt, away = guided["prompt_embeds"].chunk(2)
    assert torch.equal(prompt, training["prompt_embeds"])
    assert torch.equal(away, teacher.null_cond(6)["prompt_embeds"])


def test_micro_batches_in_lock_step_keep_their_own_negative_prompts(teacher, source):
    nasa = method(teacher, source, **NEGATIVE)
    seen = []
    nasa.teacher.register_forward_pre_hook(
        lambda _module, args: seen.append(args[2]["prompt_embeds"].chunk(2)[1])
    )
    drawn = []
    steered = nasa.with_negatives
    nasa.with_negatives = lambda batch: drawn.append(steered(batch)) or drawn[-1]
    torch.manual_seed(0)
    generators = [nasa.updates(source.batch(6, epoch_seed=0, position=i), 0) for i in range(2)]
    while not any(next(generator, None) is None for generator in generators):
        pass
    nasa.teacher._forward_pre_hooks.clear()
    assert [torch.equal(a, b.cond["negative_prompt_embeds"]) for a, b in zip(seen, drawn)] == [True, True]
    assert not torch.equal(seen[0], seen[1])


def test_the_students_strength_is_published_with_it(teacher, source, tmp_path):
    from distill_core.networks.diffusers_io import load_denoiser

    nasa = method(teacher, source, **NEGATIVE, scale=0.4)
    assert nasa.main.card().cond.nasa_scale == 0.4
    nasa.main.save(tmp_path)
    assert load_denoiser(tmp_path).cond.nasa_scale == 0.4


def test_figures_compare_the_steered_student_with_itself_on_the_same_noise(teacher, source):
    config = EvaluateConfig(num_samples=18, batch_size=18)
    off = method(teacher, source, **NEGATIVE, scale=0.0).figures(config)
    assert off["negative_share"] == off["plain_negative_share"]
    assert off["prompt_accuracy"] == off["plain_prompt_accuracy"]
    assert method(teacher, source).figures(config) == {}
    pairs = method(teacher, source, **NEGATIVE)._asked(18)
    shapes = {"circle", "triangle", "cross"}
    assert {prompt for prompt, _ in pairs} == shapes | {"blue", *(f"blue {shape}" for shape in shapes)}
    assert {negative for _, negative in pairs} == {"red", "green"}


def test_figures_read_what_the_pictures_show(teacher, source, monkeypatch):
    nasa = method(teacher, source, **NEGATIVE)
    shown = iter([["red circle", "blue circle"], ["green cross", "red circle"]])
    monkeypatch.setattr(nasa, "_asked", lambda count: [("circle", "red"), ("circle", "green")])
    monkeypatch.setattr(
        source,
        "recognise",
        lambda pictures: torch.tensor([source.class_names.index(name) for name in next(shown)]),
    )
    figures = nasa.figures(EvaluateConfig(num_samples=2))
    assert figures["negative_share"] == 0.5
    assert figures["prompt_accuracy"] == 1.0
    assert figures["plain_negative_share"] == 0.0
    assert figures["plain_prompt_accuracy"] == 0.5


@pytest.mark.parametrize("config", [{"guidance_min": 1.0, "guidance_max": 1.0}])
def test_negative_prompts_without_guidance_are_refused(teacher, source, config):
    with pytest.raises(ConfigError, match="need a text-to-image teacher under guidance"):
        method(teacher, source, **NEGATIVE, **config)


def test_a_judge_is_asked_for_the_class_of_the_item_whose_prompt_was_given(teacher, source):
    from distill_core.kinds.denoiser.evaluation import Evaluator
    from distill_core.metrics.judge import Judge
    from distill_core.networks.classifier import Classifier, ClassifierConfig, predict
    from distill_core.networks.generation import generate

    torch.manual_seed(0)
    names = source.class_names
    judge = Judge(
        Classifier(ClassifierConfig(shape=(3, 16, 16), num_classes=len(names), class_names=names, width=8))
    )
    config = EvaluateConfig(num_samples=80, batch_size=40)
    figures = Evaluator(source, config, judge=judge).figures(teacher, num_steps=1)
    items = torch.arange(80) % 64
    prompts = teacher.encode_prompts([source.prompts[item] for item in items.tolist()])
    seen = predict(judge.classifier, generate(teacher, prompts, 80, num_steps=1))[1].argmax(1)
    assert figures["accuracy"] == pytest.approx((seen == source.labels[items]).float().mean().item())
    other = Judge(Classifier(ClassifierConfig(shape=(3, 16, 16), num_classes=8, width=8)))
    assert "accuracy" not in Evaluator(source, config, judge=other).figures(teacher, num_steps=1)
