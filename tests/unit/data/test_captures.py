"""Readers of real captures, on small folders written here: axes, lenses, boxes, splits against numbers by hand."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from distill_core.data import build_source
from distill_core.data.captures import BOUND, CapturedScene, read_capture
from distill_core.errors import ConfigError, DataError
from distill_core.metrics.image import psnr, ssim
from distill_core.radiance.cameras.distortion import look_through

WIDTH, HEIGHT = 16, 12
FOCAL = 20.0


def picture(path, number=0, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 10 + number, np.uint8)).save(path)


def circle(count=4, radius=4.0, height=1.0):
    """Cameras around the origin that look at it, world +z up: (4, 4), OpenGL axes."""
    poses = []
    for turn in np.arange(count) * 2 * math.pi / count:
        eye = np.array([radius * math.cos(turn), radius * math.sin(turn), height])
        back = eye / np.linalg.norm(eye)
        right = np.cross([0, 0, 1], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(back, right), back, eye], 1)
        poses.append(pose)
    return poses


def write_nerfstudio(folder, *, frames=4, edit=lambda values: None, **values):
    entries = []
    for number, pose in enumerate(circle(frames)):
        picture(folder / "images" / f"{number:03d}.png", number)
        entries.append({"file_path": f"images/{number:03d}.png", "transform_matrix": pose.tolist()})
    described = {"fl_x": FOCAL, "fl_y": 21.0, "cx": 7.0, "cy": 6.5, "w": WIDTH, "h": HEIGHT, **values}
    described["frames"] = entries
    edit(described)
    (folder / "transforms.json").write_text(json.dumps(described))
    return folder


def scene(folder, **options) -> CapturedScene:
    return build_source({"name": "capture", "path": str(folder), **options})


def in_scene(found: CapturedScene, points: np.ndarray) -> np.ndarray:
    """File coordinates (N, 3) in the scene's own."""
    matrix = np.array(found.spec.transform).reshape(4, 4)
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def test_nerfstudio_poses_lens_and_box(tmp_path):
    lens = {"k1": 0.05, "k2": -0.02, "p1": 0.001, "p2": -0.002, "k3": 0.01}
    found = scene(write_nerfstudio(tmp_path, aabb_scale=4, camera_model="OPENCV", **lens), test_every=2)
    assert found.spec.bound == BOUND
    assert (len(found.train), len(found.test)) == (2, 2)
    # aabb_scale 4 is 4 unit cubes at scale 0.33 around the origin: 6.06 file units each way become BOUND
    scale = BOUND / (0.5 * 4 / 0.33)
    np.testing.assert_allclose(found.test.c2w[0, :3, 3], np.array([4, 0, 1]) * scale, atol=1e-6)
    np.testing.assert_allclose(found.test.c2w[0, :3, :3], circle()[0][:3, :3], atol=1e-6)
    np.testing.assert_allclose(found.train.intrinsics[0], [FOCAL, 21.0, 7.0, 6.5])
    np.testing.assert_allclose(found.train.distortion[0], [0.05, -0.02, 0.01, 0, 0.001, -0.002])
    np.testing.assert_allclose(in_scene(found, np.array([[6.0606, 0, 0]])), [[BOUND, 0, 0]], atol=1e-3)


def test_a_frame_s_own_intrinsics_win_over_the_file_s(tmp_path):
    def edit(values):
        values["frames"][1] |= {"fl_x": 30.0, "fl_y": 31.0, "k1": 0.2}

    found = scene(write_nerfstudio(tmp_path, edit=edit), test_every=4)
    np.testing.assert_allclose(found.train.intrinsics[0], [30.0, 31.0, 7.0, 6.5])
    np.testing.assert_allclose(found.train.distortion[:, 0], [0.2, 0, 0])


@pytest.mark.parametrize(
    ("given", "fx", "fy"),
    [
        ({"camera_angle_x": 2 * math.atan(0.5)}, WIDTH, WIDTH),
        ({"x_fov": math.degrees(2 * math.atan(0.5)), "y_fov": 90.0}, WIDTH, HEIGHT / 2),
        ({"fl_x": 9.0}, 9.0, 9.0),
    ],
)
def test_focal_lengths_may_be_given_as_angles_or_once(tmp_path, given, fx, fy):
    def edit(values):
        for key in ("fl_x", "fl_y", "cx", "cy"):
            del values[key]
        values |= given

    found = scene(write_nerfstudio(tmp_path, edit=edit))
    np.testing.assert_allclose(found.train.intrinsics[0], [fx, fy, WIDTH / 2, HEIGHT / 2], rtol=1e-6)


