"""Predictor: a network with named functions, on disk as config.json and model.safetensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_core.config import Config
from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.kinds.predictor.card import Card
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.modes import evaluating
from distill_core.networks.packing import PARTS, PackedTensor, Packing
from distill_core.networks.predictors import build_network
from distill_core.recipe.tables import NetworkConfig
from distill_core.signature import Function, FunctionName, TensorSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IMAGE = "image"  # the input that pictures are


def input_of(column: str) -> str:
    """What a predictor calls its input that a column of the data is."""
    return IMAGE if column == "x0" else column


def column_of(name: str) -> str:
    """The inverse of `input_of`."""
    return "x0" if name == IMAGE else name


class PredictorFile(Config):
    """Content of a predictor's config.json."""

    kind: Literal["predictor"] = "predictor"
    version: Literal[1] = 1
    network: NetworkConfig  # with every argument, those that followed from the data too
    functions: dict[FunctionName, Function] = Field(min_length=1)
    class_names: tuple[str, ...] = ()
    packing: Packing | None = None  # of weights that are kept in few bits


class Predictor(nn.Module):
    """A network whose functions are called by name: inputs and outputs are tensors (B, …) by name.

    The function `predict` is the network's forward, any other its method of that name; each takes its inputs in the
    order in which the description names them, and gives one tensor or a tuple in the order of the outputs.
    """

    kind: ClassVar[str] = "predictor"

    def __init__(self, network: nn.Module, described: PredictorFile) -> None:
        super().__init__()
        for name in described.functions:
            if name != "predict" and (hasattr(nn.Module, name) or not hasattr(network, name)):
                raise ConfigError(
                    f"{type(network).__name__} has no function {name!r}", field=f"functions.{name}"
                )
        self.network, self.described = network, described
        self.packed: Mapping[str, PackedTensor] = {}  # weights that are kept in few bits, by name

    def forward(self, *inputs: Tensor) -> Tensor:
        """Output of the network."""
        out: Tensor = self.network(*inputs)
        return out

    def call(self, function: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of `function` by name."""
        spec = self.described.functions[function]
        run = self.network if function == "predict" else getattr(self.network, function)
        out = run(*(inputs[name] for name in spec.inputs if name in inputs))
        return dict(zip(spec.outputs, out if isinstance(out, tuple) else (out,)))

    def card(self) -> Card:
        """Facts that the manifest keeps."""
        return Card(
            functions=self.described.functions,
            class_names=self.described.class_names,
            parameters=sum(value.numel() for value in self.parameters()),
            packed_bits=None if self.described.packing is None else self.described.packing.bits,
        )

    def baked(self, packed: Mapping[str, PackedTensor]) -> Predictor:
        """A frozen copy whose weights of these names are those of `packed`, which its file keeps in few bits."""
        first = next(iter(packed.values()))
        packing = Packing(bits=first.bits, bucket=first.bucket, tensors=tuple(packed))
        other = Predictor(copy.deepcopy(self.network), self.described.model_copy(update={"packing": packing}))
        other.take(packed)
        return other.eval().requires_grad_(False)

    @torch.no_grad()
    def take(self, packed: Mapping[str, PackedTensor]) -> None:
        """Replace the weights of these names by what they are unpacked."""
        weights = dict(self.network.named_parameters())
        for name, value in packed.items():
            weights[name].copy_(value.unpacked())
        self.packed = dict(packed)

    def stored(self) -> dict[str, Tensor]:
        """What model.safetensors keeps, by name."""
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in self.network.state_dict().items()
            if name not in self.packed
        }
        for name, value in self.packed.items():
            tensors |= value.stored(name)
        return tensors

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.described.model_dump_json(indent=1), encoding="utf-8")
        save_file(self.stored(), folder / WEIGHTS)


def image_classifier(
    network: nn.Module, config: NetworkConfig, *, shape: tuple[int, ...], class_names: tuple[str, ...]
) -> Predictor:
    """A predictor of pictures `shape` (C, H, W) in [-1, 1]: one logit for each class.

    `config` names the network; its arguments are those that the network was made of.

    Raises:
        ConfigError: the network cannot take such pictures, or gives something else.
    """
    image = TensorSpec(dtype="float32", shape=shape, low=-1, high=1)
    return classifier_of(network, config, name=IMAGE, spec=image, class_names=class_names)


def classifier_of(
    network: nn.Module, config: NetworkConfig, *, name: str, spec: TensorSpec, class_names: tuple[str, ...]
) -> Predictor:
    """A predictor of items `spec` that it calls `name`: one logit for each class.

    Raises:
        ConfigError: the network cannot take such items, or gives something else.
    """
    _try(network, config.name, name, spec.shape, len(class_names))
    logits = TensorSpec(dtype="float32", shape=(len(class_names),))
    predict = Function(inputs={name: spec}, outputs={"logits": logits})
    args = network.args.model_dump(mode="json")  # type: ignore[operator,union-attr]
    described = PredictorFile(
        network=NetworkConfig(name=config.name, args=args),
        functions={"predict": predict},
        class_names=class_names,
    )
    return Predictor(network, described)


def check_classifier(
    model: Any, shape: tuple[int, ...], owner: str, *, field: str, name: str = IMAGE
) -> None:
    """Refuse a model that does not give logits of its classes for items `shape`, which it calls `name`.

    Raises:
        ConfigError: it is such; `owner` is what the sentence calls it.
    """
    function = model.card().functions["predict"]
    taken, logits = function.inputs.get(name), function.outputs.get("logits")
    if taken is None or logits is None or logits.shape != (len(model.card().class_names),):
        raise ConfigError(
            f"{owner} answers {', '.join(function.outputs)} to {', '.join(function.inputs)}, and a classifier "
            f"answers logits of its classes to {name}; choose another model",
            field=field,
        )
    if not taken.fits(tuple(shape)):
        remedy = "set data.size, or choose" if name == IMAGE else "choose"
        raise ConfigError(
            f"{owner} takes {_items(name)} {taken.described}, and the data's are {tuple(shape)}; {remedy} a model or "
            "data of the other's shape",
            field=field,
        )


def _items(name: str) -> str:
    return "pictures" if name == IMAGE else f"items of {name}"


@torch.no_grad()
def _try(network: nn.Module, name: str, taken: str, shape: tuple[int, ...], num_classes: int) -> None:
    with evaluating(network):
        try:
            out = network(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, ZeroDivisionError, IndexError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{name} cannot take {_items(taken)} of the shape {shape}: {said}; change network.args, or the data's "
                "size",
                field="network.args",
            ) from None
    if not isinstance(out, Tensor) or tuple(out.shape) != (1, num_classes):
        item = "a picture" if taken == IMAGE else f"an item of {taken}"
        shown = f"the shape {tuple(out.shape[1:])}" if isinstance(out, Tensor) else "several tensors"
        raise ConfigError(
            f"{name} gives {shown} for {item}, and a classifier gives {num_classes} logits; choose another network",
            field="network.name",
        )


def load_predictor(folder: Path, *, device: str = "cpu") -> Predictor:
    """The predictor saved in `folder`, frozen, in evaluation mode.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights belong to another network.
    """
    try:
        described = PredictorFile.parse(read_table(folder / CONFIG))
        network = build_network(described.network)
        predictor = Predictor(network, described)
        if not is_faked():
            _read_weights(predictor, load_file(folder / WEIGHTS))
    except (OSError, ValueError, ConfigError, TypeError) as error:
        raise ArtifactError(f"{folder / CONFIG} does not describe a predictor: {error}") from None
    except SafetensorError as error:
        raise ArtifactError(f"{folder / WEIGHTS} is damaged or not safetensors: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{folder / WEIGHTS} is not what {CONFIG} describes: {reason}") from None
    return predictor.to(device).eval().requires_grad_(False)


def _read_weights(predictor: Predictor, tensors: dict[str, Tensor]) -> None:
    """Give the network its weights, unpacked where the file keeps codes.

    Raises:
        ConfigError, RuntimeError: they belong to another network.
    """
    packing = predictor.described.packing
    state = predictor.network.state_dict()
    packed = {}
    for name in () if packing is None else packing.tensors:
        assert packing is not None
        if name not in state:
            raise ConfigError(f"packing.tensors names {name!r}, and the network has no such weights")
        packed[name] = PackedTensor.read(name, tuple(state[name].shape), packing, tensors)
    parts = {name + part for name in packed for part in PARTS}
    plain = {name: value for name, value in tensors.items() if name not in parts}
    unpacked = {name: value.unpacked() for name, value in packed.items()}
    predictor.network.load_state_dict(plain | unpacked, strict=True)
    predictor.packed = packed
