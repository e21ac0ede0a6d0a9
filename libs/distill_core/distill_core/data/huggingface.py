"""Hugging Face data sets: parquet or arrow files, or a folder of them, read by `datasets` without network."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from distill_core.config import DataPath, Words
from distill_core.data.classes import Renaming
from distill_core.data.damaged import Skipping
from distill_core.data.pictures import EncodedPixels
from distill_core.data.prompts import checked_prompts
from distill_core.data.source import (
    PICKLE_SUFFIXES,
    Pixels,
    Source,
    array_pixels,
    checked_labels,
    existing,
    unknown_choice,
)
from distill_core.errors import DataError, missing_package

IMAGE_COLUMNS = ("img", "image", "picture", "pixel_values", "images")
LABEL_COLUMNS = ("label", "labels", "class", "target")
PROMPT_COLUMNS = ("prompt", "text", "caption")
TABLES = (".parquet", ".arrow")
STRINGS = ("string", "large_string")
SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}


class HuggingFace(Source):
    """Pictures as `datasets.Image`, as encoded bytes or as nested numbers, and class labels and prompts if any."""

    class Config(Renaming, Skipping):
        """Options of the recipe's `[data]` table."""

        name: Literal["huggingface"] = "huggingface"
        path: DataPath  # a parquet or arrow file, a folder of them, or what `Dataset.save_to_disk` wrote
        split: Words = "train"
        image_column: Words | None = None  # unset: found by its type or name
        label_column: Words | None = None  # unset: found by its type or name; "" means no labels
        prompt_column: Words | None = None  # unset: found by its name; "" means no prompts
        num_classes: int | None = Field(
            None, ge=1, le=1_000_000
        )  # unset: as the data says, or highest label + 1
        size: int | None = Field(None, ge=1, le=4096)  # scale the shorter side to it, then crop the centre
        channels: Literal[1, 3] | None = None  # unset: as the first picture
        value_range: tuple[float, float] | None = None  # of numbers; unset: 0..255 integers, 0..1 floats
        limit: int | None = Field(None, ge=1)  # only the first so many

    def __init__(self, config: Config) -> None:
        rows = _open(existing(config.path), config.split)
        rows = rows.select(range(min(len(rows), config.limit or len(rows))))
        if not len(rows):
            raise _no_rows(config.path, config.split)
        image_column, label_column = _columns(rows, config)
        prompt_column = _prompt_column(rows, config.prompt_column, option="prompt_column")
        remedy = {"remedy": "repair it, or set data.prompt_column = ''", "field": "data.prompt_column"}
        prompts = _prompts(rows, prompt_column, config.path, **remedy) if prompt_column else None
        labels, class_names = _labels(rows, label_column, config) if label_column else (None, ())
        pixels = _pixels(rows, image_column, config)
        if isinstance(pixels, EncodedPixels) and pixels.skipped:
            labels = None if labels is None else labels[pixels.readable]
            prompts = None if prompts is None else [prompts[index] for index in pixels.readable.tolist()]
        super().__init__(
            config, size=len(pixels), pixels=pixels, labels=labels, class_names=class_names, prompts=prompts
        )


def is_table(path: Path) -> bool:
    """Whether `path` is for `datasets` to read: a folder, a parquet or an arrow file."""
    return path.is_dir() or path.suffix in TABLES


def prompts_in(path: str, *, split: str, column: str | None) -> list[str]:
    """The prompts of a table's column; pictures beside them are not read."""
    rows = _open(existing(path), split)
    if not len(rows):
        raise _no_rows(path, split)
    prompt_column = _prompt_column(rows, column, option="column")
    if prompt_column is None:
        raise DataError(
            f"no column of {', '.join(rows.features)} is known to hold prompts; set data.column",
            field="data.column",
        )
    return _prompts(rows, prompt_column, path, field="data.column")


