import numpy as np
import pytest
import torch
from PIL import Image

from distill_core.data import build_source, pictures
from distill_core.errors import ConfigError, DataError


def save(path, value=0, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def classes(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 255, 0))):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", colour)
    return tmp_path


def images(path, **options):
    return build_source({"name": "images", "path": str(path), **options})


def test_sub_folders_are_classes(classes):
    source = images(classes)
    batch = source.all()
    assert (source.shape, source.size, source.class_names) == ((3, 8, 8), 6, ("cat", "dog"))
    assert batch.cond["class_label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.x0[0, :, 0, 0].tolist() == [1, -1, -1]
    assert batch.x0[5, :, 0, 0].tolist() == [-1, 1, -1]


def test_a_plain_folder_has_no_labels(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", 64 * number, mode="L")
    source = images(tmp_path)
    assert (source.shape, source.num_classes) == ((1, 8, 8), None)
    assert source.batch(4, epoch_seed=0, position=0).cond == {}


def test_labels_can_be_switched_off(classes):
    assert images(classes, labels="none").num_classes is None


def test_pictures_are_scaled_and_cropped_to_the_asked_size(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255  # only the centre remains
    Image.fromarray(wide).save(tmp_path / "wide.png")
    save(tmp_path / "small.png", (255, 255, 255), size=(3, 5))
    source = images(tmp_path, size=10)
    assert source.shape == (3, 10, 10)
    assert source.all().x0[:, :, :, 2:8].min() > 0.95


def test_grey_and_colour_agree_once_channels_are_given(tmp_path):
    save(tmp_path / "a.png", 100, mode="L")
    save(tmp_path / "b.png", (100, 100, 100))
    with pytest.raises(DataError, match=r"b\.png has 3 channels") as caught:
        images(tmp_path)
    assert caught.value.field == "data.channels"
    x0 = images(tmp_path, channels=3).all().x0
    assert torch.equal(x0[0], x0[1])
    assert images(tmp_path, channels=1).shape == (1, 8, 8)


def test_transparent_pixels_become_white(tmp_path):
    save(tmp_path / "a.png", (200, 0, 0, 0), mode="RGBA")
    assert images(tmp_path).all().x0.min() == 1


def test_sets_that_do_not_fit_in_memory_give_the_same_pictures(classes, monkeypatch):
    kept = images(classes).batch(4, epoch_seed=0, position=1)
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    lazy = images(classes)
    assert lazy.pixels._kept is None
    assert torch.equal(lazy.batch(4, epoch_seed=0, position=1).x0, kept.x0)


def test_a_limit_takes_from_every_class(classes):
    assert images(classes, limit=2).labels.tolist() == [0, 1]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist") as caught:
        images(tmp_path / "nowhere")
    assert caught.value.field == "data.path"


def test_an_empty_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match=r"holds no pictures \(.*\.png"):
        images(tmp_path)


def test_an_empty_class_folder_is_named(classes):
    (classes / "bird").mkdir()
    with pytest.raises(DataError, match="bird holds no pictures"):
        images(classes)


def test_pictures_beside_class_folders_are_ambiguous(classes):
    save(classes / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png beside sub-folders") as caught:
        images(classes)
    assert caught.value.field == "data.labels"


def test_a_picture_of_another_size_is_named_unless_a_size_is_set(classes):
    save(classes / "dog" / "9.png", size=(9, 8))
    with pytest.raises(DataError, match=r"9\.png is 9x8 where the first is 8x8; set data\.size") as caught:
        images(classes)
    assert caught.value.field == "data.size"
    assert images(classes, size=8).size == 7


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_picture_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"cut\.{suffix}"):
        images(tmp_path)


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png is not a picture"):
        images(tmp_path)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (100_000, 2)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"huge\.png is 100000x2; at most"):
        images(tmp_path)


def test_pictures_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has I;16 pixels"):
        images(tmp_path)


def test_pickles_in_a_folder_are_refused(tmp_path):
    (tmp_path / "images.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"images\.pkl is refused"):
        images(tmp_path)


@pytest.mark.parametrize("suffix", ["npy", "pkl", "pt", "npz"])
@pytest.mark.parametrize("source", ["images", "idx", "huggingface", "prompts"])
def test_a_pickle_is_refused_by_every_source(tmp_path, source, suffix):
    file = tmp_path / f"data.{suffix}"
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="can execute code"):
        build_source({"name": source, "path": str(file)})


def test_a_size_out_of_range_names_its_field(classes):
    with pytest.raises(ConfigError) as caught:
        images(classes, size=-1)
    assert caught.value.field == "data.size"


def damage(*files):
    for file in files:
        file.write_bytes(file.read_bytes()[:60])


@pytest.fixture
def mixed(tmp_path):
    """Eight noise pictures of two classes, three of them cut off, the first of all among them."""
    draws = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            noise = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    damage(tmp_path / "cat/0.png", tmp_path / "cat/2.png", tmp_path / "dog/3.png")
    return tmp_path


def test_all_damaged_pictures_are_named_at_once(mixed):
    with pytest.raises(DataError, match="3 of 8 pictures cannot be read") as caught:
        images(mixed)
    said = str(caught.value)
    assert all(name in said for name in ("cat/0.png", "cat/2.png", "dog/3.png", "data.skip_damaged = true"))
    assert caught.value.field == "data.path"


def test_at_most_twenty_damaged_pictures_are_named(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.png").write_text("no picture")
    with pytest.raises(DataError, match="20 of the first 20 of 30 pictures cannot be read") as caught:
        images(tmp_path)
    assert str(caught.value).count("is not a picture") == 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_pictures_are_left_out_with_their_labels_and_captions(mixed, monkeypatch, caplog, in_memory):
    if not in_memory:
        monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    source = images(mixed, skip_damaged=True)
    assert (source.size, source.pixels.skipped, len(source.pixels)) == (5, 3, 5)
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.prompts == ["cat 1", "cat 3", "dog 0", "dog 1", "dog 2"]
    for index, prompt in enumerate(source.prompts):
        with Image.open(mixed / f"{prompt.replace(' ', '/')}.png") as file:
            wanted = torch.from_numpy(np.array(file)).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(source.items(torch.tensor([index])).x0[0], wanted)
    assert "left out 3 of 8 pictures" in caplog.text
    assert "dog/3.png" in caplog.text


def test_a_set_of_damaged_pictures_alone_is_an_error_even_if_they_are_to_be_left_out(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png is not a picture"):
        images(tmp_path, skip_damaged=True)


def test_a_picture_of_another_size_is_not_left_out_in_silence(mixed):
    save(mixed / "dog" / "9.png", size=(9, 8))
    (mixed / "dog" / "9.txt").write_text("dog 9")
    with pytest.raises(DataError, match="9x8 where the first is 8x8"):
        images(mixed, skip_damaged=True)


def test_pictures_of_other_formats_are_said_to_be_left_out(classes, caplog):
    images(classes)
    assert "left out" not in caplog.text
    for name in ("cat/1.gif", "cat/2.GIF", "dog/1.jfif", "dog/notes.md", ".hidden/3.gif"):
        (classes / name).parent.mkdir(exist_ok=True)
        (classes / name).write_bytes(b"GIF89a")
    assert images(classes).size == 6
    assert "2 .gif, 1 .jfif left out" in caplog.text
    (classes / "only").mkdir()
    (classes / "only" / "1.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"holds no pictures.* and 1 \.gif are not read; convert"):
        images(classes / "only")
