"""Decoding, flattening, listing and fitting of images."""

import errno
import io
import itertools
import math
import os
import shutil
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from agln_fast.contract import IOContract
from agln_fast.errors import ConfigError, ImageError
from agln_fast.runtime.images import Placement, as_image_list, fit, list_images, load_image, windows

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
QUARTERS = np.array([[RED, GREEN, BLUE], [WHITE, WHITE, WHITE]], np.uint8)  # (2, 3, 3)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    Image.fromarray(QUARTERS).save(path)
    return path


def assert_image(image: np.ndarray[Any, Any], expected: object) -> None:
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(image, np.asarray(expected))


TENSOR = torch.from_numpy(QUARTERS).permute(2, 0, 1)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(Image.fromarray(QUARTERS), id="pil"),
        pytest.param(QUARTERS, id="numpy-rgb"),
        pytest.param(QUARTERS[::-1].copy()[::-1], id="numpy-with-negative-strides"),
        pytest.param(np.dstack([QUARTERS, np.zeros((2, 3), np.uint8)]), id="numpy-rgba-drops-transparent-alpha"),
        pytest.param(TENSOR, id="torch-uint8"),
        pytest.param(TENSOR.float() / 255, id="torch-float32"),
        pytest.param(TENSOR.half() / 255, id="torch-float16"),
        pytest.param((TENSOR.double() / 255).requires_grad_(), id="torch-float64-with-grad"),
    ],
)
def test_every_kind_of_source_gives_the_same_image(source: Any) -> None:
    assert_image(load_image(source), QUARTERS)


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tga", "qoi", "ppm"])
def test_lossless_files(suffix: str, kind: type, tmp_path: Path) -> None:
    Image.fromarray(QUARTERS).save(tmp_path / f"street.{suffix}")
    assert_image(load_image(kind(tmp_path / f"street.{suffix}")), QUARTERS)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "jp2"])
def test_lossy_files_are_close(suffix: str, tmp_path: Path) -> None:
    grey = np.full((32, 48, 3), 100, np.uint8)
    Image.fromarray(grey).save(tmp_path / f"street.{suffix}")
    image = load_image(tmp_path / f"street.{suffix}")
    assert image.shape == grey.shape
    assert np.abs(image.astype(int) - 100).max() <= 3


def test_every_8_bit_value_survives_a_float_tensor() -> None:
    values = torch.arange(256, dtype=torch.float32).reshape(1, 16, 16)
    assert_image(load_image(values / 255), np.arange(256).reshape(16, 16, 1).repeat(3, 2))


@pytest.mark.parametrize(
    "grey",
    [
        pytest.param(np.array([[0, 128, 255]], np.uint8), id="height-width"),
        pytest.param(np.array([[[0], [128], [255]]], np.uint8), id="height-width-1"),
        pytest.param(torch.tensor([[[0, 128, 255]]], dtype=torch.uint8), id="tensor-1-height-width"),
    ],
)
def test_grey_is_spread_over_three_channels(grey: Any) -> None:
    assert_image(load_image(grey), [[[0] * 3, [128] * 3, [255] * 3]])


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)  # / 257: 0, 0.498, 0.502, 1, 128, 255
    Image.fromarray(values).save(tmp_path / f"depth.{suffix}")
    assert_image(load_image(tmp_path / f"depth.{suffix}"), np.array([[0, 0, 1, 1, 128, 255]])[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.fromarray(QUARTERS).quantize(4), QUARTERS, id="palette"),
        pytest.param(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[RED]], id="cmyk-red-is-magenta-and-yellow"),
        pytest.param(Image.new("RGBA", (1, 1), (*GREEN, 0)), [[GREEN]], id="rgba-keeps-what-alpha-hides"),
        pytest.param(Image.new("LA", (1, 1), (77, 0)), [[[77] * 3]], id="grey-with-alpha"),
        pytest.param(Image.new("1", (1, 1), 1), [[WHITE]], id="one-bit"),
    ],
)
def test_pil_modes(image: Image.Image, expected: object) -> None:
    assert_image(load_image(image), expected)


