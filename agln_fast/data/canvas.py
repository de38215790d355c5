"""A small ray caster: a camera on a ground plane, a depth buffer, and the surfaces that scenes are painted with.

World coordinates in metres: X to the right, Y up from the ground, Z away from the camera, which stands at Z = 0.
Colours are RGB, float32, linear enough: 0 is black and 1 is white.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["Array", "Camera", "Canvas", "Colour", "Mask", "Part", "Surface", "floats", "noise"]

Array: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Colour: TypeAlias = tuple[float, float, float]

_TILE = 256  # side of the noise tile, samples
_NEAR = 0.3  # nothing is seen closer than this, metres
_THINNEST = 2  # no line is thinner than this, canvas pixels: one pixel after the canvas is halved


def floats(values: npt.ArrayLike) -> Array:
    """As a float32 array."""
    return np.asarray(values, np.float32)


@functools.cache
def _noise_tile() -> Array:
    """(_TILE, _TILE) noise with the 1/f spectrum of natural images, periodic, mean 0 and deviation 1."""
    white = np.random.default_rng(0).standard_normal((_TILE, _TILE))
    fy, fx = np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    tile = np.fft.irfft2(np.fft.rfft2(white) / frequency, (_TILE, _TILE))
    return np.asarray(tile / tile.std(), np.float32)


def noise(y: Array, x: Array, *, smooth: bool = False) -> Array:
    """1/f noise of mean 0 and deviation 1 at any coordinates, in tile samples; it repeats every 256.

    smooth: interpolate between the samples, for noise that is magnified.
    """
    tile = _noise_tile()
    top, left = np.floor(y), np.floor(x)
    rows, columns = top.astype(np.int32) & _TILE - 1, left.astype(np.int32) & _TILE - 1
    if not smooth:
        return np.asarray(tile[rows, columns])
    down, right = rows + 1 & _TILE - 1, columns + 1 & _TILE - 1
    v, u = y - top, x - left
    upper = tile[rows, columns] * (1 - u) + tile[rows, right] * u
    return np.asarray(upper * (1 - v) + (tile[down, columns] * (1 - u) + tile[down, right] * u) * v)


@dataclass(frozen=True)
class Camera:
    """horizon and focal as shares of the image's height; x and eye in metres; yaw in radians, to the right."""

    horizon: float
    focal: float
    x: float
    eye: float
    yaw: float


class Surface(NamedTuple):
    """Where rays meet a plane: mask (H, W); for the n pixels in it depth (n,) and two coordinates in the plane (n,)."""

    mask: Mask
    depth: Array
    first: Array
    second: Array


class Part(NamedTuple):
    """A shape of a sprite; points (x, y) in metres from the foot, x to the right and y up.

    "line" is a polyline of `width` metres, "ellipse" is given by two corners, "polygon" by its corners.
    """

    kind: Literal["line", "ellipse", "polygon"]
    points: Sequence[tuple[float, float]]
    colour: Colour
    width: float = 0.0


