"""Hybrid Distillation: how tokens relate is of a masked teacher, what they are of one that knows classes.

    L = a mean_(X in Q, K, V) KL(R_t^X || R_s^X) + b smooth_l1(W f_s, norm(f_c)),    R^X = softmax(X X^T / sqrt(d))

Q, K, V (B, heads, T, d): queries, keys and values of the last blocks of the masked teacher t and of the student,
cut into as many heads; f: tokens that the encoders of the second teacher c and of the student give; norm has no
weights, W is one linear layer. While it is pretrained, more and more of the patches that are most like the others are
left out, of all three: the masked teacher's keys say which. The paper gives this structure; that relations are of the
last blocks is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.losses.distillation import reduced
from distill_core.methods.recognition._masked import MaskedConfig, MaskedStudent
from distill_core.metrics.attention import (
    attention_distance,
    attention_maps,
    effective_rank,
    head_similarity,
    heads_of,
)
from distill_core.networks.masked import PROJECTIONS, MaskedEncoder, TokenMask, aligned, mask_of
from distill_core.networks.modes import evaluating
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig


class Config(MaskedConfig):
    relation_weight: float = Field(1.0, ge=0)  # a; 0: the masked teacher's relations do not enter
    feature_weight: float = Field(1.0, ge=0)  # b; 0: the second teacher is not asked
    relation_heads: int = Field(4, ge=1, le=256)  # of queries, keys and values, on both sides
    left_out: float = Field(0.33, ge=0, lt=1)  # share of the patches at the end of the first stage; 0: none

    @model_validator(mode="after")
    def _somebody_teaches(self) -> Self:
        if not (self.relation_weight or self.feature_weight or not self.pretrain_steps):
            raise ValueError(
                "relation_weight and feature_weight are both 0: set pretrain_steps = 0, or one of them"
            )
        return self


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """(B,) KL of the relations among the teacher's tokens (B, T, D) to those among the student's (B, T, D')."""
    own, other = (_log_relations(tokens, heads) for tokens in (student, teacher))
    return F.kl_div(own, other, reduction="none", log_target=True).sum(3).mean((1, 2))


def _log_relations(tokens: Tensor, heads: int) -> Tensor:
    split = heads_of(tokens.float(), heads)
    scores: Tensor = split @ split.transpose(2, 3) / split.shape[3] ** 0.5
    return scores.log_softmax(3)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,) smooth L1 distance of tokens (B, T, D) to the teacher's, each of these brought to mean 0 and variance 1."""
    target = F.layer_norm(teacher.float(), teacher.shape[-1:])
    return F.smooth_l1_loss(student.float(), target, reduction="none").mean((1, 2))


def likeness(keys: Tensor) -> Tensor:
    """(B, N) mean cosine of each patch's keys (B, N, D) with those of all patches."""
    rows = F.normalize(keys.float(), dim=2)
    return (rows @ rows.transpose(1, 2)).mean(2)


class HybridDistillation(MaskedStudent):
    paper = (
        "Shi et al. 2023, Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners, "
        "arXiv 2306.15876"
    )
    config: Config

    def __init__(
        self,
        config: Config,
        *,
        teacher: nn.Module,
        features: nn.Module,
        network: NetworkConfig,
        data: Source,
        unlabelled: Source,
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.features = config, teacher, features
        self.begin(network, data, unlabelled)
        self.related = self.read(teacher, field="teacher")
        self.featured = self.read(features, field="teachers.features")
        for encoder in (self.encoder, self.related):
            encoder.check_heads(config.relation_heads, field="config.relation_heads")
        self.student.exits.append(nn.Linear(self.encoder.width, self.featured.width))

    def pretraining(self, x0: Tensor, step: int) -> dict[str, Tensor]:
        mask = self.mask_at(x0, step)
        hidden, own = self.encoder.with_projections(x0, mask)
        losses = {}
        if self.config.relation_weight:
            with torch.no_grad():
                theirs = self.related.with_projections(x0, mask)[1]
            losses["relation_loss"] = self.config.relation_weight * self.relations(own, theirs)
        if self.config.feature_weight:
            with torch.no_grad():
                wanted = self.featured(x0, mask)
            ours, wanted = aligned(self.encoder, hidden, self.featured, wanted)
            distance = feature_loss(self.student.exits[0](ours), wanted)
            losses["feature_loss"] = self.config.feature_weight * reduced(distance)
        return losses

    def relations(self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """The mean (scalar) over queries, keys and values."""
        pairs = [aligned(self.encoder, own[name], self.related, theirs[name]) for name in PROJECTIONS]
        losses = [relation_loss(ours, wanted, self.config.relation_heads) for ours, wanted in pairs]
        return reduced(torch.stack(losses).mean(0))

    @torch.no_grad()
    def mask_at(self, x0: Tensor, step: int) -> TokenMask | None:
        """Which patches are left out at a step of the first stage, linearly more of them; None: none."""
        share = self.config.left_out * step / max(self.config.pretrain_steps, 1)
        if round(share * self.encoder.num_patches) < 1:
            return None
        keys = self.related.with_projections(x0)[1]["keys"]
        return mask_of(likeness(self.related.with_prefixes(keys, 0)), share)

    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """What attention and features look like in the last block, of the student and of both teachers."""
        x0 = self.unlabelled.all(config.num_samples).columns["x0"].to(self.device)
        shown = {"": self.encoder, "masked_": self.related, "classes_": self.featured}
        return {
            f"{owner}{name}": value
            for owner, encoder in shown.items()
            for name, value in looks(encoder, x0).items()
        }


@torch.no_grad()
def looks(encoder: MaskedEncoder, x0: Tensor) -> dict[str, float]:
    """Figures of an encoder's last block for pictures (B, C, H, W)."""
    with evaluating(encoder.network):
        hidden, found = encoder.with_projections(x0)
    maps = attention_maps(found["queries"], found["keys"], encoder.num_heads)
    columns = x0.shape[3] // encoder.patch_size
    figures = {
        "attention_distance": attention_distance(maps, columns, encoder.prefixes),
        "feature_rank": effective_rank(encoder.with_prefixes(hidden, 0)),
    }
    if encoder.num_heads > 1:
        figures["head_similarity"] = head_similarity(maps)
    return figures
