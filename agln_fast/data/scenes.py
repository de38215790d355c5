"""Scenes: a procedural outdoor dataset, made for the two problems that AGLN is about, needing nothing from outside.

Every scene is drawn from a seed: a street, a shore or open country under one sky and one light, ray cast with true
perspective and occlusion, then hazed, blurred and given a sensor's noise.

- Large regions whose class only the whole scene can tell: water mirrors the very sky above it, calm or rippled; walls
  and roads may be of one concrete, as may pavements and buildings; crowns and lawns are of one green.
- Thin, small and touching things: railings, lamp posts, wires, conifers before forests, groups of people from an arm's
  length to a few pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from agln_fast import interruption
from agln_fast.data.canvas import Array, Camera, Canvas, Colour, Mask, Part, Surface, floats, noise
from agln_fast.data.classes import class_set
from agln_fast.data.dataset import Sample, SegmentationDataset
from agln_fast.errors import ConfigError, DatasetError, choose

__all__ = ["SCENE_SIZE", "Scenes", "write_scenes"]

SCENE_SIZE = (128, 128)
"""Height and width of a scene, pixels, where none are given: what the shipped checkpoints were trained on."""

_SPLITS = {"train": 2000, "val": 250, "test": 250}
_LARGEST = 8192
SKY, WATER, MOUNTAIN, GRASS, ROAD, PAVEMENT, WALL, BUILDING, TREE, PERSON, POLE, FENCE = range(12)

# Zenith and horizon: clear, summer, milky, overcast, evening, storm.
_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((0.25, 0.47, 0.80), (0.68, 0.80, 0.92)),
    ((0.16, 0.38, 0.72), (0.55, 0.70, 0.86)),
    ((0.58, 0.66, 0.74), (0.80, 0.82, 0.83)),
    ((0.62, 0.64, 0.67), (0.74, 0.75, 0.76)),
    ((0.36, 0.38, 0.58), (0.94, 0.70, 0.50)),
    ((0.36, 0.40, 0.46), (0.60, 0.62, 0.63)),
)
_PLASTER: tuple[Colour, ...] = (
    (0.80, 0.74, 0.60), (0.72, 0.50, 0.38), (0.62, 0.30, 0.22),
    (0.85, 0.83, 0.78), (0.60, 0.62, 0.66), (0.75, 0.62, 0.42),
)  # fmt: skip
_CLOTHES: tuple[Colour, ...] = (
    (0.75, 0.12, 0.14), (0.14, 0.20, 0.50), (0.88, 0.86, 0.82),
    (0.12, 0.12, 0.13), (0.85, 0.65, 0.15), (0.20, 0.42, 0.28),
)  # fmt: skip


class Scenes(SegmentationDataset):
    """Numbered scenes of any size; a scene depends on nothing but `seed`, the split, its number and its size.

    The layout of a scene is the same at every size.
    """

    def __init__(
        self, split: str = "train", *, size: tuple[int, int] | None = None, length: int | None = None, seed: int = 0
    ) -> None:
        """
        Args:
            split: "train" (2000 scenes), "val" or "test" (250 each); no scene is in two of them.
            size: (height, width) in pixels; None for SCENE_SIZE.
            length: how many scenes; None for the split's own number. There is no end to them.
            seed: 0 is the dataset; any other number makes another one.

        Raises:
            ConfigError: an unknown split, a size outside 32..8192, a length below 1, or a negative seed.
        """
        choose("split", split, _SPLITS, where="scenes")
        size = SCENE_SIZE if size is None else size
        if not all(32 <= side <= _LARGEST for side in size):
            raise ConfigError(f"scenes of {size[0]}x{size[1]} pixels: each side must be from 32 to {_LARGEST}")
        length = _SPLITS[split] if length is None else length
        for name, value, least in (("length", length, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"scenes: {name} {value} must be at least {least}")
        self.class_set = class_set("scenes")
        self.split = split
        self.size = size
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        index %= self.length
        random = np.random.default_rng([self.seed, list(_SPLITS).index(self.split), index])
        image, labels = _Scene(random).render(*self.size)
        return Sample(image, labels, f"{self.split}_{index:06d}")


def write_scenes(samples: Iterable[Sample], folder: str | os.PathLike[str]) -> list[Path]:
    """Write images/NAME.png, labels/NAME.png (mode P, with palette) and classes.txt (one name a line, by id).

    Files of the same name are replaced. Returns the images' paths.

    Raises:
        DatasetError: the folder cannot be written.
    """
    names, images, labels = class_set("scenes"), Path(folder, "images"), Path(folder, "labels")
    palette = np.array(names.palette, np.uint8).tobytes()
    written = []
    try:
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(exist_ok=True)
        Path(folder, "classes.txt").write_text("\n".join(names.classes) + "\n", encoding="utf-8")
        for sample in samples:
            interruption.check()
            label_map = Image.fromarray(sample.labels)
            label_map.putpalette(palette)
            label_map.save(labels / f"{sample.name}.png")
            Image.fromarray(sample.image).save(images / f"{sample.name}.png")
            written.append(images / f"{sample.name}.png")
    except OSError as error:
        what = error.strerror or error
        raise DatasetError(
            f"{folder}: cannot be written ({what}) after {len(written)} scenes; choose another folder"
        ) from None
    return written


@dataclass
class _Block:
    """A wall or a house: a box with a front at Z = z[0] and its long side towards the road at X = x."""

    label: int
    x: float
    z: tuple[float, float]
    height: float
    depth: float  # metres away from the road
    colour: Colour
    storey: float = 3.0
    window: tuple[float, float] = (2.5, 0.45)  # pitch in metres, share of it that is glass
    glass: float = 0.5  # how much of the sky the windows mirror
    bricks: bool = False


@dataclass
class _Side:
    """What lies beyond the road on one side, `sign` -1 or 1."""

    sign: int
    pavement: float  # metres wide, may be 0
    beyond: int  # GRASS, WATER or PAVEMENT
    blocks: list[_Block] = field(default_factory=list)
    fence: tuple[float, float] | None = None  # from Z to Z


class _Scene:
    """All that is drawn at random comes before any pixel, so that the layout does not depend on the size."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        uniform = random.uniform
        self.camera = Camera(
            horizon=uniform(0.25, 0.68),
            focal=uniform(0.75, 1.5),
            x=0.0,
            eye=float(np.exp(uniform(math.log(1.3), math.log(6.0)))),
            yaw=random.normal(0, 0.22),
        )
        zenith, horizon = _SKIES[random.integers(len(_SKIES))]
        self.zenith, self.horizon = floats(zenith), floats(horizon)
        self.tint = floats(1 + random.normal(0, 0.05, 3))
        self.clouds = uniform(-1.2, 1.6)
        self.visibility = float(np.exp(uniform(math.log(60), math.log(900))))
        self.sun = int(random.choice([-1, 1]))
        self.shade = uniform(0.45, 0.85)
        self.offset = random.integers(0, 256, 8).astype(np.float32)
        self.calm = random.random() < 0.5
        self.deep = floats([0.10, 0.22, 0.28]) * np.float32(uniform(0.6, 1.4))
        self.murk = uniform(0, 0.12) if self.calm else uniform(0.1, 0.5)
        self.green = floats([uniform(0.22, 0.45), uniform(0.38, 0.52), uniform(0.12, 0.25)])
        self.concrete = floats(uniform(0.32, 0.68) * (1 + random.normal(0, 0.03, 3)))
        self.markings = random.random() < 0.6
        self.tiles = uniform(0.4, 1.2) if random.random() < 0.6 else 0.0
        self.paving = self.concrete if random.random() < 0.3 else self.concrete * np.float32(uniform(0.75, 1.35))
        self.road = uniform(2.2, 5.0) if random.random() < 0.8 else 0.0
        self.end = uniform(15, 120) if random.random() < 0.3 else 4000.0  # beyond it lies a lake
        self.sides = [self._side(-1), self._side(1)]
        self.camera = replace(self.camera, x=self._standpoint())
        self.ahead = self._ahead()
        self.mountains = [
            (uniform(0.02, 0.22), uniform(0.5, 3.0), uniform(0.3, 0.8)) for _ in range(random.choice([0, 0, 1, 2, 2]))
        ]
        self.plants = self._plants()
        self.people = self._people()
        self.posts = self._posts()

    # Layout.

    def _same(self, chance: float) -> Colour:
        """The road's own concrete with this chance, else a plaster."""
        if self.random.random() < chance:
            colour = self.concrete
        else:
            colour = floats(_PLASTER[self.random.integers(len(_PLASTER))]) * np.float32(self.random.uniform(0.7, 1.1))
        return float(colour[0]), float(colour[1]), float(colour[2])

    def _side(self, sign: int) -> _Side:
        random = self.random
        kind = random.choice(["wall", "houses", "country", "water"], p=[0.26, 0.26, 0.24, 0.24])
        pavement = random.uniform(1.0, 4.5) if self.road and random.random() < 0.8 else 0.0
        side = _Side(sign, pavement, WATER if kind == "water" else GRASS)
        edge = self.road + pavement + 0.3
        if kind == "wall":
            start = random.uniform(-2, 12)
            end = min(start + random.uniform(12, 80), self.end)
            block = _Block(WALL, sign * edge, (start, end), random.uniform(1.6, 7.0), 0.5, self._same(0.7))
            block.bricks = random.random() < 0.3
            side.blocks.append(block)
        elif kind == "houses":
            side.beyond = PAVEMENT if random.random() < 0.6 else GRASS
            start = random.uniform(-5, 10)
            for _ in range(random.integers(2, 7)):
                end = start + random.uniform(6, 18)
                if end > self.end:
                    break
                side.blocks.append(self._house(sign * (edge + random.uniform(0, 2.5)), (start, end)))
                start = end + (0.0 if random.random() < 0.5 else random.uniform(1, 12))
        if kind in ("country", "water") and random.random() < (0.65 if kind == "water" else 0.4):
            start = random.uniform(0.5, 12)
            side.fence = start, min(start + random.uniform(10, 60), self.end)
        return side

    def _house(self, x: float, z: tuple[float, float]) -> _Block:
        uniform = self.random.uniform
        return _Block(
            BUILDING,
            x,
            z,
            uniform(4, 22),
            uniform(8, 14),
            self._same(0.25),
            storey=uniform(2.6, 3.8),
            window=(uniform(1.6, 4.0), uniform(0.3, 0.7)),
            glass=uniform(0.1, 0.9),
        )

    def _standpoint(self) -> float:
        """Where the camera stands: on the road or a pavement, never inside a wall."""
        left, right = (self.road + side.pavement for side in self.sides)
        return float(self.random.uniform(-left, right)) * 0.8

    def _ahead(self) -> list[_Block]:
        """What closes the view: nothing, a wall across the road, or houses."""
        random, z = self.random, self.random.uniform(12, 90)
        kind = random.choice(["nothing", "wall", "houses"], p=[0.55, 0.2, 0.25])
        if kind == "nothing" or z > self.end - 5:
            return []
        left = -random.uniform(6, 40)
        if kind == "wall":
            width = random.uniform(20, 60)
            return [_Block(WALL, left, (z, z + 0.5), random.uniform(2, 8), width, self._same(0.7))]
        blocks = []
        for _ in range(random.integers(1, 6)):
            block = self._house(left, (z, z + random.uniform(6, 12)))
            blocks.append(block)
            left += block.depth + (0.0 if random.random() < 0.6 else random.uniform(1, 10))
        return blocks

    def _place(self, near: float, far: float, grounds: tuple[int, ...]) -> tuple[float, float] | None:
        """A spot (X, Z) on one of `grounds`, before the lake and not inside a block."""
        for _ in range(6):
            z = float(np.exp(self.random.uniform(math.log(near), math.log(far))))
            x = self.camera.x + z * float(np.tan(self.camera.yaw + self.random.uniform(-0.6, 0.6)))
            side = self.sides[x > 0]
            edge = self.road + side.pavement
            ground = ROAD if abs(x) < self.road else PAVEMENT if abs(x) < edge else side.beyond
            inside = any(block.z[0] <= z <= block.z[1] and abs(x) >= abs(block.x) - 0.3 for block in side.blocks)
            if ground in grounds and z < self.end - 1 and not inside:
                return x, z
        return None

    def _plants(self) -> list[tuple[float, float, float, bool]]:
        """X, Z, height and whether it is a conifer."""
        random = self.random
        count = random.choice([0, 2, 5, 10, 25])
        near = random.choice([4.0, 10.0, 30.0])
        conifers = random.random() < 0.3
        places = [
            self._place(near, 150, (GRASS,) if random.random() < 0.8 else (GRASS, PAVEMENT)) for _ in range(count)
        ]
        return [(*place, random.uniform(2.0, 9.0), conifers) for place in places if place]

    def _people(self) -> list[tuple[float, float, float]]:
        """X, Z and height; some stand in groups that touch."""
        random = self.random
        people = []
        for _ in range(random.choice([0, 1, 2, 4, 7])):
            place = self._place(2.5, 60, (ROAD, PAVEMENT, GRASS))
            if place is None:
                continue
            for _ in range(random.choice([1, 1, 2, 4])):
                x, z = place[0] + random.normal(0, 0.5), place[1] + random.normal(0, 0.4)
                people.append(
                    (x, max(z, 2.0), random.uniform(0.95, 1.3) if random.random() < 0.2 else random.normal(1.72, 0.08))
                )
        return people

    def _posts(self) -> list[tuple[float, float, float]]:
        """Sign of the side, Z and height of lamp posts at equal distances."""
        random = self.random
        if random.random() < 0.35:
            return []
        sign = float(random.choice([-1, 1]))
        start, step, height = random.uniform(2, 12), random.uniform(7, 25), random.uniform(3.5, 8)
        return [(sign, z, height) for z in np.arange(start, min(start + 6 * step, self.end - 1), step)]

    # Painting.

    def render(self, height: int, width: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """(height, width, 3) uint8 and (height, width) uint8; painted at twice the size, then halved."""
        canvas = Canvas(2 * height, 2 * width, self.camera)
        canvas.colour[:] = self._sky(canvas.up, canvas.right)
        canvas.labels[:] = SKY
        self._paint_mountains(canvas)
        self._paint_ground(canvas)
        for block in [*self.sides[0].blocks, *self.sides[1].blocks, *self.ahead]:
            self._paint_block(canvas, block)
        for side in self.sides:
            if side.fence is not None:
                self._paint_fence(canvas, side.sign * (self.road + side.pavement + 0.15), side.fence)
        self._paint_plants(canvas)
        self._paint_posts(canvas)
        self._paint_people(canvas)
        return self._photograph(canvas), np.ascontiguousarray(canvas.labels[::2, ::2])

    def _sky(self, up: Array, right: Array) -> Array:
        """Colour (..., 3) of the sky in a direction, also of the one that water mirrors."""
        elevation = np.abs(up)
        mix = (1 - np.exp(-2.5 * elevation))[..., None]
        colour = self.horizon + (self.zenith - self.horizon) * mix
        distance = 1 / (elevation + 0.12)
        cloud = noise(self.offset[0] + 9 * distance, self.offset[1] + 14 * right * distance, smooth=True)
        cover = np.clip((cloud + self.clouds) / 1.6, 0, 1)[..., None] * np.clip(6 * elevation + 0.1, 0, 1)[..., None]
        bright = np.clip(self.horizon * 1.12, 0, 1)
        return np.asarray((colour + cover * 0.6 * (bright - colour)) * self.tint, np.float32)

    def _paint_mountains(self, canvas: Canvas) -> None:
        for number, (height, roughness, haze) in enumerate(self.mountains):
            place = canvas.right[0] * np.float32(4 * roughness)
            ridge = np.zeros_like(place)
            for octave in range(4):
                line = np.full_like(place, 31.0 * number + 7 * octave + self.offset[2])
                ridge += noise(line, place * 2**octave, smooth=True) / 2.2**octave
            profile = np.float32(height) * (1 + 0.4 * ridge)
            mask = (canvas.up < profile[None]) & (canvas.depth == np.inf)
            v = canvas.up[mask]
            texture = 1 + 0.12 * noise(self.offset[3] + 200 * v, self.offset[4] + 200 * canvas.right[mask])
            stone = floats([0.36, 0.34, 0.36]) if number % 2 else self.green * np.float32(0.8)
            colour = stone * texture[:, None] * self.tint
            colour += (self.horizon - colour) * np.float32(haze * 0.85)
            depth = np.full(v.shape, 3000.0 - 500 * number, np.float32)
            canvas.paint(Surface(mask, depth, v, v), colour, MOUNTAIN)

    def _paint_ground(self, canvas: Canvas) -> None:
        surface = canvas.ground()
        x, z, depth = surface.first, surface.second, surface.depth
        edge = np.where(x < 0, self.road + self.sides[0].pavement, self.road + self.sides[1].pavement)
        beyond = np.where(x < 0, self.sides[0].beyond, self.sides[1].beyond)
        labels = np.where(np.abs(x) < self.road, ROAD, np.where(np.abs(x) < edge, PAVEMENT, beyond)).astype(np.uint8)
        labels[z > self.end] = WATER

        fade = 1 / (1 + depth / 25)
        grain = noise(self.offset[5] + 14 * z, self.offset[6] + 14 * x, smooth=True) * fade
        patches = noise(self.offset[6] + 0.7 * z, self.offset[5] + 0.7 * x, smooth=True)
        colour = np.zeros((x.size, 3), np.float32)
        grass = labels == GRASS
        colour[grass] = self.green * (1 + 0.22 * grain + 0.12 * patches)[grass, None]
        road = labels == ROAD
        colour[road] = self.concrete * (1 + 0.10 * grain + 0.05 * patches)[road, None]
        if self.markings:
            line = (np.abs(x) < 0.09) & (z % 6 < 3) | (np.abs(np.abs(x) - self.road + 0.25) < 0.07)
            colour[road & line] = 0.85
        pavement = labels == PAVEMENT
        colour[pavement] = self.paving * (1 + 0.08 * grain + 0.05 * patches)[pavement, None]
        if self.tiles:
            joints = ((x % self.tiles < 0.05) | (z % self.tiles < 0.05)) & pavement
            colour[joints] *= (1 - 0.35 * fade)[joints, None]

        light = np.ones_like(x)
        for side in self.sides:
            for block in side.blocks:
                if side.sign == self.sun:
                    reach = abs(block.x) - 0.9 * block.height
                    light[(x * side.sign > reach) & (z > block.z[0]) & (z < block.z[1])] = self.shade
        for px, pz, size in [
            *((x_, z_, 0.3 * h) for x_, z_, h, _ in self.plants),
            *((x_, z_, 0.35) for x_, z_, _ in self.people),
        ]:
            spot = ((x - px + self.sun * size) / (1.8 * size)) ** 2 + ((z - pz) / size) ** 2 < 1
            light[spot] = self.shade
        colour *= (light[:, None] * self.tint).astype(np.float32)

        water = labels == WATER
        up, right = canvas.up[surface.mask][water], canvas.right[surface.mask][water]
        ripple = noise(self.offset[7] + 500 * up, self.offset[0] + 60 * right)
        strength = 0.01 if self.calm else 0.07
        mirrored = self._sky(-up + np.float32(strength) * ripple, right)
        steep = np.clip(-up * 1.5, 0, 1)[:, None] * np.float32(self.murk) + np.float32(self.murk) * 0.5
        mirrored = mirrored + (self.deep - mirrored) * steep
        colour[water] = mirrored * (1 + np.float32(strength) * ripple)[:, None]
        canvas.paint(surface, colour, labels)

    def _paint_block(self, canvas: Canvas, block: _Block) -> None:
        sign = 1 if block.x > 0 else -1
        ends = (
            sorted((block.x, block.x + sign * block.depth))
            if block not in self.ahead
            else (block.x, block.x + block.depth)
        )
        faces = [
            (canvas.front(block.z[0], (ends[0], ends[1]), (0, block.height)), 0.9),
            (canvas.side(block.x, block.z, (0, block.height)), self.shade if sign == self.sun else 1.05),
        ]
        if block in self.ahead:
            faces.append((canvas.side(ends[1], block.z, (0, block.height)), self.shade))
        for surface, light in faces:
            along, y = surface.first, surface.second
            grain = noise(self.offset[3] + 14 * y, self.offset[4] + 14 * along) / (1 + surface.depth / 25)
            stains = noise(self.offset[4] + 1.5 * y, self.offset[3] + 0.7 * along, smooth=True)
            colour = floats(block.colour) * (light * (1 + 0.10 * grain + 0.05 * stains))[:, None]
            if block.bricks:
                row = np.floor(y / 0.3)
                joints = (y % 0.3 < 0.04) | ((along + 0.3 * (row % 2)) % 0.6 < 0.04)
                colour[joints] *= 0.75
            if block.label == BUILDING:
                pitch, share = block.window
                up, across = y % block.storey / block.storey, along % pitch / pitch
                window = (across < share) & (up > 0.3) & (up < 0.85) & (y < block.height - 0.4)
                pane = floats([0.12, 0.14, 0.17]) * (1 - block.glass) + self.horizon * block.glass * 0.9
                colour[window] = pane
                colour[y > block.height - 0.3] *= 0.7
            canvas.paint(surface, (colour * self.tint).astype(np.float32), block.label)

    def _paint_fence(self, canvas: Canvas, x: float, z: tuple[float, float]) -> None:
        height, pitch, bar = 0.9 + 0.05 * (self.offset[1] % 8), 0.15 + 0.02 * (self.offset[2] % 12), 0.045
        surface = canvas.side(x, z, (0.0, height))
        along, y = surface.first, surface.second
        # A bar is never thinner than a pixel; far away, or along the line of sight, the bars close up.
        tall = surface.depth / canvas.focal * 2
        wide = tall * surface.depth / max(abs(x - self.camera.x), 0.2)
        bars = along % pitch < np.maximum(bar, wide)
        rails = (y > height - np.maximum(0.06, tall)) | (np.abs(y - 0.12) < np.maximum(0.03, tall / 2))
        posts = along % (10 * pitch) < np.maximum(0.09, wide)
        surface = canvas.subset(surface, bars | rails | posts)
        dark = self.offset[3] % 3 > 0
        canvas.paint(surface, floats([0.10, 0.12, 0.12] if dark else [0.78, 0.78, 0.76]) * self.tint, FENCE)

    def _paint_plants(self, canvas: Canvas) -> None:
        for number, (x, z, height, conifer) in enumerate(self.plants):
            random = np.random.default_rng([int(self.offset[0]), number])
            leaves = self.green * np.float32(random.uniform(0.55, 1.1))
            green = float(leaves[0]), float(leaves[1]), float(leaves[2])
            bark = (0.26, 0.20, 0.15)
            trunk = Part("line", [(0, 0), (random.normal(0, 0.1), 0.55 * height)], bark, 0.05 * height)
            if conifer:
                crown = [
                    Part(
                        "polygon", [(-w * height, low * height), (w * height, low * height), (0, high * height)], green
                    )
                    for w, low, high in ((0.24, 0.12, 0.6), (0.19, 0.35, 0.8), (0.13, 0.58, 1.0))
                ]
            else:
                crown = []
                for _ in range(random.integers(4, 8)):
                    cx, cy, r = random.normal(0, 0.14), random.uniform(0.5, 0.82), random.uniform(0.12, 0.24)
                    corners = [((cx - r) * height, (cy - r) * height), ((cx + r) * height, (cy + r) * height)]
                    crown.append(Part("ellipse", corners, green))

            def foliage(row: Array, column: Array, height: float = height, number: int = number) -> tuple[Array, Mask]:
                leaf = noise(floats(row / 5 + 17 * number), floats(column / 5))
                light = 1 + 0.25 * leaf - 0.003 / height * self.sun * column + 0.3 * (row / 100 / height - 0.6)
                return light.astype(np.float32) * self.tint.mean(), leaf > -1.4

            canvas.sprite(x, z, [trunk], TREE)
            # Nearer by a hair than the trunk, or the crown would not cover it.
            canvas.sprite(x, z - 0.02, crown, TREE, foliage)

    def _paint_posts(self, canvas: Canvas) -> None:
        tops = []
        metal = 0.08 + 0.1 * float(self.offset[5] % 6)
        for sign, z, height in self.posts:
            x = sign * (self.road + 0.35)
            arm = -sign * 0.2 * height * (self.offset[6] % 2)
            parts = [
                Part("line", [(0, 0), (0, height)], (metal, metal, metal), 0.14),
                Part("line", [(0, height), (arm, height + 0.02)], (metal, metal, metal), 0.09),
            ]
            if self.offset[7] % 3 == 0:
                parts.append(Part("ellipse", [(-0.35, 2.0), (0.35, 2.7)], (0.75, 0.1, 0.1)))
            canvas.sprite(x, z, parts, POLE)
            tops.append((x, height, z))
        if self.offset[4] % 2 == 0:
            for (x0, y0, z0), (x1, y1, z1) in pairwise(tops):
                steps = np.linspace(0, 1, 9)
                sag = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0) - 2.0 * t * (1 - t), z0 + t * (z1 - z0)) for t in steps]
                canvas.polyline(sag, 0.03, (0.08, 0.08, 0.08), POLE)

    def _paint_people(self, canvas: Canvas) -> None:
        for number, (x, z, height) in enumerate(self.people):
            random = np.random.default_rng([int(self.offset[1]), number])
            coat, trousers = _CLOTHES[random.integers(len(_CLOTHES))], (0.16, 0.17, 0.22)
            skin = float(random.uniform(0.35, 0.9))
            stride, h = random.uniform(0.03, 0.16), height
            parts = [
                Part("line", [(-stride * h, 0), (0, 0.5 * h)], trousers, 0.09 * h),
                Part("line", [(stride * h, 0), (0, 0.5 * h)], trousers, 0.09 * h),
                Part("line", [(-0.1 * h, 0.78 * h), (-0.16 * h, 0.48 * h)], coat, 0.06 * h),
                Part("line", [(0.1 * h, 0.78 * h), (0.15 * h, 0.5 * h)], coat, 0.06 * h),
                Part(
                    "polygon",
                    [(-0.1 * h, 0.46 * h), (0.1 * h, 0.46 * h), (0.12 * h, 0.82 * h), (-0.12 * h, 0.82 * h)],
                    coat,
                ),
                Part("ellipse", [(-0.06 * h, 0.85 * h), (0.06 * h, 1.0 * h)], (skin, skin * 0.78, skin * 0.66)),
            ]
            for step, part in enumerate(parts):
                canvas.sprite(x, z - 0.01 * step, [part], PERSON)

    def _photograph(self, canvas: Canvas) -> npt.NDArray[np.uint8]:
        """Haze, lens and sensor."""
        random = self.random
        clear = np.exp(-canvas.depth / np.float32(self.visibility))[..., None]
        near = np.isfinite(canvas.depth)[..., None] & (canvas.labels != MOUNTAIN)[..., None]
        colour = np.where(
            near, self.horizon * self.tint + (canvas.colour - self.horizon * self.tint) * clear, canvas.colour
        )
        height, width = colour.shape[0] // 2, colour.shape[1] // 2
        colour = colour.reshape(height, 2, width, 2, 3).mean((1, 3))
        gain, gamma, blur = random.uniform(0.85, 1.25), random.uniform(0.75, 1.15), max(0.0, random.normal(0.1, 0.5))
        grain, vignette = abs(random.normal(0, 0.018)), random.uniform(0, 0.25)
        v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        falloff = floats(gain * (1 - vignette * (u**2 + v**2) / 2))[..., None]
        colour = np.clip(colour * falloff, 0, 1) ** np.float32(gamma)
        if blur > 0.2:
            soft = Image.fromarray((colour * 255).astype(np.uint8)).filter(
                ImageFilter.GaussianBlur(blur * height / 128)
            )
            colour = np.asarray(soft) / 255
        colour = colour + np.float32(grain) * random.standard_normal(colour.shape, np.float32)
        return np.asarray(np.clip(colour * 255 + 0.5, 0, 255), np.uint8)