def test_palette_with_alpha_keeps_its_colours_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(QUARTERS).quantize(4)
    image.save(tmp_path / "logo.png", transparency=bytes([0, 100, 200, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_image(load_image(tmp_path / "logo.png"), QUARTERS)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        pytest.param(1, QUARTERS, id="1-upright"),
        pytest.param(3, QUARTERS[::-1, ::-1], id="3-upside-down"),
        pytest.param(6, np.rot90(QUARTERS, -1), id="6-red-from-top-left-to-top-right"),
        pytest.param(8, np.rot90(QUARTERS, 1), id="8-red-from-top-left-to-bottom-left"),
        pytest.param(9, QUARTERS, id="9-is-none"),
    ],
)
@pytest.mark.parametrize("through", ["file", "pil"])
def test_exif_orientation(orientation: int, expected: object, through: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.png"
    Image.fromarray(QUARTERS).save(path, exif=exif)
    assert_image(load_image(path if through == "file" else Image.open(path)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "P", "I;16", "F"])
def test_every_orientation_of_an_image_of_many_strips_is_what_pillow_makes_of_it(orientation: int, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (701, 400), np.uint8)
    image = {
        "RGB": lambda: Image.fromarray(values).convert("RGB"),
        "P": lambda: Image.fromarray(values).convert("RGB").quantize(16),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16) * 257),
        "F": lambda: Image.fromarray(values.astype(np.float32) / 255),
    }[mode]()
    expected = Image.fromarray(load_image(image))
    image.getexif()[0x0112] = expected.getexif()[0x0112] = orientation
    assert_image(load_image(image), np.asarray(ImageOps.exif_transpose(expected)))


def test_exif_orientation_6_moves_the_marked_pixel_to_the_top_right() -> None:
    image = Image.fromarray(QUARTERS)
    image.getexif()[0x0112] = 6
    rotated = load_image(image)
    assert rotated.shape == (3, 2, 3)
    assert rotated[0, 1].tolist() == RED


def test_array_in_the_returned_form_is_not_copied() -> None:
    assert np.shares_memory(load_image(QUARTERS), QUARTERS)


