"""`distillery predict`: what a served classifier, encoder or other function says of pictures or arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError, DataError
from distillery_cli.models.generate import Model, client
from distillery_cli.terminal.output import AsJson, emit_json, figure, results, table

if TYPE_CHECKING:
    import numpy as np

    from distillery.v1 import models_pb2

ARRAYS = ".safetensors"
IMAGE, LOGITS = "image", "logits"  # the input that a picture is, and the output that classes are read from
SHOWN = 8  # values of an output that a terminal shows


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery predict kd-cifar10 cat.png dog.png --resize"
        "  ·  distillery predict encoder rows.safetensors --function encode --out codes.safetensors"
    )(predict)


def predict(
    model: Model,
    files: Annotated[
        list[Path], typer.Argument(help="Pictures, or one .safetensors of arrays by input, the batch first.")
    ],
    function: Annotated[str, typer.Option(help="Which of the model's functions; unset: its first.")] = "",
    top: Annotated[int, typer.Option(min=1, help="So many of the likeliest classes are shown.")] = 3,
    resize: Annotated[
        bool, typer.Option("--resize", help="Scale and crop pictures to the size that the model takes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="A .safetensors that the outputs are written to.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a served model what it says of pictures, or of the arrays of a file."""
    from distillery_sampler.client import outputs_of, predict_request

    if out is not None and out.suffix != ARRAYS:
        raise ConfigError(f"--out {out} is no file for arrays; end it in {ARRAYS}", field="out")
    with client() as sampler:
        served = sampler.model(model)
        called = _function(served, function)
        names, arrays = _inputs(served, called, files, resize)
        reply = sampler.call_predict(predict_request(model, called.name, arrays))
    classes = _class_names(served)
    outputs = outputs_of(reply)
    if out is not None:
        _save(outputs, out)
    rows = _answers(names, outputs, classes, top)
    if as_json:
        emit_json({"model": reply.summary.model, "function": called.name, "items": rows})
    else:
        _print(rows)


def _class_names(served: models_pb2.Model) -> list[str]:
    if "class_names" not in served.card:
        return []
    names: Any = served.card["class_names"]
    return [str(name) for name in names]


def _function(served: models_pb2.Model, name: str) -> models_pb2.FunctionInfo:
    ref, known = f"{served.name}@{served.version}", [function.name for function in served.functions]
    if not known:
        raise ConfigError(
            f"{ref} is a {served.kind} and has no functions; use `distillery generate` for denoisers and "
            "`distillery render` for scenes",
            field="model",
        )
    if name and name not in known:
        raise ConfigError(f"{ref} has no function {name!r}; it has {', '.join(known)}", field="function")
    return served.functions[known.index(name) if name else 0]


