"""Scalars as further inputs of a diffusers network, such as guidance: added to its embedding of time and class.

    emb(t, c) + sum_k P_k phi(u_k),    phi(u) = (sin 2 pi f u, 1 - cos 2 pi f u) over frequencies f,   P_k = 0 at first

u is the scalar less its neutral value. So a network that gains an input says what it said before, bit for bit, and one
that was trained with it still does what plain diffusers makes of its folder where the scalar is neutral: guidance 1.
The projections are kept beside the network's own weights, whose names and shapes stay those of its class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_core.errors import ArtifactError, ConfigError

NEUTRAL = {"guidance": 1.0, "gamma": 1.0}  # values at which a network is what it is without the input
SCALARS = "scalars.safetensors"  # in a model's folder
NUM_FREQUENCIES = 12  # from 1/64 to 1 periods per unit


class ScalarEmbedding(nn.Module):
    """A network's own class embedding, or none, and one projection for each scalar.

    Takes (B, 1 + S) float32: the label, then the scalars less their neutral values.
    """

    frequencies: Tensor

    def __init__(self, inner: nn.Module | None, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.inner, self.names = inner, names
        self.projections = nn.ModuleDict(
            {name: nn.Linear(2 * NUM_FREQUENCIES, width, bias=False) for name in names}
        )
        for projection in self.projections.values():
            nn.init.zeros_(projection.weight)  # type: ignore[arg-type]
        self.register_buffer("frequencies", frequencies(), persistent=False)

    def forward(self, packed: Tensor, *others: Any) -> Tensor:
        total = sum(
            projection(periodic(packed[:, index], self.frequencies))
            for index, projection in enumerate(self.projections.values(), start=1)
        )
        assert isinstance(total, Tensor)
        return total if self.inner is None else self.inner(packed[:, 0].long(), *others) + total


def frequencies() -> Tensor:
    """The angular frequencies (F,) of `periodic`, in radians per unit."""
    return 2 * torch.pi * torch.logspace(-6, 0, NUM_FREQUENCIES, base=2.0)


def periodic(offset: Tensor, at: Tensor) -> Tensor:
    """Features phi (B, 2 F) of `offset` (B,) at frequencies (F,); all are 0 where it is 0."""
    angle = offset[:, None] * at
    return torch.cat([angle.sin(), 1 - angle.cos()], 1)


def add_scalars(network: nn.Module, names: tuple[str, ...]) -> None:
    """Give `network` (a UNet or DiT of diffusers) the inputs `names`, in place."""
    for owner, attribute, width in _places(network):
        inner = getattr(owner, attribute)
        embedding = ScalarEmbedding(inner, names, width)
        setattr(owner, attribute, embedding.to(next(network.parameters()).device))


def packed(names: tuple[str, ...], labels: Tensor | None, cond: dict[str, Tensor], like: Tensor) -> Tensor:
    """What `ScalarEmbedding` takes for a batch `like` (B, ...); scalars that `cond` lacks are neutral."""
    batch = like.shape[0]
    first = torch.zeros(batch, device=like.device) if labels is None else labels.float()
    scalars = (
        cond[name].float() - NEUTRAL[name] if name in cond else torch.zeros(batch, device=like.device)
        for name in names
    )
    return torch.stack([first, *scalars], 1)


@contextlib.contextmanager
def without_scalars(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The network as its class is, for the duration; the projections by name."""
    held = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in _places(network)]
    tensors = {
        f"{place}.{name}": projection.weight.detach().cpu().contiguous()
        for place, (_, _, embedding) in enumerate(held)
        for name, projection in embedding.projections.items()
    }
    try:
        for owner, attribute, embedding in held:
            setattr(owner, attribute, embedding.inner)
        yield tensors
    finally:
        for owner, attribute, embedding in held:
            setattr(owner, attribute, embedding)


def save_scalars(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the projections beside the network's folder."""
    save_file(tensors, folder / SCALARS)


def load_scalars(network: nn.Module, names: tuple[str, ...], folder: Path) -> None:
    """Give `network` the inputs `names` with the projections that `folder` keeps.

    Raises:
        ArtifactError: the file is missing, damaged, or one for another network.
    """
    add_scalars(network, names)
    path = folder / SCALARS
    try:
        tensors = load_file(path)
        for place, (owner, attribute, _) in enumerate(_places(network)):
            for name, projection in getattr(owner, attribute).projections.items():
                with torch.no_grad():
                    projection.weight.copy_(tensors.pop(f"{place}.{name}"))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{path} is missing, damaged or of another network: {error}") from None
    if tensors:
        raise ArtifactError(
            f"{path} is of another network: it has {min(tensors)}, which this one has no place for"
        )


def _places(network: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Where a network embeds its class: the module that holds the embedding, its attribute there, and its width."""
    time: Any = getattr(network, "time_embedding", None)
    if time is not None:
        return [(network, "class_embedding", int(time.linear_2.out_features))]
    blocks: Any = getattr(network, "transformer_blocks", ())
    embeddings = [block.norm1.emb for block in blocks if hasattr(getattr(block, "norm1", None), "emb")]
    if not embeddings or not all(hasattr(emb, "class_embedder") for emb in embeddings):
        raise ConfigError(
            f"{type(network).__name__} cannot be told a further number, such as its guidance; choose a UNet or DiT",
            field="teacher",
        )
    return [(emb, "class_embedder", int(emb.timestep_embedder.linear_2.out_features)) for emb in embeddings]