def test_phone_photo_with_a_depth_map_is_a_still_image(tmp_path: Path) -> None:
    photo = Image.new("RGB", (16, 16), "red")
    photo.save(tmp_path / "phone.mpo", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    (tmp_path / "phone.mpo").rename(tmp_path / "phone.jpg")
    assert load_image(tmp_path / "phone.jpg")[8, 8, 0] > 200


def test_current_frame_of_an_animated_pil_image(tmp_path: Path) -> None:
    save_animation(tmp_path / "walk.gif")
    with Image.open(tmp_path / "walk.gif") as image:
        image.seek(1)
        assert load_image(image)[0, 0].tolist() == BLUE


def save_animation(path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(path, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])


@pytest.mark.parametrize("name", ["walk.gif", "walk.png", "walk.webp", "pages.tiff", "walk.avif"])
def test_file_of_several_frames_is_refused(name: str, tmp_path: Path) -> None:
    save_animation(tmp_path / name)
    with pytest.raises(ImageError, match=rf"{name}: has several frames"):
        load_image(tmp_path / name)


def test_missing_file_suggests_its_neighbour(png: Path) -> None:
    with pytest.raises(ImageError, match=r"stret\.png: no such file; did you mean 'street\.png'"):
        load_image(png.with_name("stret.png"))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no such file$"):
        load_image(tmp_path / "nowhere" / "street.png")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>not found</html>", id="a-web-page-saved-as-png"),
        pytest.param(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", id="eps-starts-no-ghostscript"
        ),
    ],
)
def test_file_that_is_no_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "street.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"street\.png: is not an image of a known format \(AVIF, BMP,"):
        load_image(tmp_path / "street.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "gif", "webp", "avif", "jp2", "qoi", "tga", "ppm"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_file_is_one_clear_error(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"street.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ImageError, match=rf"street\.{suffix}: (cannot be decoded: |is not an image)") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_closed_pil_image(png: Path) -> None:
    with Image.open(png) as image:
        pass
    with pytest.raises(ImageError, match="PIL image: cannot be decoded"):
        load_image(image)


def test_unreadable_name_is_one_clear_error() -> None:
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        load_image("x" * 5000)


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a hundred bytes that promises width x height pixels and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", 8000, 5000)
    with pytest.raises(ImageError, match=r"8000x5000 pixels, above the limit of 39999999; .*AGLN_FAST_MAX_PIXELS"):
        load_image(path, max_pixels=39_999_999)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(path)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        pytest.param(10_000, 10_000, "above the limit of 89478485", id="pillow-warns"),
        pytest.param(20_000, 20_000, "too large for Pillow", id="pillow-raises"),
    ],
)
def test_decompression_bomb_is_refused_by_default(width: int, height: int, message: str, tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", width, height)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=message):
            load_image(path)


def test_pillows_warning_as_an_error_is_the_same_error(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.png", 10_000, 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large for Pillow"):
            load_image(path)


@pytest.mark.parametrize("source", [QUARTERS, TENSOR, Image.fromarray(QUARTERS)], ids=["numpy", "torch", "pil"])
def test_pixel_limit_holds_for_images_in_memory(source: Any) -> None:
    assert load_image(source, max_pixels=6).shape == (2, 3, 3)
    with pytest.raises(ImageError, match="3x2 pixels, above the limit of 5"):
        load_image(source, max_pixels=5)


def test_loading_in_threads_leaves_pillows_limit_alone(png: Path) -> None:
    before, shapes = Image.MAX_IMAGE_PIXELS, []
    threads = [
        threading.Thread(target=lambda limit=limit: shapes.append(load_image(png, max_pixels=limit).shape))
        for limit in range(6, 14)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [(2, 3, 3)] * 8
    assert before == Image.MAX_IMAGE_PIXELS


def load_all(sources: Any) -> list[np.ndarray[Any, Any]]:
    """As `segment` does."""
    return [load_image(source) for source in as_image_list(sources)[0]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(np.zeros((0, 5, 3), np.uint8), "is empty", id="numpy-without-rows"),
        pytest.param(torch.zeros(3, 5, 0), "is empty", id="tensor-without-columns"),
        pytest.param(np.zeros((4, 4, 3), np.int64), "int64: must be uint8", id="numpy-int64"),
        pytest.param(np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\).*must be \(H, W\)", id="numpy-channels-first"),
        pytest.param(np.zeros((4, 4, 2), np.uint8), r"must be \(H, W\)", id="numpy-two-channels"),
        pytest.param(np.zeros((5,), np.uint8), r"must be \(H, W\)", id="numpy-one-dimension"),
        pytest.param(torch.zeros(4, 5, 3), r"\(4, 5, 3\) float32: must be \(1, H, W\)", id="tensor-channels-last"),
        pytest.param(torch.zeros(4, 5), r"must be \(1, H, W\)", id="tensor-two-dimensions"),
        pytest.param(torch.zeros(3, 4, 5, dtype=torch.int64), "int64: must be uint8", id="tensor-int64"),
        pytest.param(
            Image.new("I", (2, 2), 70_000), "values from 70000 to 70000; whole numbers must be", id="pil-32-bit"
        ),
        pytest.param(Image.new("I", (2, 2), -1), "values from -1 to -1; whole numbers must be", id="pil-negative"),
        pytest.param(Image.new("RGB", (0, 2)), "is empty", id="pil-without-columns"),
        pytest.param(None, "NoneType is no image: needs a path", id="none"),
        pytest.param(3, "int is no image", id="a-number"),
        pytest.param((x for x in "ab"), "generator is no image: .* or a list of these", id="generator"),
        pytest.param({}, "dict is no image", id="dict"),
        pytest.param(np.array(5, np.uint8), r"\(\) uint8: must be \(H, W\)", id="numpy-without-dimensions"),
        pytest.param(np.zeros((1, 1, 4, 4, 3), np.uint8), r"batch \(N, H, W, C\)", id="numpy-five-dimensions"),
        pytest.param(np.array([[None, 1]], object), r"\(1, 2\) object: must be uint8", id="numpy-objects"),
        pytest.param(np.array([["a", "b"]]), "<U1: must be uint8", id="numpy-text"),
        pytest.param(np.zeros((4, 4), bool), "bool: must be uint8", id="numpy-bool"),
        pytest.param(np.zeros((4, 4, 3), complex), "complex128: must be uint8", id="numpy-complex"),
        pytest.param(np.zeros((4, 4), [("r", np.uint8)]), "must be uint8", id="numpy-records"),
        pytest.param(np.ma.masked_equal(QUARTERS, 0), r"masked values; fill them with \.filled\(\)", id="numpy-masked"),
        pytest.param(torch.zeros(3, 4, 5).to_sparse(), r"sparse tensor of float32: .* \.to_dense\(\)", id="tensor-coo"),
        pytest.param(torch.zeros(2, 3, 4, 5).to_sparse(), r"sparse tensor", id="tensor-coo-batch"),
        pytest.param(torch.zeros(3, 4, 5, device="meta"), "meta tensor of float32: .* real device", id="tensor-meta"),
        pytest.param(torch.zeros(3, 4, 5, dtype=torch.complex64), "complex64: must be uint8", id="tensor-complex"),
        pytest.param(torch.zeros(3, 4, 5, dtype=torch.bool), "bool: must be uint8", id="tensor-bool"),
        pytest.param(torch.tensor(1.0), r"tensor \(\) float32: must be \(1, H, W\)", id="tensor-without-dimensions"),
        pytest.param(torch.zeros(1, 1, 3, 4, 5), r"batch \(N, 3, H, W\)", id="tensor-five-dimensions"),
    ],
)
def test_wrong_source_says_what_came_and_what_is_needed(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)

    with pytest.raises(ImageError, match=message):
        load_all(source)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_rows_are_refused() -> None:
    with pytest.raises(ImageError, match=r"sparse tensor of float32: .* \.to_dense\(\)"):
        load_all(torch.zeros(4, 5).to_sparse_csr())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensor_is_refused(layout: torch.layout) -> None:
    parts = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 5)] if layout is torch.strided else [torch.zeros(4, 5)] * 2
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(ImageError, match=r"nested tensor of float32: .* a list of its parts, \.unbind\(\)"):
        load_all(nested)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantized_tensor_is_refused() -> None:
    with pytest.raises(ImageError, match=r"quantized tensor of quint8: .* \.dequantize\(\)"):
        load_image(torch.quantize_per_tensor(torch.zeros(3, 4, 5), 0.1, 0, torch.quint8))