def _inputs(
    served: models_pb2.Model, called: models_pb2.FunctionInfo, files: Sequence[Path], resize: bool
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the items, and the arrays of the inputs."""
    if any(path.suffix == ARRAYS for path in files):
        if len(files) > 1 or resize:
            raise ConfigError(
                f"a {ARRAYS} file is all that is sent; name it alone, without --resize", field="files"
            )
        arrays = _read_arrays(files[0])
        return [str(row) for row in range(max(map(_rows, arrays.values()), default=0))], arrays
    needed = [tensor for tensor in called.inputs if not tensor.optional]
    image = next((tensor for tensor in called.inputs if tensor.name == IMAGE), None)
    if image is None or [tensor.name for tensor in needed] != [IMAGE] or len(image.shape) != 3:
        inputs = ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in called.inputs)
        raise ConfigError(
            f"{called.name} of {served.name}@{served.version} takes no pictures alone but {inputs}; give a "
            f"{ARRAYS} file with these",
            field="files",
        )
    return [str(path) for path in files], {IMAGE: _pictures(image, files, resize)}


def _rows(values: np.ndarray) -> int:
    return len(values) if values.ndim else 0


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {ARRAYS}: {error}", field="files") from None


def _pictures(image: models_pb2.TensorInfo, files: Sequence[Path], resize: bool) -> np.ndarray:
    """Pictures as the model takes them: (B, C, H, W), scaled from bytes to what it allows."""
    import numpy as np

    from distill_core.pictures import read_all

    channels, *sides = image.shape
    if channels not in (1, 3) or (resize and -1 in sides):
        raise ConfigError(
            f"the model takes pictures of shape {list(image.shape)}; files hold grey (1) and RGB (3) ones, and "
            "--resize needs a fixed size",
            field="files",
        )
    size = tuple(sides) if resize else None
    read = read_all(files, lambda path: _picture(path, channels, size))
    for path, pixels in zip(files, read):
        if any(size not in (-1, side) for size, side in zip(sides, pixels.shape[1:])):
            raise DataError(
                f"{path} is {pixels.shape[2]}x{pixels.shape[1]}, the model takes {sides[1]}x{sides[0]}; add "
                "--resize to scale and crop it",
                field="files",
            )
        if pixels.shape != read[0].shape:
            raise DataError(f"{path} has another size than {files[0]}; send them one by one", field="files")
    if image.dtype == "uint8":
        return np.stack(read)
    low, high = (image.low, image.high) if image.HasField("low") and image.HasField("high") else (-1.0, 1.0)
    return (np.stack(read) / 255 * (high - low) + low).astype(image.dtype)


def _picture(path: Path, channels: int, size: tuple[int, ...] | None) -> np.ndarray:
    """A file's pixels (C, H, W) uint8, read as those of training data are."""
    import numpy as np
    from PIL import Image, ImageOps

    from distill_core.pictures import on_white, read_image

    picture = on_white(read_image(path)).convert("L" if channels == 1 else "RGB")
    if size is not None and picture.size != size[::-1]:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(*picture.size[::-1], channels).transpose(2, 0, 1)


def _save(outputs: Mapping[str, np.ndarray], out: Path) -> None:
    from safetensors.numpy import save_file

    texts = [name for name, values in outputs.items() if values.dtype == object]
    if texts:
        raise ConfigError(f"output {texts[0]} is text, which {ARRAYS} cannot hold; use --json", field="out")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: values.copy() for name, values in outputs.items()}, out)


def _answers(
    names: Sequence[str], outputs: Mapping[str, np.ndarray], classes: Sequence[str], top: int
) -> list[dict[str, Any]]:
    """Answer for each item: the likeliest classes where there are logits, else the outputs."""
    logits = outputs.get(LOGITS)
    if logits is not None and classes and logits.shape[1:] == (len(classes),):
        return [{"item": name, "classes": _likeliest(row, classes, top)} for name, row in zip(names, logits)]
    plain = {key: values.tolist() for key, values in outputs.items()}
    return [
        {"item": name, **{key: values[row] for key, values in plain.items()}}
        for row, name in enumerate(names)
    ]


def _likeliest(logits: np.ndarray, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    import numpy as np

    shares = np.exp(logits - logits.max(), dtype=np.float64)
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")[:top]
    return [{"class": classes[index], "probability": float(shares[index])} for index in order]


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = []
    for row in rows:
        ranked = row.get("classes")
        if ranked is not None:
            text = "  ".join(f"{one['class']} {one['probability']:.1%}" for one in ranked)
            cells.append([row["item"], text])
        else:
            cells += [[row["item"], f"{key}: {_short(value)}"] for key, value in row.items() if key != "item"]
    results.print(table(["item", "answer"], cells))


def _short(value: Any) -> str:
    """The first few values of an output; its shape where there are more."""
    import numpy as np

    array = np.asarray(value)
    first = " ".join(figure(one) for one in array.ravel()[:SHOWN].tolist())
    return first if array.size <= SHOWN else f"{first} … ({'x'.join(map(str, array.shape))})"
