"""Keys of the vision models and picture processors of transformers that are read.

A model's config is read whole: from what is understood of it a config is built, and any other key must say what that
one does. So a key that no code here names is refused wherever it would change an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_core.errors import ArtifactError, ConfigError
from distill_core.files.json_tables import read_table
from distill_core.networks.foreign.keys import Keys, check_keys, names, shown
from distill_core.networks.preprocessing import Preprocessing

READ = names("image_size num_channels num_labels id2label label2id")  # as shape and names of classes
IDLE = names(
    """
    architectures model_type transformers_version torch_dtype dtype initializer_range return_dict
    output_hidden_states output_attentions
    """
)  # whose it is, how it was stored and begun, and what else it would tell

PROCESSOR, OF_PIPELINES = "preprocessor_config.json", "processor_config.json"
PROCESSORS = names(
    """
    ViTImageProcessor DeiTImageProcessor ConvNextImageProcessor PvtImageProcessor MobileNetV2ImageProcessor
    SegformerImageProcessor CLIPImageProcessor BitImageProcessor
    """
)
PROCESSOR_KEYS = Keys(
    names(
        """
        do_resize size resample do_center_crop crop_size crop_pct do_rescale rescale_factor do_normalize image_mean
        image_std default_to_square
        """
    ),
    idle=names(
        """
        image_processor_type feature_extractor_type processor_class do_convert_rgb do_reduce_labels data_format
        input_data_format return_tensors disable_grouping device
        """
    ),  # whose it is, how arrays lie and move, and what is done to labels and to pictures that are not RGB
)
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # of Pillow
WARPED = 384  # a ConvNeXt's pictures from this side on are neither cropped nor kept in proportion


def table_of(path: Path) -> dict[str, Any]:
    """The table in a JSON file of transformers.

    Raises:
        ArtifactError: there is none.
    """
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def check_config(
    path: Path, table: Mapping[str, Any], built: Mapping[str, Any], idle: frozenset[str]
) -> None:
    """Refuse a model's config that says otherwise than `built`, which was made from what is understood of it.

    Raises:
        ArtifactError: it does; the sentence names file and key.
    """
    keys = Keys(
        READ,
        IDLE | idle,
        bound={"problem_type": lambda value: value == "single_label_classification"},
        why={"problem_type": "its outputs are not logits of classes that exclude each other"},
    )
    check_keys(path, table, keys, built)


def class_names(path: Path, labels: Mapping[int, str]) -> tuple[str, ...]:
    """Names of the classes in order; their numbers where transformers named them.

    Raises:
        ArtifactError: numbers that do not count from 0, or two classes of one name.
    """
    places = sorted(int(number) for number in labels)
    if places != list(range(len(labels))):
        raise ArtifactError(
            f"{path} says id2label with the numbers {shown(places)}; expected 0 to {len(places) - 1}"
        )
    found = tuple(str(labels[number]) for number in places)
    if found == tuple(f"LABEL_{number}" for number in places):
        return tuple(map(str, places))
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise ArtifactError(f"{path} calls two classes {twice!r}; give each its own name in id2label")
    return found


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """What the folder's processor does to pictures; None if it has none.

    Raises:
        ArtifactError: another processor than is known, or a key that is not understood.
    """
    if (folder / OF_PIPELINES).is_file() and "image_processor" in table_of(folder / OF_PIPELINES):
        raise ArtifactError(
            f"{folder / OF_PIPELINES} holds a processor of pictures, which is not read; save it as {PROCESSOR}"
        )
    path = folder / PROCESSOR
    if not path.is_file():
        return None
    table = table_of(path)
    cls = _processor(path, table)
    try:
        known = cls().to_dict()
        check_keys(
            path, table, PROCESSOR_KEYS, {**dict.fromkeys(PROCESSOR_KEYS.read - {"crop_pct"}), **known}
        )
        whole = cls(**table).to_dict()
        return Preprocessing.parse(_steps(path, whole))
    except ConfigError as error:
        raise ArtifactError(f"{path} says what is not understood: {error}", field="path") from None
    except (TypeError, ValueError, LookupError) as error:
        raise ArtifactError(f"{path} is damaged: {(str(error).splitlines() or ['no reason'])[0]}") from None


def _processor(path: Path, table: Mapping[str, Any]) -> Any:
    import transformers

    said = str(table.get("image_processor_type") or table.get("feature_extractor_type"))
    name = said.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    if name not in PROCESSORS:
        raise ArtifactError(
            f"{path} is of a {said}, which is not understood; known: {', '.join(sorted(PROCESSORS))}"
        )
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _steps(path: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What `Preprocessing` is made of."""
    steps: dict[str, Any] = {"rescale": whole["rescale_factor"] if whole.get("do_rescale") else 1.0}
    normalised = bool(whole.get("do_normalize"))
    steps["mean"] = _listed(whole["image_mean"]) if normalised else (0.0,)
    steps["std"] = _listed(whole["image_std"]) if normalised else (1.0,)
    if whole.get("do_center_crop"):
        steps["crop"] = _sides(path, "crop_size", whole["crop_size"])
    if not whole.get("do_resize"):
        return steps
    number = int(whole["resample"])
    if number not in FILTERS:
        raise ArtifactError(f"{path} says resample = {number}, which is not understood; known: 1, 2 and 3")
    steps["resample"], size = FILTERS[number], whole["size"]
    if set(size) != {"shortest_edge"}:
        return {**steps, "resize": _sides(path, "size", size)}
    side = int(size["shortest_edge"])
    if "crop_pct" not in whole:
        return {**steps, "resize": side}
    if "crop" in steps:
        raise ArtifactError(f"{path} says do_center_crop = true beside crop_pct; only one of them is read")
    if side >= WARPED:
        return {**steps, "resize": (side, side)}
    return {**steps, "resize": int(side / whole["crop_pct"]), "crop": (side, side)}


def _sides(path: Path, key: str, size: Any) -> tuple[int, int]:
    if not isinstance(size, Mapping) or set(size) != {"height", "width"}:
        raise ArtifactError(
            f"{path} says {key} = {shown(size)}, which is not understood; expected height and width, or shortest_edge"
        )
    return int(size["height"]), int(size["width"])


def _listed(values: Any) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list | tuple) else (values,)