def test_list_without_an_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ImageError, match="a list that contains itself, or lists too deep"):
        as_image_list(endless)


def test_lists_of_numbers_are_no_image() -> None:
    with pytest.raises(ImageError, match="int is no image"):
        load_image(as_image_list([[0, 1], [2, 3]])[0][0])


FLOATS = QUARTERS.astype(np.float64) / 255


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(FLOATS, id="numpy-float64"),
        pytest.param(FLOATS.astype(np.float16), id="numpy-float16"),
        pytest.param(FLOATS.astype(">f4"), id="numpy-big-endian"),
        pytest.param(FLOATS.astype(np.longdouble), id="numpy-longdouble"),
        pytest.param(np.dstack([FLOATS, np.full((2, 3), 7.0)]), id="alpha-is-not-looked-at"),
        pytest.param(FLOATS * 1.001, id="0.001-above"),
        pytest.param(FLOATS * 1.002 - 0.001, id="0.001-beyond-both-ends"),
        pytest.param(TENSOR.bfloat16() / 255, id="bfloat16"),
        pytest.param(TENSOR.float() / 255 + 0.001, id="tensor-0.001-above"),
        pytest.param((TENSOR.double() / 255).flip(2).flip(2), id="tensor"),
        pytest.param((TENSOR.float() / 255).permute(1, 2, 0).contiguous().permute(2, 0, 1), id="not-contiguous"),
        pytest.param(QUARTERS.copy().view(np.ma.MaskedArray), id="masked-array-without-a-mask"),
        pytest.param(QUARTERS.astype(np.uint16) * 257, id="uint16"),
    ],
)
def test_floats_and_others_are_taken_and_overshoot_is_clamped(source: Any) -> None:
    assert_image(load_image(source), QUARTERS)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_matrix_and_float_pil_image_are_grey() -> None:
    assert_image(load_image(np.matrix([[0, 128, 255]], np.uint8)), [[[0] * 3, [128] * 3, [255] * 3]])
    assert_image(load_image(Image.fromarray(np.array([[0, 0.2, 1]], np.float32))), [[[0] * 3, [51] * 3, [255] * 3]])


