"""Readers of posed images, on small folders written here."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.data import build_source
from distill_core.data.scenes import ProceduralScene, read_blender
from distill_core.errors import ConfigError, DataError

ANGLE = 2 * math.atan(0.5)  # the focal length is the width


def write_scene(folder, *, size=(8, 4), frames=3, alpha=255, pose=None, angle=ANGLE):
    """A Blender folder whose pictures hold their own number in red."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        entries = []
        for number in range(frames):
            rgba = np.full((size[1], size[0], 4), [10 * number, 100, 200, alpha], dtype=np.uint8)
            Image.fromarray(rgba).save(folder / split / f"r_{number}.png")
            matrix = np.eye(4)
            matrix[2, 3] = 4 + number
            matrix = matrix.tolist() if pose is None else pose
            entries.append({"file_path": f"./{split}/r_{number}", "transform_matrix": matrix})
        values = {"camera_angle_x": angle, "frames": entries}
        (folder / f"transforms_{split}.json").write_text(json.dumps(values))
    return folder


def change(folder, edit):
    path = folder / "transforms_train.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_a_blender_scene_is_read_with_its_axes_and_focal_length(tmp_path):
    views = read_blender(write_scene(tmp_path), "train")
    assert views.images.shape == (3, 4, 8, 4)
    torch.testing.assert_close(views.images[2, 0, 0], torch.tensor([20, 100, 200, 255]) / 255)
    torch.testing.assert_close(views.intrinsics[0], torch.tensor([8.0, 8.0, 4.0, 2.0]))
    # Pixel (7, 0) of view 1: the camera at (0, 0, 5) looks along -z, 3.5 right, 1.5 up, focal length 8.
    rays, rgba = views.take(torch.tensor([1 * 32 + 7]))
    by_hand = torch.tensor([3.5 / 8, 1.5 / 8, -1.0])
    torch.testing.assert_close(rays.directions[0], by_hand / by_hand.norm())
    assert rays.origins[0].tolist() == [0, 0, 5]
    torch.testing.assert_close(rgba[0, 0], torch.tensor(10 / 255))


def test_a_picked_pixel_has_the_ray_of_its_camera(tmp_path):
    views = read_blender(write_scene(tmp_path), "train")
    rays, _ = views.take(torch.arange(32, 64))
    expected = views.camera(1).rays()
    torch.testing.assert_close(rays.directions, expected.directions)
    torch.testing.assert_close(rays.origins, expected.origins)


def test_a_blender_file_s_whole_camera_is_honoured(tmp_path):
    write_scene(tmp_path)
    change(tmp_path, lambda values: values.update(fl_x=30, cx=4.5, cy=1.25, k1=0.3, p2=-0.01))
    views = read_blender(tmp_path, "train", factor=2)
    torch.testing.assert_close(views.intrinsics, torch.tensor([[15.0, 15.0, 2.25, 0.625]]).expand(3, 4))
    torch.testing.assert_close(views.distortion, torch.tensor([[0.3, 0, 0, 0, 0, -0.01]]).expand(3, 6))
    change(tmp_path, lambda values: values.update(camera_model="OPENCV_FISHEYE", p2=0, w=16, h=8))
    fisheye = read_blender(tmp_path, "train")
    assert fisheye.fisheye
    torch.testing.assert_close(fisheye.intrinsics[1], torch.tensor([15.0, 15.0, 2.25, 0.625]))


