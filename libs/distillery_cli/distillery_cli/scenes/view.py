"""`distillery view`: a scene in the browser, coarse while the camera moves, then fine. Needs viser."""

from __future__ import annotations

import contextlib
import io
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_core.errors import Unavailable, missing_package
from distillery_cli.scenes.sources import (
    OUTPUTS,
    Colour,
    RenderableScene,
    needed_outputs,
    open_scene,
    picture_of,
    vertical_fov,
)
from distillery_cli.terminal.output import AsJson, StoreUrl, emit_json, results, waiting

if TYPE_CHECKING:
    import viser

    from distill_core.radiance.cameras.camera import Camera

MIN_SIZE, MAX_SIZE, SIZE_STEP = 64, 1024, 32
JPEG_QUALITY = 90
Position = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]  # w x y z
FRUSTUM, FRUSTUM_LINE = 0.08, 0.002  # size and line of a drawn camera, in the scene's usual camera distances


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        epilog="Examples: distillery view procedural-scene  ·  distillery view out/run/model --cameras transforms.json"
    )(view)


def view(
    scene: Annotated[str, typer.Argument(help="name, name@version, or a model's folder.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 8080,
    host: Annotated[str, typer.Option(help="0.0.0.0 shows it to the network.")] = "127.0.0.1",
    size: Annotated[int, typer.Option(min=MIN_SIZE, max=MAX_SIZE, help="Pixels of the longer side.")] = 384,
    cameras: Annotated[
        Path | None, typer.Option(help="transforms.json or a camera path: shows its cameras.")
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Look at a scene in the browser: a served one, one of the store, or a folder's."""
    with waiting(f"opening {scene}"):
        opened = open_scene(scene, store)
        viewer = Viewer(opened, host=host, port=port, size=size)
        if cameras is not None:
            from distill_core.radiance.cameras.paths import read_camera_file

            viewer.show_cameras(read_camera_file(cameras, opened.spec))
    from distill_service.addresses import dialled

    url = f"http://{dialled(host, viewer.port)}"
    if as_json:
        emit_json({"scene": scene, "url": url})
    else:
        results.print(f"{scene} is at {url}, until Ctrl-C")
    try:
        viewer.server.sleep_forever()
    finally:
        viewer.close()


class Viewer:
    """A page that shows what its own camera sees of a scene; every visitor has a camera and settings of their own.

    Raises:
        MissingPackage: viser is not installed. Unavailable: the port is in use.
    """

    def __init__(self, scene: RenderableScene, *, host: str, port: int, size: int) -> None:
        self.scene, self.size = scene, size
        self.server = _server(host, port)
        self.port = self.server.get_port()
        self._views: dict[int, _Visitor] = {}
        self._look_from_usual_place()
        self.server.on_client_connect(self._welcome)
        self.server.on_client_disconnect(self._leave)

    def show_cameras(self, cameras: list[Camera]) -> None:
        """Draw cameras as frusta; a click looks through one."""
        for number, camera in enumerate(cameras):
            position, wxyz = _to_viser(camera)
            frustum = self.server.scene.add_camera_frustum(
                f"/cameras/{number:05d}",
                fov=vertical_fov(camera),
                aspect=camera.width / camera.height,
                scale=FRUSTUM * self.scene.spec.radius,
                thickness=FRUSTUM_LINE * self.scene.spec.radius,
                position=position,
                wxyz=wxyz,
            )

            def look(event: Any, position: Any = position, wxyz: Any = wxyz) -> None:
                with event.client.atomic():
                    event.client.camera.position, event.client.camera.wxyz = position, wxyz

            frustum.on_click(look)

    def close(self) -> None:
        """Stop the page and all rendering for it."""
        for visitor in self._views.values():
            visitor.close()
        self.server.stop()

    def _look_from_usual_place(self) -> None:
        from distill_core.radiance.cameras.camera import orbit_camera

        spec = self.scene.spec
        camera = orbit_camera(45, 30, spec.radius, fov_degrees=spec.fov_degrees, width=2, height=2)
        self.server.scene.set_up_direction("+z")
        self.server.initial_camera.position = _to_viser(camera)[0]
        self.server.initial_camera.look_at = (0.0, 0.0, 0.0)
        self.server.initial_camera.fov = vertical_fov(camera)

    def _welcome(self, client: viser.ClientHandle) -> None:
        self._views[client.client_id] = _Visitor(client, self.scene, self.size)

    def _leave(self, client: viser.ClientHandle) -> None:
        visitor = self._views.pop(client.client_id, None)
        if visitor is not None:
            visitor.close()


class _Visitor:
    """Renders for one visitor, in a thread: the newest camera wins, what it overtakes is given up."""

    def __init__(self, client: viser.ClientHandle, scene: RenderableScene, size: int) -> None:
        self._client, self._scene = client, scene
        self._moved, self._closed = threading.Event(), False
        gui = client.gui
        self._output = gui.add_dropdown("Output", OUTPUTS)
        self._size = gui.add_slider("Size", MIN_SIZE, MAX_SIZE, SIZE_STEP, size, hint="Pixels, longer side")
        red, green, blue = (round(255 * value) for value in scene.spec.background)
        self._background = gui.add_rgb("Background", (red, green, blue))
        self._state = gui.add_text("Shown", "…", disabled=True)
        for control in (self._output, self._size, self._background):
            control.on_update(lambda _event: self._moved.set())
        client.camera.on_update(lambda _camera: self._moved.set())
        self._moved.set()
        self._thread = threading.Thread(target=self._serve, name="viewer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop rendering."""
        self._closed = True
        self._moved.set()

    def _serve(self) -> None:
        while True:
            self._moved.wait()
            self._moved.clear()
            if self._closed:
                return
            try:
                self._show()
            except Exception as error:  # the page goes on, and says why it shows nothing new
                self._say(str(error))

    def _show(self) -> None:
        output = self._output.value
        red, green, blue = (value / 255 for value in self._background.value)
        background: Colour = (red, green, blue)
        camera = _from_viser(self._client.camera, int(self._size.value))
        stages = self._scene.stages(camera, needed_outputs(output), background, self._moved.is_set)
        for seen in stages:
            picture = picture_of(seen, output, background)
            self._client.scene.set_background_image(picture, format="jpeg", jpeg_quality=JPEG_QUALITY)
            self._say(f"{output}, {picture.shape[1]} x {picture.shape[0]}")

    def _say(self, state: str) -> None:
        self._state.value = state  # type: ignore[misc]  # the stubs name the read-only half of the handle


def _server(host: str, port: int) -> viser.ViserServer:
    try:
        import viser
    except ModuleNotFoundError:
        raise missing_package("viser", "viewer") from None
    _check_port(host, port)
    with contextlib.redirect_stdout(io.StringIO()):  # its banner
        return viser.ViserServer(host=host, port=port, label="Distillery", verbose=False)


def _check_port(host: str, port: int) -> None:
    """Refuse a port in use: viser would take the next one without a word."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Unavailable(
                f"port {port} of {host} cannot be used: {error.strerror}; give --port"
            ) from None


def _to_viser(camera: Camera) -> tuple[Position, Quaternion]:
    """Position and rotation, w x y z, of a camera that looks along +z with y down."""
    import viser.transforms

    turned = camera.c2w[:3, :3].double().numpy() * [1.0, -1.0, -1.0]
    wxyz = viser.transforms.SO3.from_matrix(turned).wxyz
    x, y, z = camera.c2w[:3, 3].tolist()
    qw, qx, qy, qz = (float(value) for value in wxyz)
    return (x, y, z), (qw, qx, qy, qz)


def _from_viser(seen: viser.CameraHandle, size: int) -> Camera:
    """The visitor's camera, with `size` pixels on its longer side."""
    import math

    import torch
    import viser.transforms

    from distill_core.radiance.cameras.camera import Camera

    aspect = seen.aspect if seen.aspect > 0 else 1.0
    width, height = (size, round(size / aspect)) if aspect >= 1 else (round(size * aspect), size)
    width, height = max(width, 1), max(height, 1)
    c2w = torch.eye(4, dtype=torch.float64)
    matrix = viser.transforms.SO3(seen.wxyz).as_matrix() * [1.0, -1.0, -1.0]
    c2w[:3, :3], c2w[:3, 3] = torch.from_numpy(matrix), torch.tensor(seen.position)
    focal = 0.5 * height / math.tan(seen.fov / 2)
    return Camera(c2w, focal, focal, width / 2, height / 2, width, height)
