"""Batches that are read ahead: by other threads, within a bound, and not a bit of any result depends on it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.data import build_source, pictures
from distill_core.data.item_set import TABLE, ItemSet
from distill_core.data.prefetch import Prefetch
from distill_core.errors import DataError
from distill_core.method import Method, Stage, Update
from distill_core.recipe import load_recipe
from distill_core.training.loop import Trainer
from distill_core.training.run_folder import Run

STEPS = 7


class Seeing(Method):
    """Learns from views of pictures and their conditions; keeps what it saw."""

    roles = ("model",)
    result = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(3 * 6 * 9, 1)
        torch.nn.init.constant_(self.model.weight, 0.01)
        torch.nn.init.zeros_(self.model.bias)
        self.seen: list[dict[str, torch.Tensor]] = []

    def updates(self, batch, step):
        self.seen.append({"x0": batch.x0, "index": batch.index, **batch.cond, **batch.view})
        for other in batch.also.values():
            self.seen.append({"x0": other.x0, "index": other.index, **other.cond})
        target = torch.randn(batch.size, 1) + batch.index[:, None]
        yield Update("model", (self.model(batch.x0.flatten(1)) - target).square().mean())


class Staged(Seeing):
    """From its third step on a further data set gives a batch to each step."""

    @classmethod
    def stages(cls, config, steps):
        return Stage("a", 2, cls.roles), Stage("b", steps - 2, cls.roles, streams=("more",))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures wider than high in two classes, each of its own, which are decoded for each batch anew."""
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    random = np.random.default_rng(5)
    for number in range(11):
        file = tmp_path / "pictures" / ("cat" if number < 4 else "dog") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def trainer(folder, run, method=None, **changes) -> Trainer:
    view = {"crop_scale": 0.6, "shift": 2, "flip": True}
    values = {
        "method": "seeing",
        "seed": 3,
        "steps": STEPS,
        "batch_size": 6,
        "data": {"name": "images", "path": str(folder), "view": view},
        "optim": {"model": {"name": "sgd", "lr": 0.01, "momentum": 0.3}},
        "checkpoint_every": 2,
        **changes,
    }
    recipe, method = load_recipe(values), method or Seeing()
    method.more = build_source({"name": "images", "path": str(folder), "view": {"flip": True}})
    return Trainer(method, build_source(recipe.data), recipe, Run(run))


def same(one: Trainer, other: Trainer) -> bool:
    """Whether two runs saw and learnt the same, bit for bit."""
    assert len(one.method.seen) == len(other.method.seen)
    for first, second in zip(one.method.seen, other.method.seen):
        assert first.keys() == second.keys()
        if not all(torch.equal(first[name], second[name]) for name in first):
            return False
    return torch.equal(one.method.model.weight, other.method.model.weight)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture
def decoded_in(monkeypatch):
    """Names of the threads that decoded a picture, in order."""
    names, honest = [], pictures.decode

    def decode(*args, **options):
        names.append(threading.current_thread().name)
        return honest(*args, **options)

    monkeypatch.setattr(pictures, "decode", decode)
    return names


@pytest.mark.parametrize("method", [Seeing, Staged])
@pytest.mark.parametrize("changes", [{"prefetch": 1}, {"prefetch": 3}, {"prefetch": 3, "accumulate": 2}])
def test_what_is_read_ahead_is_the_same_to_the_bit(method, changes, folder, tmp_path, decoded_in):
    plain = trainer(folder, tmp_path / "a", method(), **{**changes, "prefetch": 0})
    plain.train()
    assert set(decoded_in) == {"MainThread"}
    ahead = trainer(folder, tmp_path / "b", method(), **changes)
    decoded_in.clear()
    ahead.train()
    assert all(name.startswith("prefetch") for name in decoded_in)
    assert same(plain, ahead)
    assert not same(plain, trained(trainer(folder, tmp_path / "c", method(), **changes, seed=4)))


