"""Drawing for the generated images: one primitive, painted by its signed distance.

Every shape is a union of *cones*, capsules whose radius changes from one end to the other: bodies,
beaks, feathers, legs and the clutter alike.  A cone's distance gives a smooth edge in the picture
and an exact one in the label map from the same numbers.

The pixels must be the same on every platform, so arrays see only operations that IEEE 754 rounds
exactly (+, -, x, /, square root, floor, comparison), never a library's sine or power, and sines of
single angles are rounded to a coarse grid, on which libraries agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
Colour = tuple[float, float, float]

_GRID = 2.0**20


class Draws:
    """Random choices for one image, all made from uniform numbers of one generator.

    Only ``Generator.random`` is used: its bits are fixed by numpy's promise about bit generators,
    while the other distributions may change from version to version.

    Args:
        seed: Entropy: the same numbers give the same draws.
    """

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def between(self, low: float, high: float) -> float:
        """A number, uniform in [low, high)."""
        return low + (high - low) * float(self._generator.random())

    def below(self, count: int) -> int:
        """An integer, uniform in 0 .. count - 1."""
        return int(float(self._generator.random()) * count)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self._generator.random()) < probability

    def plane(self, height: int, width: int) -> Plane:
        """Uniform numbers in [0, 1), float32 of shape (height, width)."""
        return self._generator.random((height, width), dtype=np.float32)


class Cone(NamedTuple):
    """A capsule from (x0, y0) with radius r0 to (x1, y1) with radius r1."""

    x0: float
    y0: float
    x1: float
    y1: float
    r0: float
    r1: float


@dataclass(frozen=True)
class Coat:
    """How the surface of a piece looks.

    Attributes:
        kind: Name of the pattern, one of `PATTERNS`.
        ground: Main colour, RGB in [0, 1].
        mark: Colour of the pattern's marks, RGB in [0, 1].
        period: Length of one repeat, in the unit of the piece's cones.
        phase: Shift of the pattern, in repeats, along and across the piece.
        angle: Degrees by which the pattern is turned from the piece's axis.
        shade: Darkening at the edge, 0 none to 1 black.
    """

    kind: str
    ground: Colour
    mark: Colour
    period: float
    phase: tuple[float, float]
    angle: float = 0.0
    shade: float = 0.4


@dataclass(frozen=True)
class Piece:
    """A union of cones with one coat and one part id.

    Attributes:
        label: Part id written into the label map.
        cones: The shape; the first cone's axis is that of the pattern.
        coat: The surface.
    """

    label: int
    cones: tuple[Cone, ...]
    coat: Coat


@dataclass(frozen=True)
class Placement:
    """A similarity that takes a piece's plane (y up) to pixels (y down).

    Attributes:
        x: Column of the origin, in pixels.
        y: Row of the origin, in pixels.
        unit: Pixels a unit.
        degrees: Turn, counter-clockwise as seen.
        flip: Whether left and right are exchanged, after the turn.
    """

    x: float = 0.0
    y: float = 0.0
    unit: float = 1.0
    degrees: float = 0.0
    flip: bool = False

    def place(self, cone: Cone) -> Cone:
        """The cone in pixels."""
        cosine, sine = direction(self.degrees)
        side = -self.unit if self.flip else self.unit
        ends = [
            (self.x + side * (cosine * x - sine * y), self.y - self.unit * (sine * x + cosine * y))
            for x, y in ((cone.x0, cone.y0), (cone.x1, cone.y1))
        ]
        return Cone(*ends[0], *ends[1], cone.r0 * self.unit, cone.r1 * self.unit)


def direction(degrees: float) -> tuple[float, float]:
    """Cosine and sine of an angle, rounded to 2**-20 so that every platform has the same."""
    angle = math.radians(degrees)
    return round(math.cos(angle) * _GRID) / _GRID, round(math.sin(angle) * _GRID) / _GRID


def bounds(cones: Sequence[Cone]) -> tuple[float, float, float, float]:
    """The box around cones: lowest x, lowest y, highest x, highest y."""
    return (
        min(min(c.x0 - c.r0, c.x1 - c.r1) for c in cones),
        min(min(c.y0 - c.r0, c.y1 - c.r1) for c in cones),
        max(max(c.x0 + c.r0, c.x1 + c.r1) for c in cones),
        max(max(c.y0 + c.r0, c.y1 + c.r1) for c in cones),
    )


def cone_distance(x: Plane, y: Plane, cone: Cone) -> Plane:
    """Distance of points to a cone, negative inside.

    Exact for equal radii; for others the nearest point of the axis stands for the nearest of the
    edge, which keeps the zero line where it should be.

    Args:
        x: Columns, float32, any shape that broadcasts with ``y``.
        y: Rows, float32.
        cone: The cone, in the same unit.

    Returns:
        float32 of the broadcast shape.
    """
    dx, dy = cone.x1 - cone.x0, cone.y1 - cone.y0
    px, py = x - np.float32(cone.x0), y - np.float32(cone.y0)
    length = dx * dx + dy * dy
    if length == 0.0:
        disc = np.sqrt(px * px + py * py) - np.float32(max(cone.r0, cone.r1))
        return np.asarray(disc, dtype=np.float32)
    along = px * np.float32(dx / length) + py * np.float32(dy / length)
    along = np.minimum(np.maximum(along, np.float32(0)), np.float32(1))
    px = px - along * np.float32(dx)
    py = py - along * np.float32(dy)
    radius = np.float32(cone.r0) + along * np.float32(cone.r1 - cone.r0)
    return np.asarray(np.sqrt(px * px + py * py) - radius, dtype=np.float32)


def _wave(value: Plane) -> Plane:
    """Triangle wave of period 1 from 1 (at whole numbers) to 0 and back."""
    return np.asarray(np.abs((value - np.floor(value)) * np.float32(2) - np.float32(1)))


def _step(value: Plane, softness: float = 0.25) -> Plane:
    """0 below -softness, 1 above softness, a line between."""
    ramp = value * np.float32(0.5 / softness) + np.float32(0.5)
    return np.asarray(np.minimum(np.maximum(ramp, np.float32(0)), np.float32(1)))


def _blotches(u: Plane, v: Plane) -> Plane:
    """Blotches in [0, 1]: two bent waves that hardly ever repeat together, without a table."""
    first = _wave(u * np.float32(0.61) + v * np.float32(0.37) + _wave(v * np.float32(0.83)))
    second = _wave(v * np.float32(0.71) - u * np.float32(0.29) + _wave(u * np.float32(0.47)))
    return np.asarray((first + second) * np.float32(0.5))


def pattern(kind: str, u: Plane, v: Plane) -> Plane:
    """How much of the mark colour shows.

    Args:
        kind: One of `PATTERNS`.
        u: Place along the piece, in repeats, float32.
        v: Place across it, in repeats, float32 of the same shape.

    Returns:
        float32 in [0, 1] of that shape.
    """
    half = np.float32(0.5)
    if kind == "bars":
        return _step(_wave(u) - half)
    if kind == "stripes":
        return _step(_wave(v) - half)
    if kind == "dots":
        a, b = _wave(u + half), _wave(v + half)
        return _step(np.float32(0.45) - a * a - b * b)
    if kind == "scales":
        row = np.asarray(np.floor(u), dtype=np.float32)
        a, b = u - row, _wave(v + row * half)
        return _step(a - half - b * b * np.float32(0.6))
    if kind == "mottled":
        return _step(_blotches(u, v) - half, 0.12)
    return np.zeros_like(u)


PATTERNS = ("plain", "bars", "stripes", "dots", "scales", "mottled")


def _surface(x: Plane, y: Plane, axis: Cone, coat: Coat, unit: float) -> Plane:
    """Colours of a coat at pixels, float32 (h, w, 3)."""
    dx, dy = axis.x1 - axis.x0, axis.y1 - axis.y0
    length = math.sqrt(dx * dx + dy * dy) or 1.0
    cosine, sine = direction(coat.angle)
    dx, dy = (dx * cosine - dy * sine) / length, (dx * sine + dy * cosine) / length
    step = 1.0 / (coat.period * unit)
    px, py = x - np.float32(axis.x0), y - np.float32(axis.y0)
    u = px * np.float32(dx * step) + py * np.float32(dy * step) + np.float32(coat.phase[0])
    v = py * np.float32(dx * step) - px * np.float32(dy * step) + np.float32(coat.phase[1])
    share = pattern(coat.kind, u, v)[..., None]
    ground, mark = np.array(coat.ground, np.float32), np.array(coat.mark, np.float32)
    return ground + share * (mark - ground)


class Canvas:
    """A picture and its label map, painted from back to front.

    Args:
        picture: float32 (H, W, 3), RGB in [0, 1]; painted over in place.
    """

    def __init__(self, picture: Plane) -> None:
        self.picture = picture
        self.labels: NDArray[np.uint8] = np.zeros(picture.shape[:2], dtype=np.uint8)

    def paint(self, piece: Piece, placement: Placement) -> None:
        """Lays a piece over what is there, smooth in the picture and exact in the labels.

        Args:
            piece: What to paint; parts outside the frame are cut.
            placement: Where, from the piece's plane to pixels.
        """
        height, width = self.labels.shape
        cones = [placement.place(cone) for cone in piece.cones]
        left, top, right, bottom = bounds(cones)
        rows = slice(max(0, math.floor(top) - 1), max(0, min(height, math.ceil(bottom) + 1)))
        columns = slice(max(0, math.floor(left) - 1), max(0, min(width, math.ceil(right) + 1)))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5)
        x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5)
        distance = cone_distance(x, y, cones[0])
        for cone in cones[1:]:
            distance = np.minimum(distance, cone_distance(x, y, cone))

        unit, shade = placement.unit, piece.coat.shade
        colour = _surface(x, y, cones[0], piece.coat, unit)
        edge = np.maximum(np.float32(1) + distance * np.float32(1.0 / (0.04 * unit)), np.float32(0))
        colour = colour * (np.float32(1) - np.float32(shade) * np.minimum(edge, 1))[..., None]
        cover = np.minimum(np.maximum(np.float32(0.5) - distance, np.float32(0)), np.float32(1))
        region = self.picture[rows, columns]
        region += cover[..., None] * (colour - region)
        self.labels[rows, columns][distance <= 0] = piece.label


def cloud(draws: Draws, size: int, cells: int) -> Plane:
    """Smooth random field: a lattice of random values, interpolated.

    Args:
        draws: Source of the lattice.
        size: Side of the result in pixels.
        cells: Lattice cells a side; fewer are smoother.

    Returns:
        float32 (size, size) in [0, 1].
    """
    lattice = draws.plane(cells + 1, cells + 1)
    place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
    low = np.minimum(np.floor(place), np.float32(cells - 1))
    part = place - low
    part = part * part * (np.float32(3) - np.float32(2) * part)
    index = low.astype(np.int64)
    rows = lattice[index] + part[:, None] * (lattice[index + 1] - lattice[index])
    return np.asarray(rows[:, index] + part * (rows[:, index + 1] - rows[:, index]))
