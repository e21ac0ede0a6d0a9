"""`distillery render`: views of a scene as pictures, an endless GIF or a film."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from distill_core.errors import ConfigError, missing_package
from distillery_cli.models.generate import Out, check_out, save_pictures, say_files
from distillery_cli.scenes.sources import OUTPUTS, RenderableScene, needed_outputs, open_scene, picture_of
from distillery_cli.terminal.output import AsJson, StoreUrl, bar

if TYPE_CHECKING:
    import numpy as np

    from distill_core.radiance.cameras.camera import Camera

FRAMES_PER_S = 20
FILM = ".mp4"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery render procedural-scene --azimuth 45 --out view.png"
        "  ·  distillery render procedural-scene --orbit 60 --out orbit.gif"
        "  ·  distillery render my-room --cameras room/transforms.json --out views/"
    )(render)


def render(
    scene: Annotated[str, typer.Argument(help="name, name@version or name@alias; or a model's folder.")],
    out: Out = Path("view.png"),
    azimuth: Annotated[float, typer.Option(help="Degrees around the scene.")] = 0.0,
    elevation: Annotated[float, typer.Option(help="Degrees above the horizon.")] = 30.0,
    radius: Annotated[float | None, typer.Option(help="Camera distance; unset: the scene's own.")] = None,
    size: Annotated[int, typer.Option(help="Pixels per side.")] = 256,
    orbit: Annotated[
        int | None, typer.Option(help="So many views around the scene, as GIF, MP4 or in a folder.")
    ] = None,
    cameras: Annotated[
        Path | None,
        typer.Option(help="A transforms.json or a nerfstudio camera path: the views of its cameras."),
    ] = None,
    output: Annotated[str, typer.Option(help=f"{', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}.")] = "rgb",
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Render a view of a scene, an orbit around it, or the views of a file's cameras."""
    _check(out, orbit, cameras, output)
    opened = open_scene(scene, store)
    if cameras is not None:
        from distill_core.radiance.cameras.paths import read_camera_file

        views = read_camera_file(cameras, opened.spec)
    else:
        turns = [azimuth] if orbit is None else [360 * index / orbit for index in range(orbit)]
        views = [_orbit(opened, turn, elevation, radius, size) for turn in turns]
    pictures = []
    with bar(f"views of {scene}", len(views)) as line:
        for view in views:
            seen = opened.render(view, needed_outputs(output))
            pictures.append(picture_of(seen, output, opened.spec.background))
            line.update(len(pictures), len(views))
    say_files(_save(pictures, out, sheet=orbit is not None and cameras is None), as_json)


def _check(out: Path, orbit: int | None, cameras: Path | None, output: str) -> None:
    """Refuse, before the work, what cannot be rendered or saved."""
    if out.suffix.lower() != FILM:
        check_out(out)
    else:
        _film_library()
    if output not in OUTPUTS:
        raise ConfigError(f"--output {output} is not known; known: {', '.join(OUTPUTS)}", field="output")
    if orbit is not None and orbit < 1:
        raise ConfigError(f"--orbit {orbit} is not allowed; ask for at least 1 view", field="orbit")
    if orbit is not None and cameras is not None:
        raise ConfigError("give --orbit or --cameras, not both", field="cameras")


def _orbit(
    scene: RenderableScene, azimuth: float, elevation: float, radius: float | None, size: int
) -> Camera:
    from distill_core.radiance.cameras.camera import orbit_camera

    spec = scene.spec
    distance = spec.radius if radius is None else radius
    return orbit_camera(azimuth, elevation, distance, fov_degrees=spec.fov_degrees, width=size, height=size)


def _save(pictures: list[np.ndarray], out: Path, *, sheet: bool) -> list[Path]:
    moving = {".gif": save_gif, FILM: save_film}.get(out.suffix.lower())
    if moving is None:
        if len(pictures) > 1 and out.suffix and not sheet:
            raise ConfigError(
                f"--out {out} holds one picture, and there are {len(pictures)}; name a folder, a .gif or a .mp4",
                field="out",
            )
        return save_pictures(pictures, out)
    if len({picture.shape for picture in pictures}) > 1:
        raise ConfigError(f"--out {out} needs views of one size; name a folder", field="out")
    moving(pictures, out)
    return [out]


def save_gif(frames: list[np.ndarray], path: Path) -> None:
    """An endless GIF."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=1000 // FRAMES_PER_S, loop=0)


def save_film(frames: list[np.ndarray], path: Path) -> None:
    """An H.264 film; an odd last row or column is left out, as the format has none."""
    av = _film_library()
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with av.open(f"file:{path}", "w") as film:  # not a URL, whatever the path begins with
        stream = film.add_stream("libx264", rate=FRAMES_PER_S, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame[:height, :width].copy(), format="rgb24")
            film.mux(stream.encode(picture))
        film.mux(stream.encode())


def _film_library() -> ModuleType:
    try:
        import av
    except ModuleNotFoundError:
        raise missing_package("av", "viewer") from None
    return av
