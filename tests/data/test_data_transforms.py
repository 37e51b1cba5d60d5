"""Pictures: decoding, crops, and the operations of the augmentation."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vlmo.data.transforms import (
    _OPERATIONS,
    AREA,
    ASPECT,
    SquareTransform,
    as_rgb,
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
    levels = np.zeros((64, 64, 3), np.uint8)
    levels[:, :32] = 255
    image = Image.fromarray(levels)
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
        def note(image, magnitude):
            calls.append((name, magnitude))
            return image

        return note

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


def tiff(values, dtype) -> bytes:
    return content(Image.fromarray(np.array([values], dtype)), "TIFF")


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, [0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        (np.float64, [0, 0.001, 0.002, 0.003], [0, 0, 1, 1]),
        (np.float32, [0, 63.4, 127.6, 255], [0, 63, 128, 255]),
        (np.float32, [0, 0, 0, 0], [0, 0, 0, 0]),
        (np.float32, [0, 1, 2, 2], [0, 1, 2, 2]),
        (np.uint16, [0, 255, 256, 65535], [0, 0, 1, 255]),
        (np.int16, [0, 256, 512, 32767], [0, 1, 2, 127]),
        (np.int32, [0, 1, 128, 255], [0, 1, 128, 255]),
        (np.int32, [0, 256, 32768, 65535], [0, 1, 128, 255]),
        (np.uint32, [0, 256, 32768, 65535], [0, 1, 128, 255]),
        (np.int8, [0, 1, 2, 127], [0, 1, 2, 127]),
        (bool, [0, 1, 1, 0], [0, 255, 255, 0]),
    ],
)
def test_levels_of_wide_types(dtype, values, expected):
    out = pixels(read_image(tiff(values, dtype), "x"))
    assert out.tolist() == [[[level] * 3 for level in expected]]


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        (np.float32, [0, np.nan], "a grey level is not finite"),
        (np.float32, [0, np.inf], "a grey level is not finite"),
        (np.float32, [-0.5, 0.5], "grey levels from -0.5 to 0.5 are not those of 0..1 or 0..255"),
        (np.float32, [0, 300], "grey levels from 0 to 300 are not"),
        (np.float32, [0, 1.5], "grey levels from 0 to 1.5 are not"),
        (np.int16, [-1, 5], "grey levels from -1 to 5 are not those of 0..255 or 0..65535"),
        (np.int32, [0, 70000], "grey levels from 0 to 70000 are not"),
        (np.uint32, [0, 2**32 - 1], "grey levels from -1 to 0 are not"),
    ],
)
def test_levels_of_no_known_range_are_refused(dtype, values, message):
    with pytest.raises(ValueError, match=f"photo 7: .*{message}"):
        read_image(tiff(values, dtype), "photo 7")


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_byte_orders_of_grey_levels(mode):
    image = Image.new(mode, (2, 1), 0x1234)
    assert pixels(as_rgb(image)).tolist() == [[[0x12] * 3] * 2]


def test_every_mode_of_pillow_becomes_rgb():
    """Of a red picture, or of its grey level, whatever holds it."""
    red, grey = Image.new("RGB", (2, 2), (200, 0, 0)), Image.new("L", (2, 2), 60)
    for mode in ("P", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        assert abs(pixels(as_rgb(red.convert(mode))) - (200, 0, 0)).max() <= 4, mode
    assert (pixels(as_rgb(red.convert("RGBA").convert("RGBa"))) == (200, 0, 0)).all()
    assert abs(pixels(as_rgb(Image.new("LAB", (2, 2), (255, 128, 128)))) - 255).max() <= 1
    for image in (grey, grey.convert("LA"), grey.convert("LA").convert("La"), grey.convert("PA")):
        assert (pixels(as_rgb(image)) == 60).all(), image.mode
    assert (pixels(as_rgb(Image.new("1", (2, 2), 1))) == 255).all()
    for image in (Image.new("LA", (1, 1), (0, 0)), Image.new("La", (1, 1), (0, 0))):
        assert (pixels(as_rgb(image)) == 255).all(), "transparent"
    copy = as_rgb(red)
    copy.putpixel((0, 0), (1, 2, 3))
    assert red.getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_pictures_without_pixels_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels are no image"):
        as_rgb(Image.new("RGB", size))


def entries(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, four bytes of value), as a file holds it."""
    body = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + body + b"\0" * 4