def _prompt_column(rows: Any, given: str | None, *, option: str) -> str | None:
    """A text column: the one that was given, else the first with a usual name."""
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in STRINGS]
    if given and given in rows.features and given not in texts:
        raise DataError(
            f"column {given} holds {getattr(rows.features[given], 'dtype', 'no text')}; a prompt is text",
            field=f"data.{option}",
        )
    return _column(given, [], PROMPT_COLUMNS, texts, option=option)


def _prompts(rows: Any, column: str, path: str, **said: str) -> list[str]:
    values = rows.select_columns([column])[:][column]
    return checked_prompts(values, what=f"column {column} of {path}", **said)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "train") from None
    return datasets


def _open(path: Path, split: str) -> Any:
    """The rows of a split, as a `datasets.Dataset`."""
    import pyarrow
    from pyarrow import parquet

    datasets = _library()
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            with _plainly_named(path) as link:
                saved = datasets.load_from_disk(str(link))
            return _chosen(saved, split, path) if isinstance(saved, dict) else saved
        files = _chosen(_files_by_split(path), split, path)
        if files[0].suffix == ".arrow":
            return datasets.concatenate_datasets([_arrow_rows(file) for file in files])
        if not sum(parquet.read_metadata(file).num_rows for file in files):
            raise _no_rows(path, split)
        return datasets.Dataset.from_parquet(_exactly(files), split="chosen")
    except (
        pyarrow.ArrowException,
        datasets.exceptions.DatasetGenerationError,
        OSError,
        KeyError,
        TypeError,
    ) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(
            f"{path} cannot be read as a data set: {cause}; fetch or save it again", field="data.path"
        ) from None


@contextlib.contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """A link to `folder` for readers that take a path for a URL; what they open stays open."""
    with tempfile.TemporaryDirectory(prefix="distillery-data-") as scratch:
        link = Path(scratch) / "data"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def _exactly(files: list[Path]) -> Any:
    """These files for a builder of `datasets`, which takes plain paths for patterns: `set[1]` would be `set1`.

    The marks are what its cache tells a changed file by.
    """
    from datasets.data_files import DataFilesDict, DataFilesList

    marks = [(str(stat.st_mtime_ns), str(stat.st_size)) for stat in (file.stat() for file in files)]
    return DataFilesDict(
        {"chosen": DataFilesList([str(_readable(file.absolute())) for file in files], marks)}
    )


def _readable(file: Path) -> Path:
    """`file`, or a link to it in the cache of `datasets`, which would put a variable for `$` and open URLs at `::`."""
    if not any(sign in str(file) for sign in ("$", "::", "://")):
        return file
    links = Path(_library().config.HF_DATASETS_CACHE) / "distillery-links"
    link = links / f"{hashlib.sha256(str(file).encode()).hexdigest()[:32]}{file.suffix}"
    links.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):  # by an earlier run: the name says where it leads
        link.symlink_to(file)
    return link


def _arrow_rows(file: Path) -> Any:
    """The rows of an arrow file, mapped into memory; of its two forms `datasets` writes streams."""
    import pyarrow

    datasets = _library()
    try:
        return datasets.Dataset.from_file(str(file))
    except pyarrow.ArrowInvalid:
        with pyarrow.memory_map(str(file)) as mapped:
            return datasets.Dataset(pyarrow.ipc.open_file(mapped).read_all())


def _no_rows(path: Path | str, split: str) -> DataError:
    return DataError(f"split {split} of {path} is empty; choose another one", field="data.split")


def _chosen(splits: dict[str, Any], split: str, path: Path) -> Any:
    if split not in splits:
        raise unknown_choice(f"split in {path} called", split, splits, field="data.split")
    return splits[split]


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Files by the split that their name or folder says; a file that says none belongs to `train`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in TABLES)
    if not files or files[0].suffix not in TABLES:
        raise DataError(_nothing_found(path), field="data.path")
    if len({file.suffix for file in files}) > 1:
        raise DataError(
            f"{path} mixes parquet and arrow files; give a folder with one of the two", field="data.path"
        )
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file, path), []).append(file)
    return found


def _split_of(file: Path, root: Path) -> str:
    said = file.name if file == root else file.relative_to(root).as_posix()
    words = [word for word in re.split(r"[-_./]", said.lower()) if word in SPLITS]
    return SPLITS[words[-1]] if words else "train"


