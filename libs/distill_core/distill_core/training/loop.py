"""The one training loop: devices, precision, accumulation, clipping, EMA, checkpoints, resume, logging, stopping."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import Tensor

from distill_core.data.source import Source
from distill_core.errors import ArtifactError, ConfigError, DivergedError, nearest
from distill_core.kinds import find_kind
from distill_core.method import Method, Update
from distill_core.networks.modes import evaluating
from distill_core.recipe import Recipe
from distill_core.recipe.tables import OptimConfig
from distill_core.training.batches import Batches, Draw
from distill_core.training.checkpoint import (
    complete_checkpoints,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from distill_core.training.ema import EMA
from distill_core.training.meter import Meter
from distill_core.training.micro_batch import fitting_accumulate
from distill_core.training.optimizers import build_optimizer, learning_rate
from distill_core.training.run_folder import Run
from distill_core.training.seeding import derive, seed_everything
from distill_core.training.stages import (
    Placed,
    begins_optimizers_anew,
    check_sharded,
    check_tables,
    not_sharded,
    place_stages,
    select_parameters,
    stage_at,
    stage_optim,
)
from distill_core.training.strategy import Replicated, place, trained

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
        self.stages = place_stages(method.stages(getattr(method, "config", None), recipe.steps), recipe.steps)
        check_tables(self.stages, recipe.stages)
        if recipe.sharding is not None:
            check_sharded(self.stages, recipe.stages)
        self.placed = self.stages[0]
        self.arrange()
        self.step = 0
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(source, recipe, rank=rank, world=world)
        self.accumulate = recipe.accumulate  # more with micro_batch = "auto"
        self.alone = False  # True: a step of this process, whose gradients are not averaged with others'

    def arrange(self) -> None:
        """Set up strategy, optimisers and EMA for the networks as they are at the beginning of the stage."""
        method, stage = self.method, self.placed.stage
        select_parameters(method, stage)
        self.strategy = _strategy(method, self.accelerator, self.recipe.sharding)
        self.parameters = self.strategy.parameters
        configs = self.recipe.optim | self._stage_optim()
        self.configs = {role: configs.get(role, OptimConfig()) for role in method.roles}
        self.optimizers = {
            role: self._prepared(
                build_optimizer(_module(method, role), self.parameters[role], self.configs[role])
            )
            for role in method.roles
            if self.parameters[role]
        }
        self.emas = {role: EMA(_module(method, role), decay) for role, decay in self.recipe.ema.items()}

    def _stage_optim(self) -> dict[str, OptimConfig]:
        return stage_optim(self.recipe.stages, self.placed)

    def enter(self, placed: Placed, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        """Begin a stage: the method prepares it, and where networks changed or it says `restart`, so does the loop.

        `shapes` are those of a checkpoint inside the stage, whose tensors are loaded next.
        """
        begins_anew, self.placed = begins_optimizers_anew(self.recipe.stages, self.placed, placed), placed
        seed_everything(derive(self.recipe.seed, "stage", placed.stage.name))
        before = self._trained_ids()
        self.method.enter(placed.stage, shapes)
        self.method.to(self.accelerator.device)
        select_parameters(self.method, placed.stage)
        if begins_anew or self._trained_ids() != before:
            if type(self.strategy) is not Replicated:
                raise not_sharded(placed)
            self.arrange()

    def _trained_ids(self) -> dict[str, list[int]]:
        """Identities of the parameters that each role trains now."""
        return {
            role: [id(value) for value in trained(_module(self.method, role))] for role in self.method.roles
        }

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the recipe's last step, or until `should_stop()`.

        Raises:
            DivergedError: a loss is NaN or infinite.
        """
        self.resume()
        self.accelerator.wait_for_everyone()  # nobody writes a checkpoint before all have read the last
        if self.recipe.micro_batch == "auto" and self.step == 0:
            self.accumulate = fitting_accumulate(self)
        with self.batches.ahead():
            return self._train(should_stop)

    def _train(self, should_stop: Callable[[], bool]) -> Outcome:
        meter = Meter(self.run, self.recipe, self.step, main=self.accelerator.is_main_process)
        while self.step < self.recipe.steps:
            if self._all_stop(should_stop()):
                self.checkpoint()
                return Outcome(self.step, stopped=True)
            self.enter_next()
            values = self.train_step()
            self.step += 1
            self._after_step(meter, values)
        if not complete_checkpoints(self.run.checkpoints) or self.step % self.recipe.checkpoint_every:
            self.checkpoint()
        return Outcome(self.step, stopped=False)

    def enter_next(self) -> None:
        """Enter the stage of this step, if that is another one; what it begins with is checkpointed."""
        placed = stage_at(self.stages, self.step)
        if placed.index == self.placed.index:
            return
        self.enter(placed)
        if self.recipe.micro_batch == "auto":
            self.accumulate = fitting_accumulate(self)
        self.checkpoint()
        self.run.tell("stage", name=placed.stage.name, step=self.step, steps=placed.stop - placed.start)

    def _all_stop(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all stop after the same step, or the others would wait for ever."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor([float(asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def train_step(self) -> dict[str, Tensor]:
        """All updates of one step; the logged values by name."""
        seed_everything(derive(self.recipe.seed, self.step, self.accelerator.process_index))
        for role, optimizer in self.optimizers.items():
            rate = self._rate(role)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        batches = self.batches.of(self.step, self.draw())
        generators = [self.method.updates(batch.to(self.accelerator.device), self.step) for batch in batches]
        values: dict[str, Tensor] = {}
        for together in self._lock_step(generators):
            values |= self.apply(together)
        return values

    def draw(self) -> Draw:
        """Which batches a step of this stage has."""
        streams = {name: getattr(self.method, name) for name in self.placed.stage.streams}
        return Draw(self.accumulate, streams)

    def _rate(self, role: str) -> float:
        """The learning rate of this step: over the whole run, or over the stage where that restarts."""
        config, placed = self.configs[role], self.placed
        if placed.stage.restart or self._stage_optim():
            return learning_rate(config, self.step - placed.start, placed.stop - placed.start)
        return learning_rate(config, self.step, self.recipe.steps)

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
        with self.strategy.following():
            with self.accelerator.autocast():
                update = next(generator, None)
            if update is None or update.loss is None:
                return update
            self.accelerator.backward(update.loss / micro, inputs=self.strategy.leaves[update.role])
        return replace(update, loss=update.loss.detach())

    def apply(self, updates: tuple[Update, ...]) -> dict[str, Tensor]:
        """Step one role on the gradient of the mean loss of its micro-batches."""
        if updates[0].loss is None:
            return self._changed_by_itself(updates)
        role, parameters = updates[0].role, self.parameters[updates[0].role]
        optimizer, config = self.optimizers[role], self.configs[role]
        loss = torch.stack([update.loss.float() for update in updates if update.loss is not None]).mean()
        if not torch.isfinite(loss):
            raise self._diverged(role, float(loss))
        if not self.alone:
            self.strategy.average(role)
        if config.grad_clip is not None:
            self.accelerator.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if role in self.emas:
            self.emas[role].update(_module(self.method, role))
        return {f"{role}_loss": loss, **_logged(updates[0])}

    def _changed_by_itself(self, updates: tuple[Update, ...]) -> dict[str, Tensor]:
        """Take over a role that the method changed without a loss: the same on all processes, finite, in the EMA."""
        role = updates[0].role
        if len(updates) > 1:
            raise ConfigError(
                f"method {self.recipe.method} changes {role or 'its state'} in a closed form, which no micro-batches "
                "share; set accumulate = 1",
                field="accumulate",
            )
        if role:
            module = _module(self.method, role)
            tensors = [*module.parameters(), *module.buffers()]
            if self.accelerator.num_processes > 1 and not self.alone:
                broadcast(tensors, from_process=0)
            if not all(bool(torch.isfinite(value).all()) for value in tensors if value.is_floating_point()):
                raise DivergedError(
                    f"what the method found for {role} is not finite at step {self.step}; {self._last_kept()}"
                )
            if role in self.emas:
                self.emas[role].copy(module)
        return _logged(updates[0])

    def _prepared(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """In accelerate's wrapper where fp16 needs its scaler: the wrapper searches for packages at every step."""
        return optimizer if self.accelerator.scaler is None else self.accelerator.prepare_optimizer(optimizer)

    def _diverged(self, role: str, loss: float) -> DivergedError:
        return DivergedError(
            f"the loss of {role} became {loss} at step {self.step}; {self._last_kept()}; "
            f"lower optim.{role}.lr (now {self.configs[role].lr:g}) or set optim.{role}.grad_clip"
        )

    def _last_kept(self) -> str:
        kept = complete_checkpoints(self.run.checkpoints)
        return (
            f"the last checkpoint is of step {int(kept[-1].name)}" if kept else "there is no checkpoint yet"
        )

    def _after_step(self, meter: Meter, values: dict[str, Tensor]) -> None:
        last = self.step == self.recipe.steps
        if self.strategy.keeps:
            meter.tick(self.step)
            if self.step % self.recipe.log_every == 0 or last:
                self._log(meter, values)
        if self.step % self.recipe.sample_every == 0 or last:
            self._sample()
        if self.step % self.recipe.checkpoint_every == 0:
            self.checkpoint()

    def _log(self, meter: Meter, values: dict[str, Tensor]) -> None:
        rates = {f"{role}_lr": self._rate(role) for role in self.optimizers}
        meter.log(self.step, {name: float(value) for name, value in values.items()} | rates)

    def _sample(self) -> None:
        with self.averaged():
            pictures = self._preview() if self.strategy.keeps else None
        if pictures is not None:
            self.run.sample(self.step, pictures)

    def _preview(self) -> Tensor | None:
        """Pictures of what the run would publish now, as its kind shows it."""
        model = self.method.main
        if not hasattr(model, "kind"):
            return None
        return find_kind(model.kind).preview(model, self.source, self.recipe.seed, self.method.references())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """EMA weights in place of the trained ones, in evaluation mode, whole in the process that keeps results.

        All processes enter.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.method))
            for role, ema in self.emas.items():
                stack.enter_context(ema.applied(_module(self.method, role)))
            stack.enter_context(self.strategy.whole())
            yield

    def checkpoint(self) -> None:
        """Everything that the next steps depend on, written by one process; all call."""
        tensors = self.strategy.gathered(self.tensors())
        if not self.strategy.keeps:
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
            if role in self.optimizers:
                tensors[f"{role}.optim"] = optimizer_tensors(self.optimizers[role])
        tensors |= {f"{name}.held": _module(self.method, name).state_dict() for name in self.method.held}
        tensors |= {f"{role}.ema": ema.weights for role, ema in self.emas.items()}
        tensors["method"] = self.method.state()
        loop = {}
        if self.recipe.micro_batch == "auto":
            loop["accumulate"] = torch.tensor(self.accumulate)
        if len(self.stages) > 1:
            loop["stage"] = torch.tensor(self.placed.index)
        return tensors | ({"loop": loop} if loop else {})

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`. Raises KeyError or RuntimeError for those of another recipe."""
        for role in self.method.roles:
            module = _module(self.method, role)
            present = module.state_dict()
            weights = {name: place(value, present.get(name, value)) for name, value in tensors[role].items()}
            module.load_state_dict(weights, strict=True)
            if role in self.optimizers:
                load_optimizer_tensors(self.optimizers[role], tensors[f"{role}.optim"])
        for name in self.method.held:
            _module(self.method, name).load_state_dict(tensors[f"{name}.held"], strict=True)
        for role, ema in self.emas.items():
            ema.load(tensors[f"{role}.ema"])
        self.method.load_state(tensors["method"])
        if self.recipe.micro_batch == "auto" and "accumulate" in tensors.get("loop", {}):
            self.accumulate = int(tensors["loop"]["accumulate"])

    def resume(self) -> None:
        """Continue from the run folder's newest checkpoint, if there is one."""
        checkpoint = load_latest(self.run.checkpoints, method=self.recipe.method)
        if checkpoint is None:
            return
        self.step, tensors = checkpoint
        try:
            self._return_to_stage(tensors)
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

    def _return_to_stage(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Enter the stages up to that of a checkpoint, so that its tensors find their modules.

        Which one it is, checkpoints of the first release do not say: it is that of the last step.
        """
        written = tensors.get("loop", {}).get("stage")
        last = stage_at(self.stages, max(self.step - 1, 0)).index
        index = last if written is None else int(written)
        shapes = {
            f"{part}/{name}": tuple(v.shape) for part, values in tensors.items() for name, v in values.items()
        }
        for placed in self.stages:
            if self.placed.index < placed.index <= index:
                self.enter(placed, shapes)


def _logged(update: Update) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).detach() for name, value in update.metrics.items()}


def _strategy(method: Method, accelerator: Accelerator, sharding: str | None) -> Replicated:
    if sharding is None or accelerator.num_processes == 1:
        return Replicated(method, accelerator)
    from distill_core.training.sharding import Sharded

    return Sharded(method, accelerator)


def _module(method: Method, role: str) -> torch.nn.Module:
    module: torch.nn.Module = getattr(method, role)
    return module


def _check_roles(method: Method, recipe: Recipe) -> None:
    tables: tuple[tuple[str, Iterable[str]], ...] = (("optim", recipe.optim), ("ema", recipe.ema))
    for table, roles in tables:
        for role in roles:
            if role not in method.roles:
                raise ConfigError(
                    f"unknown role {table}.{role}{nearest(role, method.roles)}", field=f"{table}.{role}"
                )
    if recipe.batch_size % recipe.accumulate:
        raise ConfigError(
            f"batch_size = {recipe.batch_size} is not divisible by accumulate = {recipe.accumulate}",
            field="accumulate",
        )