TURNED = (0x0112, 3, 1, b"\x06\0\0\0")


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (entries(TURNED), True),
        (entries((0x010F, 3, 1, b"\x05\0\0\0"), TURNED), True),  # the maker, as a number
        (entries((0x011A, 2, 4, b"72\0\0"), TURNED), True),  # the resolution, as a text
        (entries((0x0102, 9, 1, b"\xff" * 4), TURNED), True),
        (entries(TURNED, (0x8769, 4, 1, b"\xff\xff\0\0")), True),  # an IFD beyond the end
        (entries((0x0112, 3, 1, b"\x09\0\0\0")), False),
        (entries((0x0112, 3, 1, b"\0\0\0\0")), False),
        (entries((0x0112, 2, 4, b"six\0")), False),
        (entries((0x0112, 7, 4, b"\x06\0\0\0")), False),
        (entries((0x0112, 99, 1, b"\x06\0\0\0")), False),
        (entries(TURNED)[:-12], False),
        (b"Exif\0\0II*\0\xff\xff\xff\x7f", False),
        (b"Exif\0\0garbage", False),
        (b"Exif\0\0", False),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_matters_for_its_orientation_only(kind, exif, turned):
    plain = content(
        noise(10, 20), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
    )
    upright = pixels(read_image(content(noise(10, 20), kind, lossless=True), "x"))
    expected = np.rot90(upright, -1) if turned else upright
    assert np.array_equal(pixels(read_image(plain, "x")), expected)


@pytest.mark.parametrize(
    ("told", "turned"), [('tiff:Orientation="6"', True), ('tiff:Orientation="9"', False)]
)
def test_orientation_by_xmp(told, turned):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description {told}/></x:xmpmeta>'
    out = pixels(read_image(content(noise(10, 20), "JPEG", xmp=xmp.encode()), "x"))
    upright = pixels(read_image(content(noise(10, 20), "JPEG"), "x"))
    assert np.array_equal(out, np.rot90(upright, -1) if turned else upright)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_tiffs_and_pngs(orientation, dtype):
    levels = np.array([[0, 256, 512], [1024, 2048, 4096]])
    levels = (levels / 4096).astype(dtype) if dtype == np.float32 else levels.astype(dtype)
    image, exif = Image.fromarray(levels), Image.Exif()
    exif[0x0112] = orientation
    turns: dict[int, Callable] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: np.rot90,
    }
    expected = turns[orientation](pixels(as_rgb(image)))
    for kind in ("TIFF", "PNG"):
        if kind == "TIFF" or dtype != np.float32:
            out = pixels(read_image(content(image, kind, exif=exif), "x"))
            assert np.array_equal(out, expected), kind


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = content(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(file)), "n_frames", 1) == 3
    assert (pixels(read_image(file, "x")) == (255, 0, 0)).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("note", "readable"),
    [
        (chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))), False),
        (chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2**21))), False),
        (chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**21))), False),
        (chunk(b"tEXt", b"Comment\0" + bytes(2**21)), True),
        (chunk(b"iCCP", b"p\0\0nonsense"), True),
        (chunk(b"tIME", b"now")[:-1] + b"!", False),  # the checksum
    ],
)
def test_what_a_png_tells_beside_its_pixels_may_be_huge_or_damaged(note, readable):
    plain = content(noise(10, 20), exif=entries(TURNED))
    expected = pixels(read_image(plain, "x"))
    for place in (33, len(plain) - 12):  # before the pixels, and behind them
        file = plain[:place] + note + plain[place:]
        assert np.array_equal(pixels(read_image(file, "x")), expected)
    with pytest.raises(ValueError, match="x: the image cannot be read"):
        read_image(plain[:33] + note + plain[33:-100], "x")
    if not readable:
        with pytest.raises((ValueError, SyntaxError, OSError)):
            Image.open(io.BytesIO(plain[:33] + note + plain[33:])).load()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_pictures_are_errors_whatever_other_libraries_want(kind, monkeypatch):
    file = content(noise(50, 50), kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    read_image(file, "x")
    with pytest.raises(ValueError, match=r"x: (the image cannot be read|is not an image)"):
        read_image(file[: len(file) // 2], "x")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_pictures_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = content(Image.new("L", (30, 10)))
    with pytest.raises(ValueError, match=r"photo 7: the image has too many pixels: .*300 pixels"):
        read_image(file, "photo 7")


def test_pillow_s_warnings_do_not_reach_the_user(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    palette = Image.new("P", (15, 10))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(content(palette, transparency=b"\0\x80"), "x")  # and more than 100 pixels
        read_image(content(noise(9, 9), "JPEG", exif=entries(TURNED)[:-12]), "x")
        with pytest.raises(ValueError, match="cannot be read"):
            read_image(content(noise(9, 9), "TIFF")[:-60], "x")
        assert not caught
        warnings.warn("of others", UserWarning, stacklevel=1)
        assert len(caught) == 1


@pytest.mark.parametrize(
    "damaged",
    [b"", b"not a picture", content(noise(50, 50), "JPEG")[:900], content(noise(50, 50))[:900]],
)
def test_damaged_pictures_are_named(damaged):
    with pytest.raises(ValueError, match=r"photo 7: (the image cannot be read|is not an image)"):
        read_image(damaged, "photo 7")


def test_pictures_are_read_from_paths(tmp_path):
    path = tmp_path / "a.png"
    noise(5, 6).save(path)
    assert (pixels(read_image(path, "a")) == pixels(noise(5, 6))).all()
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        read_image(tmp_path / "b.png", "b")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"^x: the image cannot be read: it is no regular file"):
        read_image(tmp_path / "pipe.png", "x")
    with pytest.raises(ValueError, match=r"^x: the image cannot be read: it is a folder"):
        read_image(tmp_path, "x")
