"""G2SD: a student first repeats a masked teacher's decoder, hidden patches too, then the answers of a trained teacher.

    generic    L = smooth_l1(W decoder_s(encoder_s(seen)), norm(decoder_t(encoder_t(seen))))       all tokens, beta = 2
    specific   L = 1/2 CE(z_cls, y) + 1/2 CE(z_dist, argmax z_t)                                   mixed pictures

decoder_t is read after its block `decoder_block`, norm has no weights, W is a small network that is not published. The
second stage begins with the encoder of the first. The answer is the mean of both heads' logits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.losses.distillation import hard_ce, reduced, soft_ce
from distill_core.method import Update
from distill_core.methods.recognition._masked import MaskedConfig, MaskedStudent
from distill_core.methods.recognition._mixing import mixed_batch
from distill_core.methods.recognition._students import agreement, taught, use_classes_of
from distill_core.networks.masked import MaskedEncoder, TokenMask, new_decoder, random_mask
from distill_core.networks.predictors.vit import ViTMAEForPreTraining
from distill_core.networks.taps import tapping
from distill_core.recipe.tables import NetworkConfig


class Config(MaskedConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # share of the patches that are hidden; the paper's
    decoder_block: int | None = Field(
        None, ge=1
    )  # of the masked teacher, whose output is repeated; the paper's is 4 of 8; unset: the last
    repeated: Literal["all", "hidden"] = "all"  # tokens that the generic loss is of
    decoder_width: int = Field(32, ge=4, le=8192, multiple_of=4)  # of the student's decoder
    decoder_blocks: int = Field(4, ge=1, le=64)  # the paper's
    specific: bool = True  # False: both heads learn the labels, and nobody is asked
    mixup: float = Field(0.8, ge=0, le=8)  # alpha of its Beta distribution; 0: off
    cutmix: float = Field(1.0, ge=0, le=8)  # the same


def repeated_loss(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """(B,) smooth L1 distance with beta = 2 of tokens (B, N, D) to those of the teacher, brought to mean 0, variance 1.

    `counted` (B, N) says which tokens it is the mean of; unset: all.
    """
    target = F.layer_norm(teacher.float(), teacher.shape[-1:])
    losses = F.smooth_l1_loss(student.float(), target, beta=2.0, reduction="none").mean(2)
    if counted is None:
        return losses.mean(1)
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


class G2SD(MaskedStudent):
    paper = "Huang et al. 2023, Generic-to-Specific Distillation of Masked Autoencoders, arXiv 2302.14771"
    config: Config

    def __init__(
        self,
        config: Config,
        *,
        teacher: nn.Module,
        generic: nn.Module,
        network: NetworkConfig,
        data: Source,
        unlabelled: Source,
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.generic = config, teacher, generic
        use_classes_of(teacher, data, "g2sd")
        self.begin(network, data, unlabelled)
        if not hasattr(self.encoder.network, "heads"):
            raise ConfigError(
                "g2sd needs a network with a distillation token; set network.name = "
                f"'DeiTForImageClassificationWithTeacher', not {network.name!r}",
                field="network.name",
            )
        self.taught = self.read(generic, field="teachers.generic")
        self.block = self.read_decoder()
        decoder = new_decoder(self.encoder, config.decoder_width, config.decoder_blocks)
        decoder.decoder_pred = nn.Identity()  # no pixels are painted
        width = config.decoder_width
        target = int(self.taught.base.config.decoder_hidden_size)
        self.student.exits.extend(
            [decoder, nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, target))]
        )

    def read_decoder(self) -> str:
        """The path of the block of the masked teacher's decoder that is repeated.

        Raises:
            ConfigError: it has no decoder, or not so many blocks.
        """
        network = self.taught.network
        if not isinstance(network, ViTMAEForPreTraining):
            raise ConfigError(
                "g2sd needs a masked autoencoder with its decoder, and teachers.generic is a "
                f"{type(network).__name__}; choose a ViTMAEForPreTraining, e.g. recipe = 'mae_digits'",
                field="teachers.generic",
            )
        count = len(network.model.decoder.decoder_layers)
        block = self.config.decoder_block or count
        if block > count:
            raise ConfigError(
                f"config.decoder_block is {block}, and the decoder of teachers.generic has {count} blocks; name one of "
                "these",
                field="config.decoder_block",
            )
        return f"decoder_layers.{block - 1}"

    def pretraining(self, x0: Tensor, step: int) -> dict[str, Tensor]:
        mask = random_mask(self.encoder, x0, self.config.mask_ratio)
        decoder, last = self.student.exits
        own = last(decoded(self.encoder, decoder, "decoder_norm", x0, mask))
        with torch.no_grad():
            network = self.taught.network
            wanted = decoded(self.taught, network.model.decoder, self.block, x0, mask)
        counted = None
        if self.config.repeated == "hidden":
            counted = F.pad(mask.hidden, (1, 0))  # the class token is seen
        return {"repeated_loss": reduced(repeated_loss(own, wanted, counted))}

    def tuning(self, x0: Tensor, labels: Tensor) -> Update:
        target = F.one_hot(labels, len(self.data.class_names)).float()
        mixed, mixed_target = mixed_batch(x0, target, self.config.mixup, self.config.cutmix)
        by_class, by_teacher = self.heads(mixed)
        if self.config.specific:
            second = hard_ce(by_teacher, taught(self.teacher, mixed))
        else:
            second = soft_ce(by_teacher, mixed_target)
        loss = (reduced(soft_ce(by_class, mixed_target)) + reduced(second)) / 2
        return Update("student", loss, agreement((by_class + by_teacher) / 2, mixed_target.argmax(1)))

    def heads(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) of the class token and of the distillation token."""
        both: tuple[Tensor, Tensor] = self.encoder.network.heads(x0)  # type: ignore[operator]
        return both


def decoded(encoder: MaskedEncoder, decoder: nn.Module, path: str, x0: Tensor, mask: TokenMask) -> Tensor:
    """(B, 1 + N, D) of the decoder's module at `path`, of the seen patches of pictures (B, C, H, W)."""
    latent = encoder.with_prefixes(encoder(x0, mask), 1)
    with tapping(decoder, (path,), field="config.decoder_block") as found:
        decoder(latent, mask.restore)
    return found[path]
