"""`distillery generate`: pictures from a running sampler."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import ConfigError, DataError
from distillery_cli.terminal.output import AsJson, bar, emit_json, notes, results

if TYPE_CHECKING:
    import numpy as np

    from distillery_sampler.client import SamplerClient

Model = Annotated[str, typer.Argument(help="name, name@version or name@alias.")]
Out = Annotated[Path, typer.Option("--out", help="A file, or a folder for one file each.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery generate dmd2-digits --labels 0-9 --out digits.png"
        "  ·  distillery generate sd --prompt 'a red cube' --count 4 --out pictures/"
        "  ·  distillery generate sd --prompt 'a red cube' --image room.png --mask hole.png"
    )(generate)


def client() -> SamplerClient:
    """A client of the sampler that the settings name."""
    from distill_service.settings import settings
    from distillery_sampler.client import SamplerClient

    known = settings()
    return SamplerClient(known.sampler_address, token=known.client_token(), **known.client_tls())


def parse_labels(text: str) -> list[int]:
    """`0-9`, `3` or `1,1,7-9` as numbers.

    Raises:
        ConfigError: anything else.
    """
    labels: list[int] = []
    for part in filter(None, text.split(",")):
        first, separator, last = part.strip().partition("-")
        if not first.isdecimal() or (separator and not last.isdecimal()) or len(part) > 20:
            raise ConfigError(
                f"--labels {text!r} is not a list of numbers and ranges, e.g. 0-9 or 1,1,7", field="labels"
            )
        labels += range(int(first), min(int(last or first), int(first) + 100_000) + 1)
    return labels


def generate(
    model: Model,
    out: Out = Path("generated.png"),
    labels: Annotated[str, typer.Option(help="Class labels, e.g. 0-9 or 1,1,7.")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    count: Annotated[int | None, typer.Option(help="Pictures of each label or prompt, or in all.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Network evaluations; unset: the model's own.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is off; unset: the model's own.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What pictures must not show.")] = "",
    negative_scale: Annotated[
        float | None, typer.Option(help="Of --negative, in a student; unset: the model's own.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Begin from this picture, of the model's size; or the small one, to enlarge."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="With --image: white is made anew, black stays as it is.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --image: share of the steps, above 0 to 1.")
    ] = None,
    upscale: Annotated[
        bool, typer.Option("--upscale", help="With --image of a half, a third … of the model's size.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make pictures with a served model: one file with all of them, or one file each in a folder."""
    from distillery_sampler.client import cut_prompts

    check_out(out)
    conditions = _conditions(parse_labels(labels), prompt or [], count)
    total = conditions.pop("total")
    conditions |= {"strength": strength, "upscale": upscale, "negative_scale": negative_scale}
    conditions |= {"negative_prompts": [negative]} if negative else {}
    conditions |= {name: _read(path, name) for name, path in (("image", image), ("mask", mask)) if path}
    with client() as sampler, bar(f"generate {model}", total) as line:
        pictures: dict[int, Any] = {}
        summaries: list[Any] = []
        conditions |= {"seed": seed, "num_steps": steps, "guidance": guidance, "on_summary": summaries.append}
        stream = sampler.generate_stream(model, **conditions)
        for index, picture in stream:
            pictures[index] = picture
            line.update(len(pictures), total)
    if said := cut_prompts(summaries[-1]):
        notes.print(f"warning: {said}")
    paths = save_pictures([pictures[index] for index in sorted(pictures)], out)
    say_files(paths, as_json, cut_prompts=list(summaries[-1].cut_prompts))


def _read(path: Path, option: str) -> bytes:
    """The picture as PNG bytes, upright and with its transparency, as data of training are read."""
    from distill_core.pictures import read_image

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--{option} {path} cannot be read: {error.strerror}; name a picture", field=option
        ) from None
    try:
        picture = read_image(data, f"--{option} {path}")
    except DataError as error:
        raise DataError(str(error), field=option) from None
    encoded = BytesIO()
    picture.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def _conditions(labels: list[int], prompts: list[str], count: int | None) -> dict[str, Any]:
    if labels and prompts:
        raise ConfigError("give --labels or --prompt, not both: a model takes one of them", field="labels")
    if count is not None and count < 1:
        raise ConfigError(f"--count {count} is not allowed; ask for at least 1 picture", field="count")
    if labels or prompts:
        times = count or 1
        repeated: dict[str, Any] = (
            {"class_labels": labels * times}
            if labels
            else {"prompts": [p for p in prompts for _ in range(times)]}
        )
        return {**repeated, "total": times * (len(labels) or len(prompts))}
    return {"count": count, "total": count or 1}


def check_out(out: Path) -> None:
    """Raise ConfigError, before the work, for a kind of file that no picture can be saved as."""
    from PIL import Image

    kinds = Image.registered_extensions()
    if out.suffix and kinds.get(out.suffix.lower()) not in Image.SAVE:
        raise ConfigError(
            f"--out {out} is no kind of picture that can be saved; end it in .png, .jpg or .webp, "
            "or name a folder",
            field="out",
        )


def save_pictures(pictures: list[np.ndarray], out: Path) -> list[Path]:
    """A file per picture in the folder `out`, or all of them as one sheet if `out` names a file."""
    from PIL import Image

    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures).save(out)
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{index:05d}.png" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture.squeeze()).save(path)
    return paths


def sheet(pictures: list[np.ndarray], *, columns: int = 10, min_side: int = 32) -> Any:
    """One picture of all, in rows; small ones enlarged by a whole factor. A single one is left as it is."""
    import numpy as np
    from PIL import Image

    if len(pictures) == 1:
        return Image.fromarray(pictures[0].squeeze())
    height, width, channels = pictures[0].shape
    factor = max(1, -(-min_side // height))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows, height * factor + 1, columns, width * factor + 1, channels), 255, np.uint8)
    for index, picture in enumerate(pictures):
        large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[index // columns, :-1, index % columns, :-1] = large
    whole = canvas.reshape(rows * (height * factor + 1), columns * (width * factor + 1), channels)
    return Image.fromarray(whole[:-1, :-1].squeeze())


def say_files(paths: list[Path], as_json: bool, **more: Any) -> None:
    """Print what was written; as JSON with more."""
    if as_json:
        emit_json({"files": [str(path) for path in paths], **more})
    else:
        results.print(f"{paths[0]}" if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}")