def test_intrinsics_follow_the_pixels_that_are_read(tmp_path):
    """Pictures of half the declared size, averaged over 2 x 2: a quarter of the focal length."""
    found = scene(write_nerfstudio(tmp_path, w=2 * WIDTH, h=2 * HEIGHT, cx=14.0, cy=13.0), factor=2)
    assert found.train.images.shape[1:3] == (HEIGHT // 2, WIDTH // 2)
    np.testing.assert_allclose(found.train.intrinsics[0], [FOCAL / 4, 21 / 4, 3.5, 3.25])


def test_pictures_that_are_missing_are_left_out_with_one_warning(tmp_path, caplog):
    write_nerfstudio(tmp_path, frames=6)
    for number in (1, 4):
        (tmp_path / "images" / f"{number:03d}.png").unlink()
    with caplog.at_level(logging.WARNING):
        found = scene(tmp_path)
    assert len(found.train) + len(found.test) == 4
    assert [record.message for record in caplog.records if "missing" in record.message] == [
        f"2 of 6 pictures are missing, e.g. {tmp_path / 'images' / '001.png'}"
    ]


def test_named_splits_are_kept_and_frames_in_no_list_are_left_out(tmp_path):
    def edit(values):
        values["train_filenames"] = ["./images/000.png", "images/003.png"]
        values["val_filenames"] = ["images/001.png"]

    found = scene(write_nerfstudio(tmp_path, edit=edit))
    assert (len(found.train), len(found.test)) == (2, 1)
    torch.testing.assert_close(found.train.images[:, 0, 0, 0], torch.tensor([10, 13]) / 255)


def masked(folder, *, rows=5, **options):
    """A capture whose second frame, a training view, ignores all below some rows."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:rows] = 1

    def edit(values):
        values["frames"][1]["mask_path"] = "mask.png"

    write_nerfstudio(folder, edit=edit)
    Image.fromarray(mask).save(folder / "mask.png")
    return scene(folder, **options)


def test_what_a_mask_ignores_is_never_drawn_and_stays_opaque(tmp_path):
    views = masked(tmp_path).train
    assert views.images[..., 3].eq(1).all()
    assert not views.transparent
    assert views.known[0, :5].all()
    assert not views.known[0, 5:].any()
    assert views.known[1:].all()
    torch.manual_seed(3)
    drawn = views.draw(40_000)  # enough that each of some 500 pixels is drawn
    assert set(drawn.tolist()) == set(views.known.reshape(-1).nonzero().squeeze(-1).tolist())
    assert set(views.foreground().tolist()) == set(drawn.tolist())
    assert views.counts(torch.tensor([4 * WIDTH, 5 * WIDTH])).tolist() == [True, False]


def test_a_coarse_pixel_counts_if_none_of_its_pixels_is_ignored(tmp_path):
    views = masked(tmp_path, rows=5, factor=2).train
    assert views.known[0, :, 0].tolist() == [True, True, False, False, False, False]


def test_a_mask_that_ignores_nothing_changes_nothing(tmp_path):
    assert masked(tmp_path, rows=HEIGHT).train.known is None


def test_instant_ngp_s_dynamic_masks_ignore_what_they_mark(tmp_path):
    write_nerfstudio(tmp_path)
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[2:4, 5, 1] = 200
    Image.fromarray(mask).save(tmp_path / "images" / "dynamic_mask_002.png")
    known = scene(tmp_path).train.known
    assert (~known).nonzero().tolist() == [[1, 2, 5], [1, 3, 5]]


def test_ignored_pixels_are_not_counted_in_figures(tmp_path):
    views = masked(tmp_path, rows=5).train
    right = views.truth((0, 0, 0))
    wrong = right.clone()
    wrong[0, 5:] = 0.9
    assert psnr(*views.judged(wrong, (0, 0, 0))[0]) == math.inf
    assert ssim(*views.judged(wrong, (0, 0, 0))[0]) == 1
    wrong[0, 1, 2] += 0.1
    expected = -10 * math.log10(3 * 0.01 / (5 * WIDTH * 3))
    assert psnr(*views.judged(wrong, (0, 0, 0))[0]) == pytest.approx(expected, abs=1e-4)
    assert ssim(*views.judged(wrong, (0, 0, 0))[0]) < 1
    seen, truth, _ = (part for part in views.judged(wrong, (0, 0, 0))[0])
    other = np.random.default_rng(1).random(truth.shape)
    assert ssim(other, truth, np.ones(truth.shape[:2], bool)) == pytest.approx(ssim(other, truth), rel=1e-9)


def test_without_a_box_it_lies_around_what_the_cameras_look_at(tmp_path):
    def edit(values):
        for frame in values["frames"]:
            frame["transform_matrix"] = (np.array(frame["transform_matrix"]) + MOVE).tolist()

    MOVE = np.zeros((4, 4))
    MOVE[:3, 3] = [10, -20, 5]
    found = scene(write_nerfstudio(tmp_path, edit=edit))
    np.testing.assert_allclose(in_scene(found, np.array([[10, -20, 5.0]])), np.zeros((1, 3)), atol=1e-3)
    # cameras sqrt(17) away; the box reaches half way, so they stand at twice its bound
    assert found.spec.radius == pytest.approx(2 * BOUND, rel=1e-3)
    wider = scene(tmp_path, bound=2 * math.sqrt(17))
    assert wider.spec.radius == pytest.approx(BOUND / 2, rel=1e-3)


def test_a_fisheye_sees_through_its_own_model(tmp_path):
    found = scene(write_nerfstudio(tmp_path, camera_model="OPENCV_FISHEYE", k1=0.1))
    assert found.train.fisheye
    rays, _ = found.train.take(torch.tensor([0]))
    plane = torch.tensor([[(0.5 - 7.0) / FOCAL, (0.5 - 6.5) / 21.0]])
    seen = look_through(plane, torch.tensor([[0.1, 0, 0, 0, 0, 0]]), fisheye=True)[0] * torch.tensor(
        [1.0, -1, -1]
    )
    torch.testing.assert_close(rays.directions[0], found.train.c2w[0, :3, :3] @ seen)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rolling_shutter": [0, 0, 1, 0]}, "rolling_shutter is not supported"),
        ({"ftheta_p0": 0.1}, "ftheta_p0 is not supported"),
        ({"camera_model": "FULL_OPENCV", "k4": 0.1}, "k4 is not supported"),
        ({"camera_model": "OPENCV_FISHEYE", "p1": 0.1}, "p1 is not supported"),
        ({"k5": 0.1}, "k5 is not supported"),
        ({"white_transparent": True}, "white_transparent is not supported; save the pictures with an alpha"),
        ({"sharpness_discard_threshold": 0.5}, "sharpness_discard_threshold is not supported"),
        ({"n_frames": 3}, "n_frames is 3 where 4 are listed"),
        ({"is_fisheye": "yes"}, "is_fisheye is 'yes'"),
        ({"w": None}, "w and h are None and 12"),
        ({"w": 16.5}, "w and h are 16.5 and 12"),
        ({"w": 12, "h": 16}, "16 x 12 pixels, and its camera was measured on 12 x 16"),
        ({"fl_x": -3}, "fl_x is -3"),
        ({"fl_x": 10**400}, "must be a finite number"),
        ({"fl_x": None, "camera_angle_x": 3.2}, "camera_angle_x is 3.2"),
        ({"aabb_scale": 0}, "aabb_scale and scale must be positive"),
        ({"offset": [1, 2]}, "offset one or 3 numbers"),
        ({"train_filenames": ["images/009.png"]}, "train_filenames names 'images/009.png'"),
        ({"mask_path": "images/none.png"}, "none.png does not exist"),
    ],
)
def test_a_key_that_changes_the_result_is_honoured_or_refused_by_name(tmp_path, values, said):
    with pytest.raises(DataError, match=said):
        scene(write_nerfstudio(tmp_path, edit=lambda found: found.update(values)))


def test_keys_of_lenses_that_say_nothing_are_no_hindrance_and_others_are_told(tmp_path, caplog):
    neutral = {
        "k4": 0.0,
        "k5": 0,
        "rolling_shutter": [0.0, 0.0, 0.0, 0.0],
        "is_fisheye": False,
        "n_frames": 4,
    }
    with caplog.at_level(logging.WARNING):
        scene(write_nerfstudio(tmp_path, **neutral, applied_scale=0.5, exposure=3))
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "keys that are not read: exposure"
    ]


def test_names_of_pictures_may_lack_a_suffix_hold_dots_or_backslashes(tmp_path):
    def edit(values):
        names = ["images/000", "images\\001.png", "images/f_0.5", "images/003.png"]
        for frame, name in zip(values["frames"], names, strict=True):
            frame["file_path"] = name

    write_nerfstudio(tmp_path, edit=edit)
    (tmp_path / "images" / "000.png").rename(tmp_path / "images" / "000.jpg")
    (tmp_path / "images" / "002.png").rename(tmp_path / "images" / "f_0.5.png")
    assert [frame.path.name for frame in read_capture(tmp_path).frames] == [
        "000.jpg",
        "001.png",
        "f_0.5.png",
        "003.png",
    ]


def test_a_mask_that_ignores_all_of_its_picture_or_does_not_cover_it_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"mask\.png ignores every pixel of its picture"):
        masked(tmp_path / "all", rows=0)
    write_nerfstudio(tmp_path, mask_path="mask.png")
    Image.new("L", (WIDTH, HEIGHT + 1), 255).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png is 16 x 13, its picture 000\.png 16 x 12"):
        scene(tmp_path)


def test_all_damaged_pictures_of_a_capture_are_named_at_once(tmp_path):
    write_nerfstudio(tmp_path, frames=30)
    for number in range(2, 27):
        (tmp_path / "images" / f"{number:03d}.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        scene(tmp_path)
    said = str(caught.value)
    assert said.startswith("25 of 30 pictures cannot be used")
    assert said.count("is not a picture that can be read") == 20
    assert "and 5 more" in said


def test_a_picture_that_lies_is_read_as_its_camera_saw_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(2).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_nerfstudio(tmp_path)
    for path in (tmp_path / "images").iterdir():
        Image.fromarray(pixels).save(path, exif=exif)
    assert scene(tmp_path).train.images.shape[1:3] == (HEIGHT, WIDTH)  # measured on the stored pixels
    edit = {"w": HEIGHT, "h": WIDTH}
    upright = scene(write_turned(tmp_path, edit)).train.images
    torch.testing.assert_close(upright[0, ..., :3], torch.from_numpy(np.rot90(pixels, -1) / 255).float())


def write_turned(folder, edit):
    path = folder / "transforms.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    return folder


# -- COLMAP -----------------------------------------------------------------------------------------------------


def write_colmap(
    folder, *, model="OPENCV", params=(20.0, 21.0, 7.0, 6.5, 0.05, -0.02, 0.001, 0.002), binary=False
):
    """A reconstruction as text, by the documented layout; cameras are those of `circle`, turned upside down."""
    place = folder / "sparse" / "0"
    place.mkdir(parents=True)
    (place / "cameras.txt").write_text(f"1 {model} {WIDTH} {HEIGHT} {' '.join(map(str, params))}\n")
    lines = []
    for number, pose in enumerate(circle()):
        picture(folder / "images" / f"{number}.jpg", number)
        w2c = np.linalg.inv(FLIP @ pose @ np.diag([1, -1, -1, 1]))
        quaternion = pycolmap.Rotation3d(w2c[:3, :3]).quat  # x y z w
        numbers = [*np.roll(quaternion, 1), *w2c[:3, 3]]
        lines += [f"{number + 1} {' '.join(map(str, numbers))} 1 {number}.jpg", ""]
    (place / "images.txt").write_text("\n".join(lines) + "\n")
    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    points = [f"{index + 1} {x} {y} {z} 9 9 9 0.1" for index, (x, y, z) in enumerate(corners)]
    (place / "points3D.txt").write_text("\n".join(points) + "\n")
    if binary:
        pycolmap.Reconstruction(str(place)).write_binary(str(place))
        for path in place.glob("*.txt"):
            path.unlink()
    return folder


FLIP = np.diag([1.0, -1.0, -1.0, 1.0])  # a world whose z points down, as COLMAP's may


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_text_and_binary(tmp_path, binary):
    found = scene(write_colmap(tmp_path, binary=binary), test_every=4)
    assert (len(found.train), len(found.test)) == (3, 1)
    np.testing.assert_allclose(found.test.intrinsics[0], [20, 21, 7, 6.5])
    np.testing.assert_allclose(found.test.distortion[0], [0.05, -0.02, 0, 0, 0.001, 0.002], atol=1e-7)
    # the points fill a cube of side 2: the box is theirs, and the cameras' up is +z again
    np.testing.assert_allclose(found.test.c2w[0, :3, 3].norm(), BOUND * math.sqrt(17), rtol=1e-4)
    assert (found.train.c2w[:, 2, 1] > 0.9).all()
    rays, _ = found.train.take(torch.tensor([6 * WIDTH + 7]))
    assert (
        float((rays.origins[0] / -rays.origins[0].norm() * rays.directions[0]).sum()) > 0.99
    )  # looks inwards


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("OPENCV", (20.0, 21.0, 7.0, 6.5, 0.05, -0.02, 0.001, 0.002)),
        ("SIMPLE_RADIAL", (20.0, 7.0, 6.5, 0.07)),
        ("RADIAL", (20.0, 7.0, 6.5, 0.07, -0.02)),
        ("OPENCV_FISHEYE", (20.0, 21.0, 7.0, 6.5, 0.05, -0.02, 0.003, 0.001)),
        ("PINHOLE", (20.0, 21.0, 7.0, 6.5)),
        ("SIMPLE_PINHOLE", (20.0, 7.0, 6.5)),
        ("FULL_OPENCV", (20.0, 21.0, 7.0, 6.5, 0.05, -0.02, 0.001, 0.002, 0.03, 0, 0, 0)),
        ("SIMPLE_RADIAL_FISHEYE", (20.0, 7.0, 6.5, 0.07)),
        ("RADIAL_FISHEYE", (20.0, 7.0, 6.5, 0.07, -0.02)),
        ("SIMPLE_FISHEYE", (20.0, 7.0, 6.5)),
        ("FISHEYE", (20.0, 21.0, 7.0, 6.5)),
        ("THIN_PRISM_FISHEYE", (20.0, 21.0, 7.0, 6.5, 0.05, -0.02, 0, 0, 0.003, 0.001, 0, 0)),
    ],
)
def test_every_lens_looks_where_colmap_says_it_does(tmp_path, model, params):
    frame = read_capture(write_colmap(tmp_path, model=model, params=params)).frames[0]
    camera = pycolmap.Camera.create_from_model_name(1, model, 20.0, WIDTH, HEIGHT)
    camera.params = params
    fx, fy, cx, cy = frame.pinhole
    pixels = np.array([[0.5, 0.5], [15.5, 2.5], [8.5, 11.5]])
    plane = torch.from_numpy((pixels - [cx, cy]) / [fx, fy])
    lens = torch.tensor(frame.lens, dtype=torch.double).expand(3, 6)
    seen = look_through(plane, lens, fisheye="FISHEYE" in model)
    wanted = np.array([camera.cam_from_img(pixel) for pixel in pixels])
    np.testing.assert_allclose(seen[:, :2] / seen[:, 2:], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "params", "said"),
    [
        (
            "FULL_OPENCV",
            (20.0, 21.0, 7.0, 6.5, 0.05, -0.02, 0.001, 0.002, 0.03, 0, 0.01, 0),
            "k5 of a FULL_OPENCV",
        ),
        ("FOV", (20.0, 21.0, 7.0, 6.5, 0.1), "FOV are not supported"),
    ],
)
def test_a_lens_of_colmap_that_is_not_supported_is_named(tmp_path, model, params, said):
    with pytest.raises(DataError, match=said):
        read_capture(write_colmap(tmp_path, model=model, params=params))


def cut_model(folder, place, count):
    """A copy of sparse/0 with its first views only."""
    (folder / place).mkdir(parents=True)
    for name in ("cameras.txt", "points3D.txt"):
        (folder / place / name).write_bytes((folder / "sparse" / "0" / name).read_bytes())
    lines = (folder / "sparse" / "0" / "images.txt").read_text().splitlines()[: 2 * count]
    (folder / place / "images.txt").write_text("\n".join(lines) + "\n")


def test_of_several_reconstructions_the_largest_is_read_and_said(tmp_path, caplog):
    write_colmap(tmp_path)
    cut_model(tmp_path, "aside", 2)
    (tmp_path / "sparse" / "0").rename(tmp_path / "sparse" / "1")
    (tmp_path / "aside").rename(tmp_path / "sparse" / "0")
    with caplog.at_level(logging.WARNING):
        assert len(read_capture(tmp_path).frames) == 4
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} holds 2 reconstructions, which have no common axes: sparse/0 with 2 views, sparse/1 with 4 views; "
        "sparse/1 is read, the largest"
    ]


@pytest.mark.parametrize("folder", ["images_4", "images_2", "images_8", "input"])
def test_smaller_copies_alone_are_read_with_cameras_of_their_size(tmp_path, folder):
    write_colmap(tmp_path)
    factor = {"images_4": 4, "images_2": 2, "images_8": 8, "input": 1}[folder]
    size = -(-WIDTH // factor), -(-HEIGHT // factor)
    for number in range(4):
        (tmp_path / "images" / f"{number}.jpg").unlink()
        picture(tmp_path / folder / f"{number}.png", number, size)
    (tmp_path / "images").rmdir()
    found = scene(tmp_path, test_every=4).test
    assert found.images.shape[1:3] == size[::-1]
    across, down = size[0] / WIDTH, size[1] / HEIGHT
    np.testing.assert_allclose(found.intrinsics[0], [20 * across, 21 * down, 7 * across, 6.5 * down])
    np.testing.assert_allclose(found.distortion[0], [0.05, -0.02, 0, 0, 0.001, 0.002], atol=1e-7)


def test_smaller_copies_are_taken_over_the_pictures_where_the_option_says_so(tmp_path):
    write_colmap(tmp_path)
    for number in range(4):
        picture(tmp_path / "images_4" / f"{number}.JPG", number, (WIDTH // 4, HEIGHT // 4))
    assert scene(tmp_path).train.images.shape[1:3] == (HEIGHT, WIDTH)
    assert scene(tmp_path, images="images_4").train.images.shape[1:3] == (HEIGHT // 4, WIDTH // 4)


@pytest.mark.parametrize(
    ("model", "pictures"),
    [
        ("sparse", "images"),
        ("colmap/sparse/0", "images"),
        ("dense/0/sparse", "dense/0/images"),
        ("distorted/sparse/0", "input"),
        (".", "images"),
        (".", "."),
    ],
)
def test_other_layouts_of_colmap(tmp_path, model, pictures):
    source = write_colmap(tmp_path / "source")
    target = tmp_path / "target"
    for place, wanted in (("sparse/0", model), ("images", pictures)):
        (target / wanted).mkdir(parents=True, exist_ok=True)
        for path in (source / place).iterdir():
            path.rename(target / wanted / path.name)
    assert len(scene(target).train) == 3


def test_the_pictures_folder_is_refused_where_the_file_names_its_pictures(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.images is for COLMAP and LLFF") as caught:
        scene(write_nerfstudio(tmp_path), images="images_4")
    assert caught.value.field == "data.images"


# -- LLFF, NSVF -------------------------------------------------------------------------------------------------


def write_llff(folder, *, views=9, pictures=9, rows=None):
    rows = [] if rows is None else rows
    for number in range(views):
        # columns down, right, back: a camera at (x, 0, 3) that looks along -z, world +y up
        columns = [[0, -1, 0], [1, 0, 0], [0, 0, 1], [0.1 * number, 0, 3.0], [HEIGHT, WIDTH, FOCAL]]
        rows.append([*np.array(columns, float).T.ravel(), 1.0, 2.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    for number in range(pictures):
        picture(folder / "images_4" / f"{number:02d}.png", number, (WIDTH // 2, HEIGHT // 2))
    return folder


def test_llff_columns_are_down_right_back(tmp_path):
    capture = read_capture(write_llff(tmp_path))
    np.testing.assert_allclose(capture.frames[2].c2w[:3, :3], np.eye(3))
    np.testing.assert_allclose(capture.frames[2].c2w[:3, 3], [0.2, 0, 3])
    found = scene(tmp_path)
    assert (len(found.train), len(found.test)) == (7, 2)  # every eighth
    np.testing.assert_allclose(found.test.intrinsics[0], [FOCAL / 2, FOCAL / 2, WIDTH / 4, HEIGHT / 4])
    # +y of the file is up, so it is +z of the scene; what lies between near and far is inside the box
    assert (found.train.c2w[:, 2, 1] > 0.99).all()
    seen = in_scene(found, np.array([[0.4, 0, 2.0], [0.4, 0, 1.0]]))
    assert (np.abs(seen) <= BOUND).all()


def write_nsvf(
    folder, *, intrinsics=f"{FOCAL} {WIDTH / 2} {HEIGHT / 2} 0.", names=("0_a", "0_b", "1_a", "2_a")
):
    (folder / "pose").mkdir()
    (folder / "intrinsics.txt").write_text(intrinsics)
    (folder / "bbox.txt").write_text("-1 -2 -1 1 2 3 0.4")
    for number, (name, pose) in enumerate(zip(names, circle(), strict=True)):
        picture(folder / "rgb" / f"{name}.png", number)
        np.savetxt(folder / "pose" / f"{name}.txt", pose @ np.diag([1, -1, -1, 1]))
    return folder


def test_nsvf_poses_are_opencv_s_and_the_file_s_name_says_the_split(tmp_path):
    capture = read_capture(write_nsvf(tmp_path))
    assert [frame.split for frame in capture.frames] == ["train", "train", "test"]
    np.testing.assert_allclose(capture.frames[0].c2w, circle()[0], atol=1e-6)
    found = scene(tmp_path)
    assert (len(found.train), len(found.test)) == (2, 1)
    np.testing.assert_allclose(found.train.intrinsics[0], [FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2])
    # the box is 4 at its longest, times 1.2, around (0, 0, 1)
    np.testing.assert_allclose(in_scene(found, np.array([[0, 0, 1 + 2.4]])) @ [0, 0, 1], [BOUND], rtol=1e-3)


def test_nsvf_intrinsics_may_be_a_matrix(tmp_path):
    matrix = "20 0 8 0\n0 21 6 0\n0 0 1 0\n0 0 0 1\n"
    capture = read_capture(write_nsvf(tmp_path, intrinsics=matrix))
    assert capture.frames[0].pinhole == (20, 21, 8, 6)


# -- what cannot be read ----------------------------------------------------------------------------------------


def broken(kind, folder):  # noqa: C901 - a list of ways to be broken
    if kind == "empty":
        return
    if kind in ("poses", "seventeen", "nan"):
        write_llff(folder, pictures=7 if kind == "poses" else 9)
        if kind != "poses":
            values = np.load(folder / "poses_bounds.npy")
            values = values[:, :16] if kind == "seventeen" else values * np.nan
            np.save(folder / "poses_bounds.npy", values)
        return
    if kind == "colmap":
        write_colmap(folder, binary=True)
        path = folder / "sparse" / "0" / "images.bin"
        path.write_bytes(path.read_bytes()[:40])
        return
    if kind == "bbox":
        write_nsvf(folder)
        (folder / "bbox.txt").write_text("1 1 1 0 0 0")
        return

    def edit(values):
        if kind == "frames":
            values["frames"] = []
        if kind == "pose":
            values["frames"][2]["transform_matrix"][0][3] = float("nan")
        if kind == "leaves":
            values["frames"][2]["file_path"] = "../secret.png"
        if kind == "model":
            values["camera_model"] = "EQUIRECTANGULAR"
        if kind == "focal":
            del values["fl_x"], values["fl_y"]
        if kind == "number":
            values["cx"] = "seven"

    write_nerfstudio(folder, edit=edit)
    if kind == "sizes":
        picture(folder / "images" / "002.png", size=(WIDTH, HEIGHT + 4))
    if kind == "json":
        (folder / "transforms.json").write_text("{")
    if kind == "gone":
        for path in (folder / "images").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "is not a known capture"),
        ("frames", "lists no frames"),
        ("pose", "transform_matrix of frame 2 is not usable"),
        ("leaves", "leaves the scene's folder"),
        ("model", "EQUIRECTANGULAR is not supported"),
        ("focal", "gives no focal length"),
        ("number", "cx is 'seven'"),
        ("sizes", "16 x 16 pixels, .*all views must have one size"),
        ("json", "holds no JSON table with frames"),
        ("gone", "lists 4 pictures and has 0 of them"),
        ("poses", "9 poses for the 7 pictures"),
        ("seventeen", "17 finite numbers"),
        ("nan", "17 finite numbers"),
        ("colmap", "cannot be read by COLMAP"),
        ("bbox", "second corner is not beyond"),
    ],
)
def test_a_capture_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, kind, said):
    broken(kind, tmp_path)
    with pytest.raises(DataError, match=said):
        scene(tmp_path)
