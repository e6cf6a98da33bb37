"""Images in folders: order, classes, crop and normalisation, on files written here."""

import numpy as np
import pytest
import torch
from PIL import Image

from landscape.training import FolderImages


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("b", 3), ("a", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    return tmp_path


def test_classes_and_batches(root):
    images = FolderImages(root, size=16, batch_size=2)
    assert images.classes == ("a", "b")
    assert (images.num_samples, len(images)) == (5, 3)
    labels = torch.cat([y for _, y in images])
    assert labels.tolist() == [0, 0, 1, 1, 1]
    whole = next(iter(FolderImages(root, size=16, batch_size=9)))[0]
    assert torch.equal(whole, torch.cat([x for x, _ in images]))
    assert torch.equal(whole, torch.cat([x for x, _ in images]))  # a second pass


def test_centre_crop_and_normalisation(root):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    images = FolderImages(root, size=16, resize=20, mean=mean, std=std)
    x = next(iter(images))[0][2]
    pixels = np.array(Image.open(root / "b" / "0.png"))[2:18, 6:22] / 255
    expected = (pixels - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(x.permute(1, 2, 0), expected, atol=1e-6)


def test_normalisation_is_that_of_imagenet_by_default(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "a" / "0.png")
    x = next(iter(FolderImages(tmp_path, size=8)))[0]
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(x.mean((0, 2, 3)), expected, rtol=1e-5)


def test_a_part_is_spread_over_all(root):
    labels = torch.cat([y for _, y in FolderImages(root, size=8, max_images=2)])
    assert labels.tolist() == [0, 1]


def test_greyscale_and_small_images(root):
    Image.fromarray(np.full((5, 9), 128, dtype=np.uint8)).save(root / "a" / "grey.jpg")
    x = torch.cat([x for x, _ in FolderImages(root, size=16)])
    assert x.shape == (6, 3, 16, 16)


def test_errors(root, tmp_path):
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="`root` must hold a folder of images"):
        FolderImages(empty)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        FolderImages(root, batch_size=0)
    (root / "a" / "0.png").write_bytes(b"no png")
    with pytest.raises(ValueError, match=r"whole images, got .*0\.png"):
        list(FolderImages(root, size=8))


@pytest.mark.parametrize(
    ("resize", "width", "left", "top"), [(25, 35, 10, 4), (27, 37, 10, 6)], ids=str
)
def test_sizes_and_corners_are_rounded_as_torchvision_does(root, resize, width, left, top):
    images = FolderImages(root, size=16, resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
    picture = Image.open(root / "b" / "0.png").resize((width, resize), Image.Resampling.BICUBIC)
    pixels = np.array(picture)[top : top + 16, left : left + 16] / 255
    np.testing.assert_allclose(next(iter(images))[0][2].permute(1, 2, 0), pixels, atol=1e-6)


@pytest.mark.parametrize("suffix", [".JPEG", ".bmp", ".pgm", ".png", ".ppm", ".tif", ".tiff"])
def test_images_have_the_suffixes_of_torchvision(root, suffix):
    Image.new("L", (8, 8)).save(root / "a" / f"more{suffix}")
    assert FolderImages(root, size=8).num_samples == 6


def test_sixteen_bits_are_scaled(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "a" / "0.png")
    Image.fromarray((wide / 257).round().astype(np.uint8)).save(tmp_path / "a" / "1.png")
    (images, _) = next(iter(FolderImages(tmp_path, size=8, resize=8)))
    torch.testing.assert_close(images[0], images[1])


@pytest.mark.parametrize(
    "pixels",
    [
        np.linspace(0, 1, 64, dtype=np.float32),
        np.linspace(0, 2**31 - 1, 64).astype(np.int32),
        np.linspace(-32768, 32767, 64).astype(np.int32),
    ],
    ids=["floats", "32 bits", "signed"],
)
def test_pixels_of_unknown_full_scale_are_refused(tmp_path, pixels):
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels.reshape(8, 8)).save(tmp_path / "a" / "0.tif")
    with pytest.raises(ValueError, match=r"got .*0.tif \(pixels of 32 bits, whose full scale"):
        list(FolderImages(tmp_path))


def test_links_to_folders_and_to_images_count(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "c").symlink_to(root / "b")
    (elsewhere / "d").mkdir()
    (elsewhere / "d" / "part").symlink_to(root / "a")
    images = FolderImages(elsewhere, size=8)
    assert torch.cat([y for _, y in images]).tolist() == [0, 0, 0, 1, 1]
    (elsewhere / "d" / "gone.png").symlink_to(root / "gone.png")
    with pytest.raises(ValueError, match=r"whole images, got .*gone\.png"):
        list(FolderImages(elsewhere, size=8))


def test_an_image_of_too_many_pixels_for_pillow_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="`root` must hold whole images, got .*0.png .*64 pixels"):
        list(FolderImages(tmp_path))


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    assert FolderImages(tmp_path).classes == ("a",)
    for arguments, message in (
        ({"resize": 223}, "`resize` must be at least 224, got 223"),
        ({"std": (0, 0, 0)}, "`std` must be positive"),
        ({"mean": (0.5,)}, r"`mean` must have one value per channel \(3\), got 1"),
        ({"mean": (0.5, 0.5, float("nan"))}, "`mean` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            FolderImages(tmp_path, **arguments)
    with pytest.raises(ValueError, match="`root` must be a folder"):
        FolderImages(tmp_path / "missing")
