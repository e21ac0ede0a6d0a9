"""What the methods of quantised students share: their loss, and what their weights take on disk."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from distill_core.errors import ConfigError
from distill_core.losses.distillation import kl, reduced
from distill_core.method import MethodConfig
from distill_core.networks.packing import packable
from distill_core.networks.predictor import Predictor


class QuantizedConfig(MethodConfig):
    """Settings of both methods."""

    bits: int = Field(
        2, ge=0, le=8
    )  # of a weight: 2^bits points; 0: full precision. 1 bit is known to diverge
    bucket: int = Field(
        256, ge=8, le=2**20
    )  # weights that share scale and offset; the official code's is 256
    temperature: float = Field(2.0, gt=0)  # of both softmaxes; the official code's is 2
    weight: float = Field(0.7, ge=0, le=1)  # of the teacher's predictions; 0: the labels alone


def taught_loss(logits: Tensor, labels: Tensor, teacher: Tensor, config: QuantizedConfig) -> Tensor:
    """W T^2 KL(p_t || p_s) + (1 - w) CE(z_s, y) (scalar) of logits (B, K) and labels (B,)."""
    soft = reduced(kl(logits, teacher, config.temperature))
    return config.weight * soft + (1 - config.weight) * F.cross_entropy(logits, labels)


def weights_to_quantize(predictor: Predictor, config: QuantizedConfig) -> list[str]:
    """Names of the weights of a predictor's network that get few bits; none at 0 bits.

    Raises:
        ConfigError: it has no weights of two axes or more.
    """
    names = packable(predictor.network) if config.bits else []
    if config.bits and not names:
        raise ConfigError(
            "this network has no weights that could be quantised; choose another", field="network"
        )
    return names


def sizes(predictor: Predictor) -> dict[str, float]:
    """Bytes of all that a predictor's file keeps, and bits for each weight that is packed, or could be."""
    tensors = predictor.stored()
    names = predictor.packed or packable(predictor.network)
    count = sum(dict(predictor.network.named_parameters())[name].numel() for name in names)
    own = [value for key, value in tensors.items() if key in names or key.rpartition(".")[0] in names]
    return {
        "weight_bytes": float(sum(value.nbytes for value in tensors.values())),
        "bits_per_weight": 8 * sum(value.nbytes for value in own) / count,
    }