@pytest.mark.parametrize(
    "wrap", [lambda a: a[0], torch.from_numpy, lambda a: Image.fromarray(a[0])], ids=["numpy", "torch", "pil"]
)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            [0.0, 255.0], "values from 0 to 255, and floating-point images need 0..1; divide it by 255", id="0-to-255"
        ),
        pytest.param([0.0, 65535.0], "0 to 65535, .* divide it by its largest possible value", id="0-to-65535"),
        pytest.param([-2.1, 2.6], "values from -2.1 to 2.6, .* before mean and std", id="normalised-already"),
        pytest.param([0.0, 1.0015], "values from 0 to 1.0015, and", id="0.0015-above"),
        pytest.param([-0.0011, 1.0], "values from -0.0011 to 1, and", id="0.0011-below"),
        pytest.param([0.0, np.nan], "values that are NaN or infinite; floating-point images are RGB in 0..1", id="nan"),
        pytest.param([-np.inf, 1.0], "values that are NaN or infinite", id="infinite"),
    ],
)
def test_floats_out_of_range_say_what_came_and_what_is_needed(values: list[float], message: str, wrap: Any) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(wrap(np.array([[values, values]], np.float32)))


@pytest.mark.parametrize(
    "kind", ["bytes", "bytearray", "memoryview", "BytesIO", "BytesIO-at-its-end", "file", "unseekable"]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "jp2", "webp", "qoi"])
