"""MAE: a vision transformer sees a quarter of a picture's patches, and a small decoder paints the others.

    L = mean over hidden patches of |x_patch - decoder(encoder(seen patches), places)|^2

No label enters it. What it leaves gives embeddings; its decoder stays with it, for students that learn from it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from distill_core.data import Source
from distill_core.errors import ConfigError
from distill_core.losses.distillation import reduced
from distill_core.method import Batch, Method, MethodConfig, Update
from distill_core.networks.masked import MaskedEncoder, hidden_pixel_loss, mask_of, random_mask
from distill_core.networks.modes import evaluating
from distill_core.networks.predictor import IMAGE, Predictor, PredictorFile
from distill_core.networks.predictors import build_network
from distill_core.networks.predictors.vit import ViTMAEForPreTraining
from distill_core.recipe.tables import EvaluateConfig, NetworkConfig
from distill_core.signature import Function, TensorSpec


class Config(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # share of the patches that are hidden; the paper's


class MaskedAutoencoder(Method):
    paper = "He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377"
    kind = "predictor"
    roles = ("autoencoder",)
    result = "autoencoder"

    def __init__(self, config: Config, *, network: NetworkConfig, data: Source) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = new_autoencoder(network, data)
        self.encoder = MaskedEncoder(self.autoencoder, "the network", field="network.name")

    @classmethod
    def columns(cls, config: Config) -> Mapping[str, str]:
        return {"x0": "the pictures that are masked"}

    def updates(self, batch: Batch, step: int) -> Iterator[Update]:
        x0 = batch.columns["x0"]
        noise = torch.rand(len(x0), self.encoder.num_patches, device=x0.device)
        yield Update("autoencoder", reduced(self.losses(x0, noise)))

    def losses(self, x0: Tensor, noise: Tensor) -> Tensor:
        """(B,) losses of pictures (B, C, H, W) whose patches with the highest noise (B, N) are hidden."""
        mask = mask_of(noise, self.config.mask_ratio)
        predicted = self.encoder.network.model.decoder(self.encoder(x0, mask), mask.restore).logits
        return hidden_pixel_loss(predicted, self.encoder.pixels(x0), mask, self.encoder.patch_size)

    @torch.no_grad()
    def figures(self, config: EvaluateConfig) -> dict[str, float]:
        """The error in hidden patches beside the data's variance: 1 is what the mean picture would have."""
        x0 = self.data.all(config.num_samples).columns["x0"].to(self.device)
        with evaluating(self.autoencoder), torch.random.fork_rng([]):
            torch.manual_seed(0)
            mask = random_mask(self.encoder, x0, self.config.mask_ratio)
            predicted = self.encoder.network.model.decoder(self.encoder(x0, mask), mask.restore).logits
            error = hidden_pixel_loss(predicted, self.encoder.pixels(x0), mask, self.encoder.patch_size)
        spread = self.encoder.pixels(x0).var(0, correction=0).mean()
        return {"hidden_error": float(error.mean() / spread)}


def new_autoencoder(network: NetworkConfig, data: Source) -> Predictor:
    """A masked autoencoder with fresh weights, of the data's pictures.

    Raises:
        ConfigError: a network without a decoder, or pictures that it cannot take.
    """
    spec = data.columns["x0"]
    built = build_network(network, {"shape": spec.shape})
    if not isinstance(built, ViTMAEForPreTraining):
        raise ConfigError(
            f"masked_autoencoder needs a network with a decoder; set network.name = 'ViTMAEForPreTraining', not "
            f"{network.name!r}",
            field="network.name",
        )
    image = TensorSpec(dtype="float32", shape=spec.shape, low=-1, high=1)
    described = PredictorFile(
        network=NetworkConfig(name=network.name, args=built.args.model_dump(mode="json")),
        functions={"predict": Function(inputs={IMAGE: image}, outputs=built.outputs())},
    )
    return Predictor(built, described)