def test_a_frame_s_own_angle_wins_over_the_file_s_focal_length(tmp_path):
    write_scene(tmp_path)

    def edit(values):
        values |= {"fl_x": 30.0, "fl_y": 33.0}
        values["frames"][1]["camera_angle_x"] = ANGLE
        values["frames"][2]["fl_y"] = 44.0

    change(tmp_path, edit)
    found = read_blender(tmp_path, "train").intrinsics[:, :2]
    torch.testing.assert_close(found, torch.tensor([[30.0, 33.0], [8.0, 33.0], [30.0, 44.0]]))


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({}, 1.5),
        ({"aabb_scale": 4}, 2 / 0.33),
        ({"aabb_scale": 2, "scale": 0.25, "offset": 0.5}, 4.0),
        ({"aabb": [[-3, -2, -1], [3, 2, 1]]}, 3.0),
    ],
)
def test_a_blender_scene_s_box_is_the_file_s(tmp_path, values, bound):
    folder = write_scene(tmp_path)
    change(folder, lambda found: found.update(values))
    assert build_source({"name": "blender", "path": str(folder)}).spec.bound == pytest.approx(bound)
    assert build_source({"name": "blender", "path": str(folder), "bound": 0.75}).spec.bound == 0.75


def test_masks_of_a_blender_scene_ignore_pixels(tmp_path):
    write_scene(tmp_path)
    Image.fromarray(np.tile(np.array([0, 0, 255, 1], np.uint8), (4, 2))).save(tmp_path / "mask.png")
    change(tmp_path, lambda values: values["frames"][1].update(mask_path="mask.png"))
    known = read_blender(tmp_path, "train").known
    assert known[1, 3].tolist() == [False, False, True, True] * 2
    assert known[[0, 2]].all()


def test_all_damaged_pictures_of_a_scene_are_named_at_once(tmp_path):
    write_scene(tmp_path, frames=5)
    missing_picture(tmp_path)
    other = tmp_path / "train" / "r_3.png"
    other.write_bytes(other.read_bytes()[:-40])
    Image.new("RGB", (6, 4)).save(tmp_path / "train" / "r_4.png")
    with pytest.raises(DataError) as caught:
        read_blender(tmp_path, "train")
    said = str(caught.value)
    assert said.startswith("3 of 5 pictures cannot be used: ")
    for part in ("r_1.png does not exist", "r_3.png is not a readable picture", "r_4.png has 6 x 4 pixels"):
        assert part in said


def test_colour_is_stored_times_opacity(tmp_path):
    views = read_blender(write_scene(tmp_path, alpha=51), "train")
    torch.testing.assert_close(
        views.images[0, 0, 0], torch.tensor([0, 100 / 255 * 0.2, 200 / 255 * 0.2, 0.2])
    )
    assert views.transparent


def test_factor_averages_pixels_and_scales_the_camera(tmp_path):
    views = read_blender(write_scene(tmp_path), "train", factor=2)
    assert views.images.shape == (3, 2, 4, 4)
    torch.testing.assert_close(views.intrinsics[0], torch.tensor([4.0, 4.0, 2.0, 1.0]))


def test_a_blender_source_is_found_by_name_and_says_where_cameras_are(tmp_path):
    source = build_source({"name": "blender", "path": str(write_scene(tmp_path)), "max_test_views": 2})
    assert len(source.train) == 3
    assert len(source.test) == 2
    assert source.spec.radius == pytest.approx(5)
    assert source.spec.fov_degrees == pytest.approx(math.degrees(ANGLE), abs=1e-4)
    batch = source.batch(7, epoch_seed=0, position=3)
    assert batch.size == 7
    assert batch.x0 is None


def missing_picture(folder):
    (folder / "train" / "r_1.png").unlink()


def broken_picture(folder):
    path = folder / "train" / "r_1.png"
    path.write_bytes(path.read_bytes()[:40])


def other_size(folder):
    Image.new("RGB", (6, 4)).save(folder / "train" / "r_1.png")


def sixteen_bit(folder):
    Image.fromarray(np.zeros((4, 8), dtype=np.uint16)).save(folder / "train" / "r_1.png")


def no_transforms(folder):
    (folder / "transforms_train.json").unlink()


def not_json(folder):
    (folder / "transforms_train.json").write_text("{")


def a_list(folder):
    (folder / "transforms_train.json").write_text("[]")


