"""The plan of memory against what the allocator really gave, and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from distill_core import api
from distill_core.building import build
from distill_core.errors import ConfigError, NotFound
from distill_core.method import Method, Update
from distill_core.networks.fake_tensors import fake_tensors, is_faked, real_tensors
from distill_core.recipe import load_recipe
from distill_core.training.loop import Trainer
from distill_core.training.memory import LiveBytes, MemoryPlan, plan_memory
from distill_core.training.run_folder import Run
from tests.helpers import tiny_text_to_image

pytestmark = pytest.mark.slow

SMALL = {"batch_size": 64, "threads": 1, "steps": 10}
DMD2 = {**SMALL, "config.critic_steps": 1}


@pytest.fixture
def where(tmp_path):
    return api.context(tmp_path / "store", tmp_path / "cache")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_text_to_image(tmp_path_factory.mktemp("text") / "pipeline")


def text_recipe(pipeline, method="swiftbrush", **changes):
    values = {
        "method": method,
        "steps": 2,
        "batch_size": 4,
        "teacher": {"path": str(pipeline)},
        "data": {"name": "prompts", "prompts": ["a cat", "a dog", "two cats"]},
        "config": {"lora": {"rank": 2}} if method == "swiftbrush" else {"critic_steps": 1},
    }
    return load_recipe(values, changes)


def real_trainer(recipe, where, folder) -> Trainer:
    method, source = build(recipe, api.untrained(where, folder / "models"))
    return Trainer(method, source, recipe, Run(folder / "run"))


def allocated(work) -> int:
    """The most bytes that the CPU's allocator had given out at once during `work`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dmd2", {"config.critic_steps": 1}),
        ("dmd2", {"config.critic_steps": 1, "precision": "bf16", "accumulate": 2}),
        ("swiftbrush", {"student.gradient_checkpointing": True}),
    ],
)
def test_the_plan_is_what_the_allocator_gives_in_a_real_step(name, changes, where, tmp_path):
    recipe = load_recipe(name, {**SMALL, **changes})
    plan = api.plan(recipe, where)
    trainer = real_trainer(recipe, where, tmp_path)
    for _ in range(2):
        trainer.train_step()
        trainer.step += 1
    assert plan.step == pytest.approx(allocated(trainer.train_step), rel=0.03)
    assert 0 < plan.activations <= plan.step


def test_the_parts_are_the_tensors_that_a_run_holds(where, tmp_path):
    recipe = load_recipe("dmd2", DMD2)
    parts = {part.name: part for part in api.plan(recipe, where).parts}
    trainer = real_trainer(recipe, where, tmp_path)
    trainer.train_step()
    assert list(parts) == ["teacher", "fake_score", "student"]
    for name, part in parts.items():
        values = list(getattr(trainer.method, name).parameters())
        assert part.parameters == sum(value.numel() for value in values)
        assert part.weights == sum(value.nbytes for value in values) + sum(
            value.nbytes for value in getattr(trainer.method, name).buffers()
        )
    for role in trainer.method.roles:
        held = [value for state in trainer.optimizers[role].state.values() for value in state.values()]
        assert parts[role].optimizer == sum(value.nbytes for value in held) > 0
        assert parts[role].gradients == sum(value.nbytes for value in trainer.parameters[role])
        assert parts[role].role
    assert parts["student"].ema == sum(value.nbytes for value in trainer.emas["student"].weights.values())
    assert (parts["teacher"].trained, parts["teacher"].gradients, parts["teacher"].ema) == (0, 0, 0)


def test_an_adapter_shares_the_teachers_weights_and_a_copy_does_not(where):
    shared = {part.name: part for part in api.plan(load_recipe("swiftbrush", SMALL), where).parts}
    copied = {part.name: part for part in api.plan(load_recipe("dmd2", DMD2), where).parts}
    assert shared["fake_score"].shared == shared["teacher"].weights
    assert shared["fake_score"].weights < shared["teacher"].weights / 2
    assert copied["fake_score"].shared == 0
    assert copied["fake_score"].weights >= copied["teacher"].weights


def test_encoder_and_decoder_of_a_text_model_are_counted_once(where, pipeline):
    import diffusers

    real = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    parts = {part.name: part for part in api.plan(text_recipe(pipeline), where).parts}
    for name, module in (("text encoder", real.text_encoder), ("picture decoder", real.vae)):
        found = [part for said, part in parts.items() if said.endswith(name)]
        assert [part.parameters for part in found] == [sum(p.numel() for p in module.parameters())]


