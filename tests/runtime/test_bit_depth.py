"""Samples of 10, 12, 14 bits in 16, and whatever else the wild has: taken for what they are, or told, never black."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from deep_images import CHANNELS, GREY, GREY_ALPHA, RGB, RGB_ALPHA, png, pnm, tiff
from PIL import Image

from agln_fast.errors import ConfigError, ImageError
from agln_fast.runtime.images import load_image

DEPTHS = (10, 12, 14)


def samples(depth: int, channels: int = 1) -> np.ndarray[Any, Any]:
    """(8, 16, channels) uint16 from 0 to 2**depth - 1, all bits in use."""
    values = np.linspace(0, 2**depth - 1, 8 * 16 * channels).round().astype(np.uint16)
    return np.random.default_rng(0).permutation(values).reshape(8, 16, channels)


def scaled(values: np.ndarray[Any, Any], depth: int) -> np.ndarray[Any, Any]:
    """The image by the formula, in float64: (H, W, 1 to 4) of that depth -> (H, W, 3)."""
    colours = values[..., :3] if values.shape[2] >= 3 else values[..., :1].repeat(3, 2)
    return np.floor(colours.astype(np.float64) * 255 / (2**depth - 1) + 0.5).astype(np.uint8)


def lzw(values: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values[..., 0]).save(file, "TIFF", compression="tiff_lzw")
    return file.getvalue()


def pack_12_bits(values: np.ndarray[Any, Any]) -> bytes:
    """Two samples in three bytes, the upper bits first."""
    a, b = values.reshape(-1, 2).astype(np.uint32).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("colour_type", CHANNELS, ids=["grey", "rgb", "grey-alpha", "rgb-alpha"])
def test_depth_declared_by_a_png_is_believed(depth: int, colour_type: int) -> None:
    """The chunk sBIT; a sample of alpha is 16 bits of its own."""
    values = samples(depth, CHANNELS[colour_type])
    source = png(values, colour_type, (depth,) * CHANNELS[colour_type])
    if colour_type == GREY_ALPHA:
        with pytest.raises(ImageError, match=f"keeps the upper 8 bits here, and its depth of {depth} needs the others"):
            load_image(source)
    else:
        np.testing.assert_array_equal(load_image(source), scaled(values, depth))


@pytest.mark.parametrize("colour_type", [GREY, RGB], ids=["grey", "rgb"])
def test_declared_depth_of_samples_that_were_scaled_to_16_bits(colour_type: int) -> None:
    """So the PNG specification has it: sBIT tells the precision then, not the range."""
    values = samples(12, CHANNELS[colour_type]).astype(np.uint32) * 65535 // 4095
    image = load_image(png(values, colour_type, (12,) * CHANNELS[colour_type]))
    assert np.abs(image.astype(int) - scaled(values, 16)).max() <= 1  # Pillow cuts the lower 8 bits of colour off


def test_12_bits_packed_in_a_tiff() -> None:
    values = samples(12)
    np.testing.assert_array_equal(load_image(tiff(values, 12, packed=pack_12_bits(values))), scaled(values, 12))


@pytest.mark.parametrize("depth", DEPTHS)
def test_largest_value_declared_by_a_tiff(depth: int) -> None:
    values = samples(depth)
    np.testing.assert_array_equal(load_image(tiff(values, largest=2**depth - 1)), scaled(values, depth))


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_maxval_of_a_ppm_is_believed(depth: int, channels: int) -> None:
    values = samples(depth, channels)
    np.testing.assert_array_equal(load_image(pnm(values, 2**depth - 1)), scaled(values, depth))
    dark = values // 64
    np.testing.assert_array_equal(load_image(pnm(dark, 2**depth - 1)), scaled(dark, depth))


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_maxval_that_is_no_power_of_two_is_believed(channels: int) -> None:
    values = samples(16, channels) // 66  # 0 to 992
    image = load_image(pnm(values, 1000))
    assert np.abs(image - values * (255 / 1000)).max() <= 0.6  # half a level, and rounding to 16 bits before


def test_ppm_opened_with_pillow_is_scaled_by_its_maxval() -> None:
    values = samples(10)
    image = load_image(Image.open(io.BytesIO(pnm(values, 1023))))
    np.testing.assert_array_equal(image, scaled(values, 10))


def test_16_bit_colour_in_the_plain_form_of_a_ppm() -> None:
    """Pillow has no exact way to read it: dark ones are refused, whatever is said about them."""
    bright = b"P3 2 1 65535\n0 65535 0  257 0 0\n"
    np.testing.assert_array_equal(load_image(bright), [[[0, 255, 0], [1, 0, 0]]])
    dark = b"P3 2 1 65535\n0 1023 0  4 0 0\n"
    for bit_depth in (None, 10):
        with pytest.raises(ImageError, match=r"all but black|give the path of a PNG or TIFF"):
            load_image(dark, bit_depth=bit_depth)


UNDECLARED = {
    "png-grey": lambda values: png(values),
    "png-rgb": lambda values: png(values.repeat(3, 2), RGB),
    "png-rgb-alpha": lambda values: png(values.repeat(4, 2), RGB_ALPHA),
    "tiff-little-endian": lambda values: tiff(values),
    "tiff-big-endian": lambda values: tiff(values, order=">"),
    "tiff-rgb-little-endian": lambda values: tiff(values.repeat(3, 2)),
    "tiff-rgb-big-endian": lambda values: tiff(values.repeat(3, 2), order=">"),
    "tiff-compressed": lzw,
    "pgm": lambda values: pnm(values, 65535),
    "ppm": lambda values: pnm(values.repeat(3, 2), 65535),
    "tiff-32-bit": lambda values: tiff(values, 32),
    "pil-I;16": lambda values: Image.fromarray(values[..., 0]),
    "pil-I": lambda values: Image.fromarray(values[..., 0].astype(np.int32)),
    "numpy-grey": lambda values: values,
    "numpy-rgba": lambda values: values.repeat(4, 2),
    "numpy-big-endian": lambda values: values.astype(">u2"),
    "torch": lambda values: torch.from_numpy(values).permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", UNDECLARED)
class TestUndeclared:
    @pytest.mark.parametrize("depth", [10, 12])
    def test_far_too_dark_is_refused_and_the_way_out_named(self, kind: str, depth: int) -> None:
        with pytest.raises(
            ImageError, match=rf"all but black as 16 bits; .* give bit_depth={depth} \(--bit-depth {depth}\)"
        ):
            load_image(UNDECLARED[kind](samples(depth)))

    def test_14_bits_or_a_dark_picture_is_taken_with_a_warning(self, kind: str, caplog: Any) -> None:
        values = samples(14)
        with caplog.at_level(logging.WARNING, "agln_fast.images"):
            image = load_image(UNDECLARED[kind](values))
        assert np.abs(image.astype(int) - scaled(values, 16)).max() <= 1
        assert "taken as 16 bits, a dark picture; if it has 14, give bit_depth=14 (--bit-depth 14)" in caplog.text

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_bit_depth_decides(self, kind: str, depth: int, caplog: Any) -> None:
        values = samples(depth)
        image = load_image(UNDECLARED[kind](values), bit_depth=depth)
        np.testing.assert_array_equal(image, scaled(values, depth))
        assert not caplog.text

    def test_dark_picture_is_taken_if_the_user_says_so(self, kind: str, caplog: Any) -> None:
        values = samples(12)
        image = load_image(UNDECLARED[kind](values), bit_depth=16)
        assert np.abs(image.astype(int) - scaled(values, 16)).max() <= 1
        assert not caplog.text

    def test_full_range_is_taken_without_a_word(self, kind: str, caplog: Any) -> None:
        values = samples(16)
        image = load_image(UNDECLARED[kind](values))
        assert np.abs(image.astype(int) - scaled(values, 16)).max() <= 1
        assert not caplog.text

    def test_black_is_black_whatever_the_depth(self, kind: str, caplog: Any) -> None:
        assert not load_image(UNDECLARED[kind](samples(16) * 0)).any()
        assert not caplog.text


@pytest.mark.parametrize("kind", UNDECLARED)
def test_bit_depth_below_the_values_is_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="bit depth of 10: its largest value is 4095, which takes 12"):
        load_image(UNDECLARED[kind](samples(12)), bit_depth=10)


@pytest.mark.parametrize("kind", ["tiff-32-bit", "pil-I"])
def test_8_bits_in_32_are_8_bits(kind: str) -> None:
    values = samples(8)
    np.testing.assert_array_equal(load_image(UNDECLARED[kind](values)), scaled(values, 8))


def test_tiff_with_planes_is_refused_before_pillow_reads_it_wrongly() -> None:
    with pytest.raises(ImageError, match="with a plane for each colour; save it with one for all, or as PNG"):
        load_image(tiff(samples(16, 3), planar=True))


def test_ink_is_judged_not_paper() -> None:
    """CMYK of 12 bits in 16 is all but white."""
    with pytest.raises(ImageError, match="all but black as 16 bits"):
        load_image(tiff(samples(12, 4)))
    assert load_image(tiff(samples(16, 4))).shape == (8, 16, 3)


def test_pil_image_of_16_bit_colour_not_yet_loaded() -> None:
    """Pillow has the upper 8 bits only, once it has loaded it."""
    with pytest.raises(ImageError, match=r"PIL image: .* bit_depth="):
        load_image(Image.open(io.BytesIO(png(samples(12, 3), RGB))))
    with pytest.raises(ImageError, match=r"PIL image: .*; give the path of a PNG or TIFF file of RGB samples"):
        load_image(Image.open(io.BytesIO(png(samples(12, 3), RGB))), bit_depth=12)
    assert load_image(Image.open(io.BytesIO(png(samples(16, 3), RGB)))).max() == 255


def test_declaration_is_found_in_a_pil_image_and_leaves_it_whole() -> None:
    values = samples(12)
    image = Image.open(io.BytesIO(png(values, GREY, (12,))))
    np.testing.assert_array_equal(load_image(image), scaled(values, 12))
    np.testing.assert_array_equal(np.asarray(image), values[..., 0])


def test_8_bit_images_and_floats_are_not_touched_by_a_bit_depth() -> None:
    image = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    for source in (image, Image.fromarray(image), image.astype(np.float32) / 255):
        np.testing.assert_array_equal(load_image(source, bit_depth=12), image)


@pytest.mark.parametrize("bit_depth", [0, 17, -1, 12.5, 12.0, True, "12"])
def test_senseless_bit_depth_is_refused(bit_depth: Any) -> None:
    with pytest.raises(ConfigError, match=r"bit depth .*: must be a whole number from 1 to 16"):
        load_image(np.zeros((2, 2, 3), np.uint8), bit_depth=bit_depth)


@pytest.mark.parametrize("significant", [b"", b"\0", b"\xff"], ids=["empty", "0-bits", "255-bits"])
def test_senseless_declaration_is_none(significant: bytes) -> None:
    whole = png(samples(16))
    start = whole.index(b"IDAT") - 4
    chunk = (
        struct.pack(">I", len(significant))
        + b"sBIT"
        + significant
        + struct.pack(">I", zlib.crc32(b"sBIT" + significant))
    )
    np.testing.assert_array_equal(load_image(whole[:start] + chunk + whole[start:]), scaled(samples(16), 16))


def test_declaration_of_a_length_beyond_the_file_is_a_clear_error() -> None:
    whole = png(samples(16))
    start = whole.index(b"gAMA") - 4
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(whole[:start] + struct.pack(">I", 2**31 - 1) + b"sBIT\x0c" + whole[start:])