class Canvas:
    """colour (H, W, 3) float32, labels (H, W) uint8, and depth (H, W) float32 in metres, inf where nothing is yet.

    right, up (H, W): direction of each pixel's ray in the camera's frame, with forward = 1.
    """

    def __init__(self, height: int, width: int, camera: Camera) -> None:
        self.camera = camera
        self.focal = camera.focal * height
        self.centre = width / 2, camera.horizon * height
        v, u = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
        self.right: Array = (u - self.centre[0]) / self.focal
        self.up: Array = (self.centre[1] - v) / self.focal
        sin, cos = np.float32(np.sin(camera.yaw)), np.float32(np.cos(camera.yaw))
        self._x: Array = cos * self.right + sin
        self._z: Array = cos - sin * self.right
        self.colour: Array = np.zeros((height, width, 3), np.float32)
        self.labels: npt.NDArray[np.uint8] = np.zeros((height, width), np.uint8)
        self.depth: Array = np.full((height, width), np.inf, np.float32)

    def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """World point -> column, row (canvas pixels, may lie outside) and depth in metres (may be negative)."""
        sin, cos = float(np.sin(self.camera.yaw)), float(np.cos(self.camera.yaw))
        x -= self.camera.x
        forward, right = sin * x + cos * z, cos * x - sin * z
        scale = self.focal / max(forward, 1e-6)
        return self.centre[0] + scale * right, self.centre[1] - scale * (y - self.camera.eye), forward

    def ground(self) -> Surface:
        """The plane Y = 0, as far as 2 km; coordinates X, Z."""
        mask = self.up < -self.camera.eye / 2000
        depth = -self.camera.eye / self.up[mask]
        return self._visible(mask, depth, self.camera.x + depth * self._x[mask], depth * self._z[mask])

    def side(self, x: float, z: tuple[float, float], y: tuple[float, float]) -> Surface:
        """The vertical plane X = x within ranges of Z and Y; coordinates Z, Y."""
        with np.errstate(divide="ignore"):
            depth = (np.float32(x) - self.camera.x) / self._x
        return self._rectangle(depth, depth * self._z, z, y)

    def front(self, z: float, x: tuple[float, float], y: tuple[float, float]) -> Surface:
        """The vertical plane Z = z within ranges of X and Y; coordinates X, Y."""
        with np.errstate(divide="ignore"):
            depth = np.float32(z) / self._z
        return self._rectangle(depth, self.camera.x + depth * self._x, x, y)

    def _rectangle(self, depth: Array, along: Array, limits: tuple[float, float], y: tuple[float, float]) -> Surface:
        with np.errstate(invalid="ignore"):
            height = self.camera.eye + depth * self.up
            mask = (depth > _NEAR) & (along >= limits[0]) & (along <= limits[1]) & (height >= y[0]) & (height <= y[1])
        return self._visible(mask, depth[mask], along[mask], height[mask])

    def _visible(self, mask: Mask, depth: Array, first: Array, second: Array) -> Surface:
        nearer = depth < self.depth[mask]
        visible = np.zeros_like(mask)
        visible[mask] = nearer
        return Surface(visible, depth[nearer], first[nearer], second[nearer])

    def paint(self, surface: Surface, colour: Array | Colour, label: int | npt.NDArray[np.uint8]) -> None:
        """Cover what lies behind `surface`; colour (n, 3) or one for all, label (n,) or one for all."""
        self.colour[surface.mask] = colour
        self.labels[surface.mask] = label
        self.depth[surface.mask] = surface.depth

    def subset(self, surface: Surface, chosen: Mask) -> Surface:
        """The pixels of `surface` for which `chosen` (n,) is true."""
        mask = np.zeros_like(surface.mask)
        mask[surface.mask] = chosen
        return Surface(mask, surface.depth[chosen], surface.first[chosen], surface.second[chosen])

    def sprite(
        self,
        x: float,
        z: float,
        parts: Sequence[Part],
        label: int,
        texture: Callable[[Array, Array], tuple[Array, Mask]] | None = None,
    ) -> None:
        """Stand flat shapes at (x, 0, z), facing the camera.

        texture: rows and columns (n,) from the foot in centimetres -> factor on the colour (n,), and whether the pixel
            is covered at all (n,).
        """
        column, row, depth = self.project(x, 0.0, z)
        if depth < _NEAR:
            return
        scale = self.focal / depth
        for part in parts:
            points = [(column + scale * px, row - scale * py) for px, py in part.points]
            width = max(_THINNEST, round(scale * part.width)) if part.kind == "line" else 0
            self._stamp(part, points, width, depth, (column, row, scale), label, texture)

    def polyline(self, points: Sequence[tuple[float, float, float]], width: float, colour: Colour, label: int) -> None:
        """A line through world points (X, Y, Z), `width` metres thick; pieces behind the camera are left out."""
        projected = [self.project(*point) for point in points]
        for (u0, v0, d0), (u1, v1, d1) in pairwise(projected):
            depth = (d0 + d1) / 2
            if min(d0, d1) > 2 * _NEAR:
                part = Part("line", (), colour)
                thickness = max(_THINNEST, round(self.focal / depth * width))
                self._stamp(part, [(u0, v0), (u1, v1)], thickness, depth, (0.0, 0.0, 1.0), label, None)

    def _stamp(
        self,
        part: Part,
        points: Sequence[tuple[float, float]],
        width: int,
        depth: float,
        origin: tuple[float, float, float],
        label: int,
        texture: Callable[[Array, Array], tuple[Array, Mask]] | None,
    ) -> None:
        height_, width_ = self.labels.shape
        columns, rows = zip(*points, strict=True)
        left, top = max(0, int(min(columns)) - width - 1), max(0, int(min(rows)) - width - 1)
        right, bottom = min(width_, int(max(columns)) + width + 2), min(height_, int(max(rows)) + width + 2)
        if left >= right or top >= bottom:
            return
        stencil = Image.new("1", (right - left, bottom - top))
        draw = ImageDraw.Draw(stencil)
        local = [(column - left, row - top) for column, row in points]
        if part.kind == "line":
            draw.line(local, fill=1, width=width, joint="curve")
        elif part.kind == "polygon":
            draw.polygon(local, fill=1)
        else:
            (x0, y0), (x1, y1) = local
            draw.ellipse((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=1)
        box = np.s_[top:bottom, left:right]
        mask = np.asarray(stencil) & (self.depth[box] > depth)
        colour: Array = np.asarray(part.colour, np.float32)
        if texture is not None:
            v, u = np.nonzero(mask)
            column, row, scale = origin
            factor, covered = texture(
                ((row - top - v) / scale * 100).astype(np.float32),
                ((u + left - column) / scale * 100).astype(np.float32),
            )
            mask[v[~covered], u[~covered]] = False
            colour = colour * factor[covered, None]
        self.colour[box][mask] = colour
        self.labels[box][mask] = label
        self.depth[box][mask] = depth