def test_content_in_memory_and_open_files(kind: str, suffix: str, tmp_path: Path) -> None:
    """Files are read from their beginning, if they can be set back, and stay open."""
    path = tmp_path / f"street.{suffix}"
    Image.fromarray(QUARTERS).save(
        path, **({"compression": "tiff_lzw"} if suffix == "tif" else {"lossless": True} if suffix == "webp" else {})
    )
    expected, content = load_image(path), path.read_bytes()
    if kind in ("bytes", "bytearray", "memoryview"):
        assert_image(
            load_image({"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}[kind](content)), expected
        )
        return
    file: Any = path.open("rb") if kind == "file" else io.BytesIO(content)
    with file:
        if kind == "BytesIO-at-its-end":
            file.seek(0, 2)
        assert_image(load_image(Unseekable(file) if kind == "unseekable" else file), expected)
        assert not file.closed
        file.seek(0)
        assert file.read() == content


class Unseekable:
    """What a socket or a pipe is: an answer of a server, say."""

    def __init__(self, file: io.BytesIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        return self.file.read(min(size, 10) if size > 0 else size)


def test_views_with_gaps_and_entries_of_byte_names_are_sources(png: Path) -> None:
    content = png.read_bytes()
    assert_image(load_image(memoryview(bytes(content[i // 2] for i in range(2 * len(content))))[::2]), QUARTERS)
    with os.scandir(os.fsencode(png.parent)) as entries:
        assert_image(load_image(next(entries)), QUARTERS)  # type: ignore[arg-type]


def test_pipe_is_read(png: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(png.read_bytes()))
    writer.start()
    try:
        assert_image(load_image(tmp_path / "pipe"), QUARTERS)
    finally:
        writer.join()
    assert list_images(tmp_path / "pipe") == [tmp_path / "pipe"]


def test_stream_without_an_end_is_refused() -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            return bytes(size)

    with pytest.raises(
        ImageError, match="Endless: has more bytes than an image of 100 pixels; raise AGLN_FAST_MAX_PIXELS"
    ):
        load_image(Endless(), max_pixels=100)  # type: ignore[arg-type]


def test_file_opened_as_text_is_refused(png: Path) -> None:
    with png.open() as file, pytest.raises(ImageError, match=r"street\.png: read\(\) gives str, not bytes; .*'rb'"):
        load_image(file)  # type: ignore[arg-type]


def test_closed_file_is_refused(png: Path) -> None:
    with png.open("rb") as file:
        pass
    with pytest.raises(ImageError, match="cannot be decoded: read of closed file"):
        load_image(file)


def test_content_that_is_no_image_is_named_by_its_size() -> None:
    with pytest.raises(ImageError, match="12 bytes: is not an image of a known format"):
        load_image(b"<html></html"[:12])


def test_pixel_limit_holds_for_content_in_memory(png: Path) -> None:
    with pytest.raises(ImageError, match="3x2 pixels, above the limit of 5"):
        load_image(png.read_bytes(), max_pixels=5)


@pytest.mark.parametrize(
    ("sources", "count", "single"),
    [
        pytest.param("a.png", 1, True, id="path"),
        pytest.param(Image.fromarray(QUARTERS), 1, True, id="pil"),
        pytest.param(QUARTERS, 1, True, id="numpy-hwc"),
        pytest.param(TENSOR, 1, True, id="torch-chw"),
        pytest.param(["a.png"], 1, False, id="list-of-one-is-a-list"),
        pytest.param(("a.png", QUARTERS, TENSOR), 3, False, id="mixed-tuple"),
        pytest.param([], 0, False, id="empty-list"),
        pytest.param(torch.zeros(4, 3, 8, 8), 4, False, id="torch-nchw"),
        pytest.param(torch.zeros(1, 3, 8, 8), 1, False, id="torch-nchw-of-one-is-a-batch"),
        pytest.param(np.zeros((2, 8, 8, 3), np.uint8), 2, False, id="numpy-nhwc"),
        pytest.param(["a.png", torch.zeros(4, 3, 8, 8)], 5, False, id="batch-in-a-list"),
    ],
)
def test_as_image_list(sources: Any, count: int, single: bool) -> None:
    flat, is_single = as_image_list(sources)
    assert len(flat) == count
    assert is_single is single
    assert all(not isinstance(item, (np.ndarray, torch.Tensor)) or item.ndim == 3 for item in flat)


@pytest.fixture
def folder(tmp_path: Path, png: Path) -> Path:
    for name in ("b.PNG", "a [1].png"):
        shutil.copy(png, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deeper.png").mkdir()
    shutil.copy(png, tmp_path / "deeper.png" / "c.png")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        pytest.param("", ["a [1].png", "b.PNG", "street.png"], id="folder-is-not-recursive"),
        pytest.param("street.png", ["street.png"], id="file"),
        pytest.param("notes.txt", ["notes.txt"], id="file-of-any-suffix"),
        pytest.param("a [1].png", ["a [1].png"], id="file-that-looks-like-a-pattern"),
        pytest.param("*", ["a [1].png", "b.PNG", "street.png"], id="pattern-takes-images-only"),
        pytest.param("**/*.png", ["a [1].png", "c.png", "street.png"], id="recursive-pattern"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path], ids=["str", "Path"])
def test_list_images(pattern: str, names: list[str], kind: type, folder: Path) -> None:
    assert [path.name for path in list_images(kind(folder / pattern))] == names


def test_recursive_listing_goes_into_folders_but_not_through_links(folder: Path) -> None:
    (folder / "deeper.png" / "loop").symlink_to(folder)
    (folder / ".hidden").mkdir()
    for path in (folder / ".hidden" / "d.png", folder / "._b.png"):
        shutil.copy(folder / "street.png", path)
    names = [path.name for path in list_images(folder, recursive=True)]
    assert names == ["a [1].png", "b.PNG", "c.png", "street.png"]


def test_folder_that_cannot_be_read_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ImageError, match=r"cannot be read: Permission denied"):
        list_images(folder, recursive=True)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("stret.png", r"no such file; did you mean 'street\.png'", id="misspelt"),
        pytest.param("*.txt", r"none of its 1 files is an image \(.*\.png", id="pattern-of-other-files"),
        pytest.param("deeper.png/empty", "holds no files", id="empty-folder"),
    ],
)
def test_list_images_without_any_names_the_fix(pattern: str, message: str, folder: Path) -> None:
    (folder / "deeper.png" / "empty").mkdir()
    with pytest.raises(ImageError, match=message):
        list_images(folder / pattern)


MEAN = [124, 116, 104]  # of ImageNet, (0.485, 0.456, 0.406) * 255 rounded


def contract(resize: Literal["stretch", "pad", "slide"]) -> IOContract:
    return IOContract(64, 96, resize=resize, output="logits")


@pytest.mark.parametrize(
    ("resize", "shape", "frame_shape", "placement"),
    [
        pytest.param("stretch", (200, 50), (64, 96), Placement(0, 0, 64, 96), id="stretch-ignores-the-ratio"),
        pytest.param("pad", (200, 50), (64, 96), Placement(0, 0, 64, 16), id="pad-right-of-a-tall-image"),
        pytest.param("pad", (10, 30), (64, 96), Placement(0, 0, 32, 96), id="pad-below-a-wide-image-scaled-up"),
        pytest.param("pad", (64, 96), (64, 96), Placement(0, 0, 64, 96), id="pad-nothing"),
        pytest.param("pad", (1, 1000), (64, 96), Placement(0, 0, 1, 96), id="pad-keeps-at-least-one-row"),
        pytest.param("slide", (50, 200), (64, 200), Placement(0, 0, 50, 200), id="slide-pads-up-to-the-window"),
        pytest.param("slide", (80, 97), (80, 97), Placement(0, 0, 80, 97), id="slide-keeps-a-large-image"),
    ],
)
def test_fit(
    resize: Literal["stretch", "pad", "slide"],
    shape: tuple[int, int],
    frame_shape: tuple[int, int],
    placement: Placement,
) -> None:
    frame, where = fit(np.full((*shape, 3), 7, np.uint8), contract(resize))
    assert where == placement
    assert frame.shape == (*frame_shape, 3)
    expected = np.full((*frame_shape, 3), MEAN, np.uint8)
    expected[: where.height, : where.width] = 7
    assert_image(frame, expected)


def test_shrinking_is_antialiased() -> None:
    """A checkerboard of single pixels becomes grey; sampling alone would keep it black and white."""
    checkers = (np.indices((640, 960)).sum(0) % 2 * 255).astype(np.uint8)
    frame, _ = fit(load_image(checkers), contract("stretch"))
    assert np.abs(frame.astype(int) - 127.5).max() < 16


@pytest.mark.parametrize(
    ("frame", "window", "corners"),
    [
        pytest.param((64, 96), (64, 96), [(0, 0)], id="exactly-one"),
        pytest.param((50, 90), (64, 96), [(0, 0)], id="smaller-than-the-window"),
        pytest.param((64, 97), (64, 96), [(0, 0), (0, 1)], id="one-pixel-more-needs-a-second"),
        pytest.param((64, 224), (64, 96), [(0, 0), (0, 64), (0, 128)], id="stride-is-two-thirds"),
        pytest.param((64, 225), (64, 96), [(0, 0), (0, 64), (0, 128), (0, 129)], id="last-is-flush-with-the-border"),
        pytest.param((107, 97), (64, 96), [(0, 0), (0, 1), (43, 0), (43, 1)], id="row-by-row-with-a-rounded-up-stride"),
    ],
)
def test_windows_by_hand(frame: tuple[int, int], window: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    assert windows(*frame, *window) == corners


@given(st.integers(1, 3000), st.integers(32, 1024), st.floats(0, 0.9))
def test_windows_cover_every_pixel_and_overlap_enough(length: int, window: int, overlap: float) -> None:
    starts = [left for _, left in windows(1, length, 1, window, overlap)]
    assert starts[0] == 0
    assert starts[-1] == max(0, length - window)
    assert all(0 < b - a <= math.ceil(window * (1 - overlap)) for a, b in itertools.pairwise(starts))


def test_stride_of_the_default_overlap_is_exact_for_every_window() -> None:
    strides = [windows(1, 2 * window, 1, window)[1][1] for window in range(32, 4097)]
    assert strides == [-(-window * 2 // 3) for window in range(32, 4097)]


@pytest.mark.parametrize("overlap", [-0.1, 1.0, math.nan], ids=["negative", "endless", "nan"])
def test_senseless_overlap_is_refused(overlap: float) -> None:
    with pytest.raises(ConfigError, match=r"overlap .* at least 0 and below 1"):
        windows(100, 100, 64, 64, overlap)