def no_frames(folder):
    change(folder, lambda values: values.update(frames=[]))


def no_angle(folder):
    change(folder, lambda values: values.pop("camera_angle_x"))


def nan_pose(folder):
    change(folder, lambda values: values["frames"][1]["transform_matrix"][0].__setitem__(0, float("nan")))


def short_pose(folder):
    change(folder, lambda values: values["frames"][1].update(transform_matrix=[[1, 0], [0, 1]]))


def ragged_pose(folder):
    change(folder, lambda values: values["frames"][1].update(transform_matrix=[[1, 0], [0]]))


def no_pose(folder):
    change(folder, lambda values: values["frames"][1].pop("transform_matrix"))


def no_path(folder):
    change(folder, lambda values: values["frames"][1].pop("file_path"))


def escaping_path(folder):
    change(folder, lambda values: values["frames"][1].update(file_path="../../etc/passwd"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (missing_picture, r"r_1\.png does not exist"),
        (broken_picture, r"r_1\.png is not a readable picture"),
        (other_size, r"r_1\.png has 6 x 4 pixels, the views before it 8 x 4"),
        (sixteen_bit, r"r_1\.png has I;16 pixels"),
        (no_transforms, r"transforms_train\.json does not exist"),
        (not_json, "holds no JSON table with frames"),
        (a_list, "holds list"),
        (no_frames, "lists no frames"),
        (no_angle, "camera_angle_x is None"),
        (nan_pose, "frame 1 is not usable: the camera pose holds NaN"),
        (short_pose, "frame 1 is not usable"),
        (ragged_pose, "frame 1 is not usable"),
        (no_pose, "frame 1 is not usable"),
        (no_path, "a frame has no file_path"),
        (escaping_path, "leaves the scene's folder"),
    ],
)
def test_a_damaged_scene_folder_is_one_sentence_that_names_the_file(tmp_path, damage, said):
    damage(write_scene(tmp_path))
    with pytest.raises(DataError, match=said):
        build_source({"name": "blender", "path": str(tmp_path)})


def test_a_scene_with_nothing_in_it_is_refused(tmp_path):
    with pytest.raises(DataError, match="fully transparent"):
        build_source({"name": "blender", "path": str(write_scene(tmp_path, alpha=0))})


def test_a_factor_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(DataError, match="factor = 3"):
        build_source({"name": "blender", "path": str(write_scene(tmp_path)), "factor": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"name": "blender", "path": "x", "factor": 0},
        {"name": "blender", "path": "x", "bound": -1},
        {"name": "procedural_scene", "size": 0},
        {"name": "procedural_scene", "views": 3},
    ],
)
def test_a_wrong_option_is_a_config_error(values):
    with pytest.raises(ConfigError, match="data"):
        build_source(values)


def test_a_missing_folder_is_a_data_error():
    with pytest.raises(DataError, match="does not exist"):
        build_source({"name": "blender", "path": "/nowhere/at/all"})


def test_too_many_pixels_are_refused_before_anything_is_rendered():
    with pytest.raises(DataError, match="pixels"):
        build_source({"name": "procedural_scene", "size": 1024, "num_views": 1000})


def test_the_procedural_scene_shows_three_objects_from_every_side():
    source = ProceduralScene(ProceduralScene.Config(num_views=4, num_test_views=2, size=32))
    assert source.train.images.shape == (4, 32, 32, 4)
    covered = source.train.images[..., 3].mean(dim=(1, 2))
    assert float(covered.min()) > 0.1
    assert float(covered.max()) < 0.7
    assert source.train.images[:, 0, :, 3].max() == 0  # nothing is cut off at the upper edge
    assert bool((source.train.images[..., :3] <= source.train.images[..., 3:] + 1e-6).all())
    poses = torch.cat([source.train.c2w, source.test.c2w])[:, :3, 3]
    assert len(torch.unique(poses.round(decimals=3), dim=0)) == 6  # no test camera is a training camera