def _nothing_found(path: Path) -> str:
    pickles = sorted(file.name for file in path.rglob("*") if file.suffix.lower() in PICKLE_SUFFIXES)
    said = f"{path} holds no .parquet or .arrow file"
    if pickles:
        return f"{said}; {pickles[0]} is refused because such files can execute code when read"
    return f"{said}; give such a file or a folder of them"


def _columns(rows: Any, config: HuggingFace.Config) -> tuple[str, str]:
    datasets = _library()
    features = rows.features
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = _column(config.image_column, typed, IMAGE_COLUMNS, features, option="image_column")
    if image is None:
        raise DataError(
            f"no column of {', '.join(features)} is known to hold pictures; set data.image_column",
            field="data.image_column",
        )
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return image, _column(config.label_column, typed, LABEL_COLUMNS, features, option="label_column") or ""


def _column(
    given: str | None, typed: list[str], usual: tuple[str, ...], known: Iterable[str], *, option: str
) -> str | None:
    """The column that was given, else the only one of the right type, else the first with a usual name."""
    if given:
        if given not in known:
            raise unknown_choice("column", given, known, field=f"data.{option}")
        return given
    if given == "":
        return None
    if len(typed) > 1:
        raise DataError(
            f"the columns {', '.join(typed)} could be meant; set data.{option}", field=f"data.{option}"
        )
    return typed[0] if typed else next((name for name in usual if name in known), None)


def _labels(rows: Any, column: str, config: HuggingFace.Config) -> tuple[Tensor, tuple[str, ...]]:
    values = np.asarray(rows.with_format("numpy", columns=[column])[:][column])
    what = f"column {column} of {config.path}"
    names = getattr(rows.features[column], "names", None)
    if values.dtype.kind == "U":
        names, values = np.unique(values, return_inverse=True)
    classes = config.num_classes or (len(names) if names is not None else None)
    labels, classes = checked_labels(values, count=len(rows), num_classes=classes, what=what)
    named = [] if names is None else [str(name) for name in names[:classes]]
    return labels, config.renamed([*named, *map(str, range(len(named), classes))])


def _pixels(rows: Any, column: str, config: HuggingFace.Config) -> Pixels:
    datasets = _library()
    feature, what = rows.features[column], f"column {column} of {config.path}"
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if binary or isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return EncodedPixels(
            lambda index: _bytes_of(encoded[index][column], f"{index} of {what}"),
            len(rows),
            size=config.size,
            channels=config.channels,
            skip_damaged=config.skip_damaged,
        )
    values = np.asarray(rows.with_format("numpy", columns=[column])[:][column])
    if values.dtype.kind not in "uif":
        raise DataError(
            f"{what} holds {_kind_of(values, feature)}; "
            "a column of pictures holds encoded bytes, or arrays of numbers of one size",
            field="data.image_column",
        )
    return array_pixels(_channels_first(values, what), value_range=config.value_range, what=what)


def _kind_of(values: np.ndarray, feature: Any) -> str:
    return (
        "arrays of several sizes"
        if values.dtype == object and not hasattr(feature, "dtype")
        else f"{values.dtype} values"
    )


def _bytes_of(value: dict[str, Any] | None, name: str) -> tuple[bytes, str]:
    if not value or value.get("bytes") is None:  # a bare path could name any file of this machine
        raise DataError(
            f"picture {name} is missing or only a path; save the data set with its bytes", field="data.path"
        )
    return value["bytes"], name


def _channels_first(values: np.ndarray, what: str) -> np.ndarray:
    if values.ndim == 3:
        return values[:, None]
    if values.ndim == 4 and values.shape[3] in (1, 3):
        return values.transpose(0, 3, 1, 2)
    if values.ndim == 4 and values.shape[1] in (1, 3):
        return values
    raise DataError(
        f"{what} has the dimensions {values.shape}; "
        "pictures are (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)",
        field="data.image_column",
    )


SOURCES = {"huggingface": HuggingFace}
