"""Pictures: decoding, crops, and the operations of the augmentation."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmo.data.transforms import (
    _OPERATIONS,
    AREA,
    ASPECT,
    SquareTransform,
    random_augment,
    random_crop,
    read_image,
)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    random_state = np.random.RandomState(seed)
    return Image.fromarray(random_state.randint(0, 256, (height, width, 3), dtype=np.uint8))


def content(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (1, 1), (300, 5), (32, 32)])
def test_output_is_a_square_of_bytes(train, width, height):
    out = SquareTransform(32, train)(noise(height, width), seed=3)
    assert (out.dtype, out.shape) == (torch.uint8, (3, 32, 32))
    assert out.is_contiguous()


def test_evaluation_is_the_bicubic_resize():
    image = noise(20, 30)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    out = SquareTransform(16)(image, seed=9)
    assert (out.permute(1, 2, 0).numpy() == np.asarray(expected)).all()
    assert torch.equal(
        SquareTransform(30)(noise(30, 30)), torch.tensor(pixels(noise(30, 30))).permute(2, 0, 1)
    )


def test_seed_decides_everything():
    image, transform = noise(60, 80), SquareTransform(24, train=True)
    first = [transform(image, seed) for seed in range(20)]
    random.seed(2)
    torch.manual_seed(2)
    again = [transform(image, seed) for seed in range(20)]
    assert all(map(torch.equal, first, again))
    assert len({out.numpy().tobytes() for out in first}) == 20


def test_half_of_the_pictures_are_mirrored():
    """A bright left half stays left or goes right, whatever the crop and the operations do."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 255
    image = Image.fromarray(image)
    transform = SquareTransform(32, train=True)
    sides = [transform(image, seed).float()[..., 0].mean() < 127 for seed in range(400)]
    assert 0.42 < np.mean(sides) < 0.58
    unflipped = SquareTransform(32, train=True, flip=False)
    assert not any(unflipped(image, seed).float()[..., 0].mean() < 127 for seed in range(100))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_crops_lie_inside(width, height, seed):
    left, top, right, bottom = random_crop(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_area_and_the_aspect_that_are_asked_for():
    draws = random.Random(0)
    boxes = np.array([random_crop(400, 400, draws) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, aspect = width * height / 400**2, width / height
    assert AREA[0] - 0.01 < share.min() < 0.51 and 0.95 < share.max() <= 1
    assert ASPECT[0] - 0.01 < aspect.min() < 0.77 and 1.3 < aspect.max() < ASPECT[1] + 0.01
    # Large crops do not fit at all aspects, so the mean is below the middle of AREA.
    assert 0.65 < share.mean() < 0.75
    assert abs(np.log(aspect).mean()) < 0.02
    assert boxes[:, 0].min() == 0 and boxes[:, 2].max() == 400


def test_narrow_pictures_are_cropped_in_the_middle():
    assert random_crop(1000, 30, random.Random(0)) == (480, 0, 520, 30)
    assert random_crop(30, 1000, random.Random(0)) == (0, 480, 30, 520)


def test_operations_by_their_formulae():
    image = noise(40, 40)
    before = pixels(image)

    def after(name: str, magnitude: float) -> np.ndarray:
        return pixels(_OPERATIONS[name](image, magnitude))

    assert (after("identity", 0.7) == before).all()
    assert abs(after("brightness", 0.7) - np.minimum(before * 1.36, 255)).max() <= 1
    assert (after("brightness", -0.7) == after("brightness", 0.7)).all()
    moved = after("translate_x", 0.7)
    assert (moved[:, :-7] == before[:, 7:]).all() and (moved[:, -7:] == 128).all()
    moved = after("translate_y", -0.7)
    assert (moved[7:] == before[:-7]).all() and (moved[:7] == 128).all()
    # The smoothed picture is (sum of 3 x 3 + 4 times the middle) / 13.
    window = np.lib.stride_tricks.sliding_window_view(before, (3, 3), (0, 1)).sum((-1, -2))
    middle = before[1:-1, 1:-1]
    sharp = (middle + 0.36 * (middle - (window + 4 * middle) / 13)).clip(0, 255)
    assert abs(after("sharpness", 0.7)[1:-1, 1:-1] - sharp).max() < 1.4  # rounded twice


def test_autocontrast_and_equalize_spread_the_levels():
    image = Image.fromarray((pixels(noise(40, 40)) // 4 + 100).astype(np.uint8))
    spread = pixels(_OPERATIONS["autocontrast"](image, 0.7))
    assert spread.min() == 0 and spread.max() >= 254
    expected = (pixels(image) - 100) * 255 / 63
    assert abs(spread - expected).max() <= 1
    level = pixels(_OPERATIONS["equalize"](image, 0.7))
    for channel in range(3):
        values = pixels(image)[..., channel]
        count = np.bincount(values.ravel(), minlength=256)
        below = np.cumsum(count) - count
        step = (values.size - count[values.max()]) // 255
        expected = np.minimum((step // 2 + below) // step, 255)
        assert (level[..., channel] == expected[values]).all()


@pytest.mark.parametrize("magnitude", [0.7, -0.7])
def test_shears_and_rotation_move_pixels_where_they_must(magnitude):
    """A smooth ramp, whose value tells the place that a pixel came from."""
    side = 101
    ramp = np.broadcast_to(np.arange(side), (side, side))
    ramps = np.stack([ramp, ramp.T, ramp], axis=2).astype(np.uint8)  # x, y
    image = Image.fromarray(ramps)
    y, x = np.mgrid[:side, :side]
    shear, angle = 0.3 * magnitude, np.deg2rad(30 * magnitude)
    cosine, sine, c = np.cos(angle), np.sin(angle), side // 2
    origins = {
        "shear_x": (x + shear * y, y),
        "shear_y": (x, y + shear * x),
        # Counterclockwise, and y points down.
        "rotate": (
            c + cosine * (x - c) - sine * (y - c),
            c + sine * (x - c) + cosine * (y - c),
        ),
    }
    for name, (from_x, from_y) in origins.items():
        out = pixels(_OPERATIONS[name](image, magnitude))
        inside = (from_x > 1) & (from_x < side - 2) & (from_y > 1) & (from_y < side - 2)
        assert inside.mean() > 0.6
        assert abs(out[..., 0] - from_x)[inside].max() <= 1.5, name
        assert abs(out[..., 1] - from_y)[inside].max() <= 1.5, name
        outside = (from_x < -1) | (from_x > side) | (from_y < -1) | (from_y > side)
        assert outside.any() and (out[outside] == 128).all(), name


def test_two_operations_are_drawn_and_each_applied_in_half_of_the_cases(monkeypatch):
    calls: list[tuple[str, float]] = []

    def spy(name):
        return lambda image, magnitude: calls.append((name, magnitude)) or image

    for name in list(_OPERATIONS):
        monkeypatch.setitem(_OPERATIONS, name, spy(name))
    counts = []
    for seed in range(3000):
        before = len(calls)
        random_augment(noise(2, 2), random.Random(seed))
        counts.append(len(calls) - before)
    assert np.bincount(counts) / 3000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names = np.unique([name for name, _ in calls], return_counts=True)[1]
    assert len(names) == 10
    assert names / len(calls) == pytest.approx(0.1, abs=0.02)
    assert np.mean([magnitude > 0 for _, magnitude in calls]) == pytest.approx(0.5, abs=0.03)
    assert {abs(magnitude) for _, magnitude in calls} == {0.7}


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size: 0"):
        SquareTransform(0)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned = read_image(content(noise(10, 20), exif=exif), "x")
    assert (pixels(turned) == np.rot90(pixels(noise(10, 20)), -1)).all()


def test_transparent_pixels_become_white():
    rgba = noise(4, 4).convert("RGBA")
    alpha = np.full((4, 4), 255, np.uint8)
    alpha[0] = 0
    rgba.putalpha(Image.fromarray(alpha))
    out = pixels(read_image(content(rgba), "x"))
    assert (out[0] == 255).all()
    assert (out[1:] == pixels(noise(4, 4))[1:]).all()


def test_palettes_keep_their_colours():
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([2, 0, 1])
    out = pixels(read_image(content(palette), "x"))
    assert out.tolist() == [[[0, 0, 255], [255, 0, 0], [0, 255, 0]]]
    out = pixels(read_image(content(palette, transparency=0), "x"))
    assert out.tolist() == [[[0, 0, 255], [255, 255, 255], [0, 255, 0]]]


def test_grey_pictures_of_any_depth():
    grey = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    for stored in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        out = pixels(read_image(content(stored), "x"))
        assert (out == grey[..., None]).all()
    one_bit = read_image(content(Image.fromarray(grey > 100)), "x")
    assert set(pixels(one_bit).ravel()) == {0, 255}


@pytest.mark.parametrize(
    "damaged",
    [b"", b"not a picture", content(noise(50, 50), "JPEG")[:900], content(noise(50, 50))[:900]],
)
def test_damaged_pictures_are_named(damaged):
    with pytest.raises(ValueError, match=r"photo 7: (the image cannot be read|is no image)"):
        read_image(damaged, "photo 7")


def test_pictures_are_read_from_paths(tmp_path):
    path = tmp_path / "a.png"
    noise(5, 6).save(path)
    assert (pixels(read_image(path, "a")) == pixels(noise(5, 6))).all()
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        read_image(tmp_path / "b.png", "b")
