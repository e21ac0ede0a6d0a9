"""Several networks as one: each condition has a part, each part an expert of its own.

    D(x_sigma, sigma, c) = D_k(x_sigma, sigma, c),   k = route(c)

A model's folder holds `distillery.json` with the partition, for prompts `router.safetensors` with its centroids,
`experts/0` to `experts/K-1`, each a diffusers folder, and once what all share: `vae/`, `text_encoder/`, `tokenizer/`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_core.artifacts.model_card import CARD
from distill_core.config import Config
from distill_core.diffusion.routing import ROUTER, PartitionSpec, class_parts, pooled, prompt_parts
from distill_core.errors import ArtifactError, ConfigError, missing_package
from distill_core.files.json_tables import read_table
from distill_core.kinds.denoiser.card import Card
from distill_core.method import Cond
from distill_core.networks.adapters import plain
from distill_core.networks.denoiser import Denoiser
from distill_core.networks.diffusers_denoiser import SIDECAR
from distill_core.networks.diffusers_io import load_companions, load_denoiser
from distill_core.networks.fake_score import FakeScore

EXPERTS = "experts"
BALANCING_STEPS = 500


class RoutedSidecar(Config):
    """Content of a routed model's `distillery.json`."""

    partition: PartitionSpec


class ConditionPartition(nn.Module):
    """K disjoint parts of the conditions; what decides is buffers, saved and moved with the weights."""

    table: Tensor
    centroids: Tensor | None
    offsets: Tensor | None

    def __init__(
        self, spec: PartitionSpec, *, centroids: Tensor | None = None, offsets: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec, self.parts = spec, spec.parts
        self.register_buffer("table", torch.tensor(spec.table))
        self.register_buffer("centroids", centroids)
        self.register_buffer("offsets", offsets)

    @classmethod
    def whole(cls) -> ConditionPartition:
        """One part for everything."""
        return cls(PartitionSpec(kind="none", parts=1))

    @classmethod
    def blocks(cls, num_classes: int, parts: int) -> ConditionPartition:
        """Consecutive class labels, as many in each part, or one more where they do not divide.

        Raises:
            ConfigError: more parts than classes.
        """
        if parts > num_classes:
            raise ConfigError(f"{num_classes} classes do not make {parts} parts", field="config.parts")
        of_class = tuple(label * parts // num_classes for label in range(num_classes))
        return cls(PartitionSpec(kind="class_label", parts=parts, of_class=of_class))

    @classmethod
    def of_classes(cls, classes: Sequence[Sequence[int]], num_classes: int) -> ConditionPartition:
        """The classes of each part as given.

        Raises:
            ConfigError: a class that is in no part, in two, or does not exist.
        """
        part_of = {label: part for part, labels in enumerate(classes) for label in labels}
        listed = sorted(label for labels in classes for label in labels)
        if listed != list(range(num_classes)):
            raise ConfigError(
                f"the lists of classes must hold each of 0 to {num_classes - 1} exactly once",
                field="config.classes",
            )
        of_class = tuple(part_of[label] for label in range(num_classes))
        return cls(PartitionSpec.parse({"kind": "class_label", "parts": len(classes), "of_class": of_class}))

    @classmethod
    def of_prompts(cls, embeds: Tensor, parts: int, *, seed: int) -> ConditionPartition:
        """The k-means clusters of pooled prompts (N, D), with handicaps that make them equally large.

        Raises:
            ConfigError: fewer different prompts than parts.
        """
        if len(embeds.unique(dim=0)) < parts:
            raise ConfigError(f"{len(embeds)} prompts do not make {parts} parts", field="config.parts")
        centroids = _kmeans(embeds, parts, seed)
        spec = PartitionSpec(kind="prompt", parts=parts)
        return cls(spec, centroids=centroids, offsets=balancing_offsets(embeds, centroids))

    def route(self, cond: Cond | None, batch: int) -> Tensor:
        """The part (B,) int64 of each of `batch` items."""
        if not cond or self.parts == 1:
            return self.table[-1:].expand(batch)
        if self.spec.kind == "class_label":
            parts: Tensor = class_parts(cond["class_label"], self.table)
        else:
            parts = prompt_parts(pooled(cond["prompt_embeds"].float()), self.centroids, self.offsets)
        return parts

    def save(self, folder: Path) -> None:
        """Write the sidecar, and the centroids if there are any."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.centroids is not None and self.offsets is not None:
            tensors = {"centroids": self.centroids, "offsets": self.offsets}
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / ROUTER)
        sidecar = RoutedSidecar(partition=self.spec)
        (folder / SIDECAR).write_text(sidecar.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ConditionPartition:
        """The partition that `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        try:
            spec = RoutedSidecar.parse(read_table(folder / SIDECAR)).partition
            tensors = load_file(folder / ROUTER) if spec.kind == "prompt" else {}
            if any(len(value) != spec.parts for value in tensors.values()):
                raise ValueError(f"{ROUTER} is not of {spec.parts} parts")
            return cls(spec, **tensors)
        except (OSError, ValueError, TypeError, SafetensorError, ConfigError) as error:
            raise ArtifactError(f"the partition in {folder} is missing or damaged: {error}") from None


def _kmeans(embeds: Tensor, parts: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise missing_package("scikit-learn", "train") from None
    clusters = KMeans(parts, random_state=seed % 2**32, n_init=4).fit(embeds.double().cpu().numpy())
    return torch.from_numpy(clusters.cluster_centers_).float()


def balancing_offsets(embeds: Tensor, centroids: Tensor) -> Tensor:
    """Handicaps (K,) under which the centroids (K, D) have equally many of the pooled prompts (N, D) as nearest.

    Ascent of the dual of optimal transport to equal masses; the best offsets met are kept, and where none is
    exact the sizes differ a little.
    """
    embeds, parts = embeds.to(centroids), len(centroids)
    spread = torch.cdist(embeds, centroids).square().mean()
    offsets, best, worst = torch.zeros(parts), torch.zeros(parts), float("inf")
    for step in range(BALANCING_STEPS):
        sizes = prompt_parts(embeds, centroids, offsets).bincount(minlength=parts)
        excess = sizes / len(embeds) - 1 / parts
        if excess.abs().max() < worst:
            best, worst = offsets, float(excess.abs().max())
        offsets = offsets - spread * excess / (1 + step) ** 0.5
    return best


class Routed(nn.Module):
    """Experts behind a partition, and the splitting of a batch among them."""

    runs_in_part = True  # which experts a pass calls depends on its items

    def __init__(self, experts: Iterable[nn.Module], partition: ConditionPartition) -> None:
        super().__init__()
        self.experts, self.partition = nn.ModuleList(experts), partition

    def expert(self, part: int) -> Any:
        """The network of one part."""
        return self.experts[part]

    def split(self, call: Callable[..., Any], cond: Cond | None, *tensors: Tensor) -> Any:
        """`call(expert, *tensors, cond)` for each part's own items, the results in the batch's order.

        Results are tensors, or tuples and lists of them, batch first. A batch of one part is not copied.
        """
        parts = self.partition.route(cond, len(tensors[0]))
        present = parts.unique().tolist()
        if len(present) == 1:
            return call(self.expert(present[0]), *tensors, cond)
        chosen = [(parts == part).nonzero().squeeze(1) for part in present]
        order = torch.cat(chosen).argsort()
        results = []
        for part, items in zip(present, chosen, strict=True):
            own = {name: value[items] for name, value in (cond or {}).items()}
            results.append(call(self.expert(part), *(value[items] for value in tensors), own))
        return _joined(results, order)


def _joined(results: list[Any], order: Tensor) -> Any:
    if isinstance(results[0], Tensor):
        return torch.cat(results)[order]
    return type(results[0])(_joined(list(column), order) for column in zip(*results, strict=True))


class RoutedDenoiser(Routed, Denoiser):
    """K denoisers of one kind as one denoiser, which answers each item with its part's expert."""

    def __init__(self, experts: Sequence[Denoiser], partition: ConditionPartition) -> None:
        if len(experts) != partition.parts:
            raise ConfigError(
                f"{partition.parts} parts need as many experts, and here are {len(experts)}",
                field="config.parts",
            )
        super().__init__(experts, partition)
        self._like(experts[0])

    @property
    def _members(self) -> list[Denoiser]:
        """The experts in memory; of a stored model the default part's alone."""
        return [Routed.expert(self, index) for index in range(len(self.experts))]

    def _like(self, first: Denoiser) -> None:
        self.image, self.cond, self.schedule = first.image, first.cond, first.schedule
        self.sampler = first.sampler

    def forward(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None, time: Tensor | None = None
    ) -> Tensor:
        def call(expert: Denoiser, x: Tensor, level: Tensor, *rest: Any) -> Tensor:
            *told, own = rest
            return expert(x, level, own, *told)

        x0: Tensor = self.split(call, cond, x_sigma, sigma, *(() if time is None else (time,)))
        return x0

    def with_features(
        self, x_sigma: Tensor, sigma: Tensor, cond: Cond | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        both: tuple[Tensor, list[Tensor]] = self.split(
            lambda expert, *inputs: expert.with_features(*inputs), cond, x_sigma, sigma
        )
        return both

    def guided(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        cond: Cond | None,
        guidance: float | Tensor,
        time: Tensor | None = None,
    ) -> Tensor:
        """x0 under guidance: both halves by the expert of the condition, whatever part the null condition has."""
        by_item = {"guidance": guidance, "time": time}
        split = {name: value for name, value in by_item.items() if isinstance(value, Tensor)}

        def call(expert: Denoiser, x: Tensor, level: Tensor, *rest: Any) -> Tensor:
            *values, own = rest
            given = {"guidance": guidance, **dict(zip(split, values, strict=True))}
            return expert.guided(x, level, own, **given)

        x0: Tensor = self.split(call, cond, x_sigma, sigma, *split.values())
        return x0

    def null_cond(self, batch: int) -> Cond:
        return self._members[0].null_cond(batch)

    def encode(self, picture: Tensor) -> Tensor:
        return self._members[0].encode(picture)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        return self._members[0].encode_prompts(prompts)

    def encode_negative(self, prompts: list[str]) -> Cond:
        return self._members[0].encode_negative(prompts)

    def decode(self, x0: Tensor) -> Tensor:
        return self._members[0].decode(x0)

    def enable_gradient_checkpointing(self) -> None:
        for expert in self._members:
            expert.enable_gradient_checkpointing()

    def save(self, folder: Path) -> None:
        """Write the partition, an `experts/` folder each for plain diffusers, and once what they share."""
        for part, expert in enumerate(self._members):
            whole: Any = plain(expert)  # a DiffusersDenoiser: nothing else has a folder
            bare = whole.bare()
            bare.sampler = self.sampler
            bare.save(folder / EXPERTS / str(part))
            (folder / EXPERTS / str(part) / CARD).unlink()  # one for all, below
        described = whole.with_network(whole.network)
        described.sampler = self.sampler
        described.save_description(folder, whole.save_companions(folder), inside=f"{EXPERTS}/0/")
        self.partition.save(folder)  # in the place of one denoiser's sidecar

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        own = {"sampler": self.sampler, "partition": self.partition.spec}
        return self._members[0].card().model_copy(update=own)


class StoredExperts(RoutedDenoiser):
    """A saved routed model whose experts are read when they are first asked, by whichever thread comes first.

    The default part's is read at once; `on_read` is told the part of each.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        partition = ConditionPartition.load(folder)
        for part in range(partition.parts):
            _expert_folder(folder, part)  # a folder that lacks one is refused now, not at its first request
        self._folder, self._device, self._on_read = folder, device, on_read
        self._companions = load_companions(folder, device=device)
        self._opened: dict[int, Denoiser] = {}
        self._lock = threading.Lock()
        Routed.__init__(self, [self.expert(partition.spec.default)], partition.to(device))
        self._like(self._members[0])

    def expert(self, part: int) -> Denoiser:
        with self._lock:
            if part not in self._opened:
                folder = _expert_folder(self._folder, part)
                self._opened[part] = load_denoiser(folder, device=self._device, companions=self._companions)
                if self._on_read is not None:
                    self._on_read(part)
            return self._opened[part]

    def all_loaded(self) -> RoutedDenoiser:
        """The model with every expert in memory, as training needs it."""
        return RoutedDenoiser([self.expert(part) for part in range(self.partition.parts)], self.partition)


def _expert_folder(folder: Path, part: int) -> Path:
    path = folder / EXPERTS / str(part)
    if not path.is_dir():
        raise ArtifactError(f"{folder} lacks {EXPERTS}/{part}; publish the model again")
    return path


class RoutedFakeScore(Routed):
    """Each expert's own fake score, with its own real/fake head if it has one."""

    def __init__(self, experts: Iterable[FakeScore], partition: ConditionPartition) -> None:
        super().__init__(experts, partition)

    def forward(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x0 (B, C, H, W)."""
        x0: Tensor = self.split(lambda expert, *inputs: expert(*inputs), cond, x_sigma, sigma)
        return x0

    def with_logits(self, x_sigma: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """x0 (B, C, H, W) and the real/fake logits (B,), from one pass."""
        both: tuple[Tensor, Tensor] = self.split(
            lambda expert, *inputs: expert.with_logits(*inputs), cond, x_sigma, sigma
        )
        return both