def test_a_plan_reads_no_weights(where, pipeline, tmp_path):
    import shutil

    wanted = api.plan(text_recipe(pipeline), where)
    bare = shutil.copytree(pipeline, tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    assert api.plan(text_recipe(bare), where) == wanted
    with pytest.raises(NotFound):
        api.plan(text_recipe(tmp_path / "nowhere"), where)


def test_micro_batches_need_less_memory_than_the_whole_batch(where):
    whole = api.plan(load_recipe("dmd2", DMD2), where)
    parts = api.plan(load_recipe("dmd2", {**DMD2, "accumulate": 4}), where)
    assert parts.activations < whole.activations / 2
    assert parts.standing == whole.standing


class Chooser(Method):
    """Decides by values in a way that no plan can follow."""

    roles = ("student",)

    def __init__(self) -> None:
        super().__init__()
        self.student = torch.nn.Linear(64, 1)

    def updates(self, batch, step):
        x = batch.x0.flatten(1)
        yield Update("student", self.student(x[x[:, 0].nonzero().squeeze(1)]).mean())


def test_each_of_two_processes_needs_half_a_batch_and_if_they_shard_half_of_what_is_trained(where):
    half = api.plan(load_recipe("dmd2", {**DMD2, "batch_size": 32}), where)
    whole = api.plan(load_recipe("dmd2", {**DMD2, "processes": 2}), where)
    shared = api.plan(load_recipe("dmd2", {**DMD2, "processes": 2, "sharding": "fsdp"}), where)
    assert whole == half
    trained = sum(part.gradients for part in half.parts)
    averages = sum(part.ema for part in half.parts)
    state = sum(part.optimizer for part in half.parts)
    assert half.standing - shared.standing == pytest.approx((trained + averages + state) / 2, rel=1e-3)
    assert shared.step - half.step == max(part.gradients for part in half.parts)


def test_a_method_that_decides_by_values_is_refused_in_a_sentence(where):
    from distill_core.data import build_source

    recipe = load_recipe({"method": "dmd2", "steps": 1, "data": {"name": "digits"}})
    source = build_source(recipe.data)
    with fake_tensors(), pytest.raises(ConfigError, match="cannot be planned, since it decides by values"):
        plan_memory(Chooser(), source, recipe)


def test_live_bytes_count_what_is_held_and_forget_what_is_freed():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        assert live.now == 8000
        view = b[10:].reshape(-1, 3)
        a.add_(b)
        assert live.now == 8000
        del b
        assert live.now == 8000  # the view holds it
        del view
        assert live.now == 4000
        assert live.peak >= 8000


def test_fake_tensors_take_nothing_answer_and_end_with_their_block():
    with fake_tensors():
        assert is_faked()
        huge = torch.empty(2**40)
        assert huge.shape == (2**40,)
        assert float(torch.rand(())) == 0
        assert bool(torch.rand(()) < 0.5)
        with real_tensors():
            assert not is_faked()
            assert torch.arange(3).tolist() == [0, 1, 2]
    assert not is_faked()
    assert torch.arange(3).tolist() == [0, 1, 2]
    assert torch.nn.Linear(2, 2).double().weight.dtype == torch.float64


@pytest.mark.parametrize("method", ["dmd2", "swiftbrush"])  # a transformer on digits, a UNet on prompts
def test_checkpointing_changes_no_bit_and_saves_activations(method, pipeline, where, tmp_path):
    plain = load_recipe(method, DMD2) if method == "dmd2" else text_recipe(pipeline)
    lean = plain.override({"student.gradient_checkpointing": True})
    _same_weights_after_two_steps(plain, lean, where, tmp_path)
    assert api.plan(lean, where).activations < 0.8 * api.plan(plain, where).activations


def _same_weights_after_two_steps(one, two, where, folder):
    ends = []
    for number, recipe in enumerate((one, two)):
        trainer = real_trainer(recipe, where, folder / str(number))
        for _ in range(2):
            trainer.train_step()
            trainer.step += 1
        ends.append(
            {
                f"{role}.{name}": value
                for role in trainer.method.roles
                for name, value in getattr(trainer.method, role).state_dict().items()
            }
        )
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_the_sum_is_at_the_peak_of_a_step():
    assert MemoryPlan((), activations=5, step=7).total == 7