@pytest.mark.parametrize("name", ["huggingface", "artifact"])
def test_rows_of_a_table_are_read_ahead_too(name, folder, tmp_path, decoded_in):
    source = build_source({"name": "images", "path": str(folder)})
    ItemSet(source.pixels, labels=source.labels, class_names=source.class_names).save(tmp_path / "set")
    path = tmp_path / "set" / (TABLE if name == "huggingface" else "")
    data = {"name": name, "path": str(path), "view": {"shift": 2, "flip": True}}
    plain, ahead = (
        trained(trainer(folder, tmp_path / str(prefetch), prefetch=prefetch, data=data))
        for prefetch in (0, 3)
    )
    assert any(thread.startswith("prefetch") for thread in decoded_in)
    assert same(plain, ahead)


def trained(run: Trainer) -> Trainer:
    run.train()
    return run


def test_a_model_encodes_in_the_main_thread_alone(folder, tmp_path, decoded_in):
    for file in folder.rglob("*.png"):
        file.with_suffix(".txt").write_text(f"picture {file.stem}")
    threads, seen = set(), []
    for prefetch in (0, 2):
        run = trainer(folder, tmp_path / str(prefetch), prefetch=prefetch)

        def encode(prompts):
            threads.add(threading.current_thread().name)
            drawn = torch.rand(len(prompts), 1)  # as an encoder with a random part would
            return {"prompt_embeds": drawn + torch.tensor([[float(text[-2:])] for text in prompts])}

        run.source.encode_with(encode)
        run.train()
        seen.append(run)
    assert threads == {"MainThread"}
    assert any(name.startswith("prefetch") for name in decoded_in)
    assert "prompt_embeds" in seen[0].method.seen[0]
    assert same(*seen)


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_begun_than_was_asked_for_and_nothing_past_the_end(ahead):
    begun = []

    def make(number):
        begun.append(number)
        return 7 * number

    with Prefetch(make, ahead=ahead, stop=9) as values:
        for number in range(2, 9):
            assert values.take(number) == 7 * number
            assert max(begun) <= number + ahead
    assert sorted(begun) == list(range(2, 9))


def test_values_are_taken_again_and_out_of_order():
    with Prefetch(lambda number: 7 * number, ahead=2, stop=30) as values:
        assert [values.take(number) for number in (4, 5, 4, 20, 6, 40)] == [28, 35, 28, 140, 42, 280]


def test_the_value_after_the_last_one_is_made_while_that_is_used():
    made = threading.Event()

    def make(number):
        if number == 1:
            made.set()
        return number

    with Prefetch(make, ahead=1, stop=5) as values:
        values.take(0)
        assert made.wait(30)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_picture_that_cannot_be_read_is_said_at_its_own_step(prefetch, folder, tmp_path):
    run = trainer(folder, tmp_path / "run", prefetch=prefetch, batch_size=2)
    batches = [run.source.read(2, epoch_seed=3, position=step).index.tolist() for step in range(4)]
    broken = next(index for index in batches[3] if index not in sum(batches[:3], []))
    file = sorted(folder.rglob("*.png"))[broken]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=f"{file.name} is not a readable picture") as caught:
        run.train()
    assert caught.value.field == "data.path"
    assert (run.step, len(run.method.seen)) == (3, 3)
    assert reading_threads() == []


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_stopped_run_leaves_no_thread_and_goes_on_exactly(prefetch, folder, tmp_path):
    whole = trained(trainer(folder, tmp_path / "whole", prefetch=0))
    run = trainer(folder, tmp_path / "run", prefetch=prefetch)
    assert run.train(lambda: run.step == 3).stopped
    assert reading_threads() == []
    again = trainer(folder, tmp_path / "run", prefetch=prefetch)
    again.train()
    again.method.seen = run.method.seen + again.method.seen
    assert same(whole, again)


def test_a_step_that_fails_leaves_no_thread(folder, tmp_path):
    class Fails(Seeing):
        def updates(self, batch, step):
            if step == 2:
                raise KeyboardInterrupt
            yield from super().updates(batch, step)

    run = trainer(folder, tmp_path / "run", Fails(), prefetch=3)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert reading_threads() == []
