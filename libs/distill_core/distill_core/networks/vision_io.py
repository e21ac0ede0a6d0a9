"""Vision models from folders that transformers wrote: config.json, model.safetensors, preprocessor_config.json."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distill_core.errors import ArtifactError, ConfigError, nearest
from distill_core.networks.fake_tensors import is_faked
from distill_core.networks.foreign.vision import (
    PROCESSOR,
    check_config,
    class_names,
    read_preprocessing,
    table_of,
)
from distill_core.networks.foreign.weights import variant_of
from distill_core.networks.foreign_configs import check_numbers
from distill_core.networks.predictor import Predictor, PredictorFile
from distill_core.networks.predictors import network_types
from distill_core.networks.preprocessing import Preprocessing
from distill_core.networks.vision import ClassifierArgs, VisionArgs, VisionNetwork, reason_of
from distill_core.recipe.tables import NetworkConfig
from distill_core.signature import Function, TensorSpec

CONFIG, ADAPTER = "config.json", "adapter_config.json"
LARGEST = 1024  # pixels along a side of a picture that is resized
log = logging.getLogger(__name__)


def is_transformers_folder(folder: Path) -> bool:
    """Whether transformers wrote the model in this folder, of whichever class."""
    try:
        table = table_of(folder / CONFIG)
    except ArtifactError:
        return False
    return isinstance(table.get("architectures"), list) and "model_type" in table


def load_vision(folder: Path, *, device: str = "cpu") -> Predictor:
    """The vision model in a folder of transformers, frozen, in evaluation mode.

    Raises:
        ArtifactError: a class or key that is not understood, no safetensors, or weights that are not the config's.
    """
    path = folder / CONFIG
    table = table_of(path)
    check_numbers(folder)
    cls = _class(path, table)
    preprocessing = read_preprocessing(folder)
    if preprocessing is None:
        log.warning("%s has no %s: pictures go in as they are, from -1 to 1", folder, PROCESSOR)
    theirs = _config(path, table, cls)
    args = _arguments(path, theirs, cls, preprocessing or Preprocessing())
    names = class_names(path, theirs.id2label) if isinstance(args, ClassifierArgs) else ()
    network = _network(path, cls, args)
    check_config(path, table, network.model.config.to_dict(), cls.idle)
    if not is_faked():
        network.model = _with_weights(folder, cls, network.model.config)
    described = PredictorFile(
        network=NetworkConfig(name=cls.__name__, args=args.model_dump(mode="json")),
        functions={"predict": Function(inputs={"image": _image(args)}, outputs=network.outputs())},
        class_names=names,
    )
    return Predictor(network, described).to(device).eval().requires_grad_(False)


def _class(path: Path, table: Mapping[str, Any]) -> type[VisionNetwork]:
    known = {name: cls for name, cls in network_types().items() if issubclass(cls, VisionNetwork)}
    said = table.get("architectures")
    name = str(said[0]) if isinstance(said, list) and len(said) == 1 else str(said)
    if name not in known or known[name].model_type != table.get("model_type"):
        raise ArtifactError(
            f"{path} is of a {name} (model_type {table.get('model_type')}), which is not read{nearest(name, known)}"
        )
    return known[name]


def _config(path: Path, table: Mapping[str, Any], cls: type[VisionNetwork]) -> Any:
    """The config as transformers reads it: what it does not say has the class's default."""
    try:
        return cls.library_class().config_class(**table)
    except Exception as error:  # transformers raises its own kinds
        raise ArtifactError(f"{path} is damaged: {reason_of(error)}") from None


def _arguments(path: Path, theirs: Any, cls: type[VisionNetwork], preprocessing: Preprocessing) -> VisionArgs:
    values = theirs.to_dict()
    values |= {"shape": (theirs.num_channels, *_size(path, values, cls, preprocessing))}
    values |= {"num_classes": theirs.num_labels, "preprocessing": preprocessing.model_dump()}
    try:
        return cls.Args.parse({name: values[name] for name in cls.Args.model_fields if name in values})
    except ConfigError as error:
        raise ArtifactError(f"{path} says what is not understood: {error}") from None


def _size(
    path: Path, values: Mapping[str, Any], cls: type[VisionNetwork], preprocessing: Preprocessing
) -> tuple[int, int]:
    """(height, width) of the pictures that the network is given."""
    said = values.get("image_size")
    size = (said, said) if isinstance(said, int) else tuple(said) if isinstance(said, list | tuple) else None
    made = preprocessing.size(LARGEST, LARGEST) if preprocessing.resize or preprocessing.crop else None
    if cls.sized and made is not None and made != size:
        raise ArtifactError(
            f"{path} says image_size = {said}, and {PROCESSOR} makes pictures of {made[0]} x {made[1]}"
        )
    found = made or size
    if found is None or len(found) != 2:
        raise ArtifactError(
            f"{path} says no size of pictures; add a {PROCESSOR} with size, which resizes them"
        )
    return found


def _image(args: VisionArgs) -> TensorSpec:
    """Pictures of any size where the preprocessing resizes them."""
    if args.preprocessing.resize is None:
        return TensorSpec(dtype="float32", shape=args.shape, low=-1, high=1)
    free, most = (args.shape[0], -1, -1), (args.shape[0], LARGEST, LARGEST)
    return TensorSpec(dtype="float32", shape=free, max_shape=most, low=-1, high=1)


def _network(path: Path, cls: type[VisionNetwork], args: VisionArgs) -> VisionNetwork:
    """The network without its weights, which are in the folder."""
    try:
        with contextlib.nullcontext() if is_faked() else torch.device("meta"):
            return cls(args)
    except ConfigError as error:
        raise ArtifactError(f"{path} says what is not understood: {error}") from None


def _with_weights(folder: Path, cls: type[VisionNetwork], config: Any) -> Any:
    """The model with the folder's weights, in float32 whatever they are kept in."""
    if (folder / ADAPTER).is_file():
        raise ArtifactError(
            f"{folder / ADAPTER} changes the model, and is not read; merge the adapter and save it"
        )
    variant = variant_of(folder, "model")
    try:
        with _silent():
            model, report = cls.library_class().from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
            )
    except Exception as error:  # safetensors and transformers each raise their own kinds on damaged files
        raise ArtifactError(
            f"{folder} holds weights that are damaged or of another network: {reason_of(error)}"
        ) from None
    for what in ("missing", "unexpected", "mismatched"):
        if wrong := sorted(map(str, report.get(f"{what}_keys") or ())):
            raise ArtifactError(
                f"{folder} holds the weights of another network than its {CONFIG} describes: {what} {wrong[0][:120]}"
            )
    return model


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No bars and tables of transformers; what is wrong is said in a sentence."""
    from transformers.utils import logging as told

    level, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity(logging.CRITICAL)
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if bars:
            told.enable_progress_bar()
