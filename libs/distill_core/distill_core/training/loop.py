"""The one training loop: devices, precision, accumulation, clipping, EMA, checkpoints, resume, logging, stopping."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from distill_core.config import OptimConfig, Recipe
from distill_core.data.source import Source
from distill_core.errors import ArtifactError, ConfigError, DivergedError, nearest
from distill_core.method import Method, Update
from distill_core.training.checkpoint import (
    complete_checkpoints,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from distill_core.training.ema import EMA
from distill_core.training.layout import Replicated, place
from distill_core.training.micro_batch import fitting_accumulate
from distill_core.training.optimizers import build_optimizer, learning_rate
from distill_core.training.run import Run
from distill_core.training.seeding import derive, seed_everything

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    step: int  # steps done
    stopped: bool  # True: stopped on request, a checkpoint is written


class Trainer:
    """Runs a method as a recipe says. `train()` resumes by itself from the run folder's last checkpoint."""

    def __init__(
        self, method: Method, source: Source, recipe: Recipe, run: Run, *, cpu: bool = False
    ) -> None:
        _check_roles(method, recipe)
        mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.precision]
        AcceleratorState._reset_state()  # a teacher trained before, in this process, had a precision of its own
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=cpu)
        self.method, self.source, self.recipe, self.run = method, source, recipe, run
        method.to(self.accelerator.device)
        self.layout = _layout(method, self.accelerator, recipe.sharding)
        self.parameters = self.layout.parameters
        self.configs = {role: recipe.optim.get(role, OptimConfig()) for role in method.roles}
        self.optimizers = {
            role: self._prepared(build_optimizer(self.parameters[role], self.configs[role]))
            for role in method.roles
        }
        self.emas = {role: EMA(_module(method, role), decay) for role, decay in recipe.ema.items()}
        self.step = 0
        self.accumulate = recipe.accumulate  # more with micro_batch = "auto"
        self.alone = False  # True: a step of this process, whose gradients are not averaged with others'

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the recipe's last step, or until `should_stop()`.

        Raises:
            DivergedError: a loss is NaN or infinite.
        """
        self.resume()
        self.accelerator.wait_for_everyone()  # nobody writes a checkpoint before all have read the last
        if self.recipe.micro_batch == "auto" and self.step == 0:
            self.accumulate = fitting_accumulate(self)
        meter = _Meter(self.run, self.recipe, self.step, main=self.accelerator.is_main_process)
        while self.step < self.recipe.steps:
            if self._all_stop(should_stop()):
                self.checkpoint()
                return Outcome(self.step, stopped=True)
            values = self.train_step()
            self.step += 1
            self._after_step(meter, values)
        if not complete_checkpoints(self.run.checkpoints) or self.step % self.recipe.checkpoint_every:
            self.checkpoint()
        return Outcome(self.step, stopped=False)

    def _all_stop(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all stop after the same step, or the others would wait for ever."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor([float(asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def train_step(self) -> dict[str, Tensor]:
        """All updates of one step; the logged values by name."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        seed_everything(derive(self.recipe.seed, self.step, rank))
        for role, optimizer in self.optimizers.items():
            rate = learning_rate(self.configs[role], self.step, self.recipe.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
        micro, size = self.accumulate, self.recipe.batch_size // (self.accumulate * world)
        positions = [(self.step * micro + index) * world + rank for index in range(micro)]
        batches = [
            self.source.batch(size, epoch_seed=self.recipe.seed, position=position) for position in positions
        ]
        generators = [self.method.updates(batch.to(self.accelerator.device), self.step) for batch in batches]
        values: dict[str, Tensor] = {}
        for together in self._lock_step(generators):
            values |= self.apply(together)
        return values

    def _lock_step(self, generators: list[Iterator[Update]]) -> Iterator[tuple[Update, ...]]:
        """Ask every micro-batch for its next update; all of one role."""
        while True:
            asked = (self._differentiated(generator, len(generators)) for generator in generators)
            together = tuple(update for update in asked if update)
            if not together:
                return
            assert len(together) == len(generators), "micro-batches yield different numbers of updates"
            assert len({update.role for update in together}) == 1, "micro-batches yield different roles"
            yield together

    def _differentiated(self, generator: Iterator[Update], micro: int) -> Update | None:
        """A micro-batch's next update, its gradient added: activations must not wait for the other micro-batches."""
        with self.layout.following():
            with self.accelerator.autocast():
                update = next(generator, None)
            if update is None:
                return None
            self.accelerator.backward(update.loss / micro, inputs=self.layout.leaves[update.role])
        return replace(update, loss=update.loss.detach())

    def apply(self, updates: tuple[Update, ...]) -> dict[str, Tensor]:
        """Step one role on the gradient of the mean loss of its micro-batches."""
        role, parameters = updates[0].role, self.parameters[updates[0].role]
        optimizer, config = self.optimizers[role], self.configs[role]
        loss = torch.stack([update.loss.float() for update in updates]).mean()
        if not torch.isfinite(loss):
            raise self._diverged(role, float(loss))
        if not self.alone:
            self.layout.average(role)
        if config.grad_clip is not None:
            self.accelerator.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if role in self.emas:
            self.emas[role].update(_module(self.method, role))
        logged = {name: torch.as_tensor(value).detach() for name, value in updates[0].metrics.items()}
        return {f"{role}_loss": loss, **logged}

    def _prepared(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """In accelerate's wrapper where fp16 needs its scaler: the wrapper searches for packages at every step."""
        return optimizer if self.accelerator.scaler is None else self.accelerator.prepare_optimizer(optimizer)

    def _diverged(self, role: str, loss: float) -> DivergedError:
        kept = complete_checkpoints(self.run.checkpoints)
        last = (
            f"the last checkpoint is of step {int(kept[-1].name)}" if kept else "there is no checkpoint yet"
        )
        return DivergedError(
            f"the loss of {role} became {loss} at step {self.step}; {last}; "
            f"lower optim.{role}.lr (now {self.configs[role].lr:g}) or set optim.{role}.grad_clip"
        )

    def _after_step(self, meter: _Meter, values: dict[str, Tensor]) -> None:
        last = self.step == self.recipe.steps
        if self.layout.keeps:
            meter.tick(self.step)
            if self.step % self.recipe.log_every == 0 or last:
                self._log(meter, values)
        if self.step % self.recipe.sample_every == 0 or last:
            self._sample()
        if self.step % self.recipe.checkpoint_every == 0:
            self.checkpoint()

    def _log(self, meter: _Meter, values: dict[str, Tensor]) -> None:
        rates = {
            f"{role}_lr": learning_rate(self.configs[role], self.step, self.recipe.steps)
            for role in self.optimizers
        }
        meter.log(self.step, {name: float(value) for name, value in values.items()} | rates)

    def _sample(self) -> None:
        with self.averaged():
            pictures = self.method.preview(self.recipe.seed) if self.layout.keeps else None
        if pictures is not None:
            self.run.sample(self.step, pictures)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """EMA weights in place of the trained ones, whole in the process that keeps results; all processes enter."""
        with contextlib.ExitStack() as stack:
            for role, ema in self.emas.items():
                stack.enter_context(ema.applied(_module(self.method, role)))
            stack.enter_context(self.layout.whole())
            yield

    def checkpoint(self) -> None:
        """Everything that the next steps depend on, written by one process; all call."""
        tensors = self.layout.gathered(self.tensors())
        if not self.layout.keeps:
            return
        save_checkpoint(
            self.run.checkpoints,
            self.step,
            tensors,
            method=self.recipe.method,
            keep=self.recipe.keep_checkpoints,
        )
        self.run.tell("checkpoint", step=self.step)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next steps depend on, by part; shares where the networks are sharded."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for role in self.method.roles:
            tensors[role] = _module(self.method, role).state_dict()
            tensors[f"{role}.optim"] = optimizer_tensors(self.optimizers[role])
        tensors |= {f"{role}.ema": ema.weights for role, ema in self.emas.items()}
        tensors["method"] = self.method.state()
        if self.recipe.micro_batch == "auto":
            tensors["loop"] = {"accumulate": torch.tensor(self.accumulate)}
        return tensors

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`. Raises KeyError or RuntimeError for those of another recipe."""
        for role in self.method.roles:
            module = _module(self.method, role)
            present = module.state_dict()
            given = {name: place(value, present.get(name, value)) for name, value in tensors[role].items()}
            module.load_state_dict(given, strict=True)
            load_optimizer_tensors(self.optimizers[role], tensors[f"{role}.optim"])
        for role, ema in self.emas.items():
            ema.load(tensors[f"{role}.ema"])
        self.method.load_state(tensors["method"])
        if "loop" in tensors and self.recipe.micro_batch == "auto":
            self.accumulate = int(tensors["loop"]["accumulate"])

    def resume(self) -> None:
        """Continue from the run folder's newest checkpoint, if there is one."""
        found = load_latest(self.run.checkpoints, method=self.recipe.method)
        if found is None:
            return
        self.step, tensors = found
        try:
            self.load(tensors)
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(
                f"the checkpoint of step {self.step} does not fit this recipe ({str(error).splitlines()[0]}); "
                "use another run folder or the recipe that made it"
            ) from None
        if self.accelerator.is_main_process:
            self.run.drop_metrics_after(self.step)
            self.run.tell("checkpoint", step=self.step)
        log.info("resumed from step %d", self.step)


def _layout(method: Method, accelerator: Accelerator, sharding: str | None) -> Replicated:
    if sharding is None or accelerator.num_processes == 1:
        return Replicated(method, accelerator)
    from distill_core.training.sharding import Sharded

    return Sharded(method, accelerator)


def _module(method: Method, role: str) -> torch.nn.Module:
    return getattr(method, role)


def _check_roles(method: Method, recipe: Recipe) -> None:
    tables: tuple[tuple[str, Iterable[str]], ...] = (("optim", recipe.optim), ("ema", recipe.ema))
    for table, given in tables:
        for role in given:
            if role not in method.roles:
                raise ConfigError(
                    f"unknown role {table}.{role}{nearest(role, method.roles)}", field=f"{table}.{role}"
                )
    if recipe.batch_size % recipe.accumulate:
        raise ConfigError(
            f"batch_size = {recipe.batch_size} is not divisible by accumulate = {recipe.accumulate}",
            field="accumulate",
        )


class _Meter:
    """Progress with rate and time left, told at most four times a second; metrics to file and TensorBoard."""

    def __init__(self, run: Run, recipe: Recipe, start: int, *, main: bool = True) -> None:
        self.batch_size = recipe.batch_size
        self.run, self.steps, self.start, self.began, self.told = (
            run,
            recipe.steps,
            start,
            time.monotonic(),
            0.0,
        )
        self.board = _tensorboard(run) if main else None

    def tick(self, step: int) -> None:
        now = time.monotonic()
        if now - self.told < 0.25 and step < self.steps:
            return
        self.told = now
        rate = (step - self.start) / max(now - self.began, 1e-9)
        self.run.tell(
            "progress",
            step=step,
            steps=self.steps,
            rate=round(rate, 3),
            eta_s=round((self.steps - step) / rate, 1),
            images_per_second=round(rate * self.batch_size, 2),
            gpu_memory_bytes=torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.run.metrics(step, finite)
        if self.board is not None:
            for name, value in finite.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def _tensorboard(run: Run) -> object | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # metrics.jsonl has everything; TensorBoard is a convenience
        return None
    return SummaryWriter(str(run.folder / "tensorboard"))
