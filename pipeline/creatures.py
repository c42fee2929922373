"""Generated images with true part labels: creatures.

Twelve species of birds that share six parts.  Species differ in proportions, patterns and colours;
images differ in pose, turn, flip, scale, place, colour cast, light and clutter.  The clutter is
made from the shapes, patterns and palette of the parts, so neither colour nor place alone tells a
part: `tests/pipeline/test_creatures.py` holds measured bars for that.

Choice: what the species look like hangs on a *species seed* of its own, fixed by default.  So two
seeds show the same species in other images, a network trained on one set can be judged on another,
and a class name keeps its meaning; another species seed makes other animals under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from .creature_anatomy import (
    HEAD,
    PALETTE,
    PART_NAMES,
    SPECIES_NAMES,
    SPECIES_SEED,
    Traits,
    anatomy,
    draw_pose,
    fan,
    limb,
    species_traits,
)
from .creature_drawing import (
    PATTERNS,
    Canvas,
    Coat,
    Colour,
    Cone,
    Draws,
    Piece,
    Placement,
    Plane,
    bounds,
    cloud,
    direction,
)

__all__ = [
    "CLASS_NAMES",
    "GENERATOR_VERSION",
    "PART_NAMES",
    "SPECIES",
    "SPECIES_NAMES",
    "SPECIES_SEED",
    "Creature",
    "Split",
    "draw_creature",
]

Split = Literal["train", "val"]

# Part of every image's seed: raise it with any change to the pictures, and the golden hash with it.
GENERATOR_VERSION = 1
SPECIES: int = len(SPECIES_NAMES)
CLASS_NAMES: tuple[str, ...] = tuple(f"{i:02d}-{name}" for i, name in enumerate(SPECIES_NAMES))

_SPLITS = {"train": 0, "val": 1}


@dataclass(frozen=True)
class Creature:
    """One generated image.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        labels: uint8 (H, W), an index into `PART_NAMES`, 0 for background.
        species: 0 .. `SPECIES` - 1, an index into `CLASS_NAMES`.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    species: int


def _image_palette(d: Draws) -> list[Colour]:
    """The palette under this image's cast: each channel scaled, each colour moved a little."""
    gains = [d.between(0.82, 1.12) for _ in range(3)]

    def move(value: float, gain: float) -> float:
        return min(max(value * gain + d.between(-0.07, 0.07), 0.02), 0.98)

    return [(move(r, gains[0]), move(g, gains[1]), move(b, gains[2])) for r, g, b in PALETTE]


def _scaled(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _draw_pieces(d: Draws, t: Traits, palette: list[Colour]) -> list[Piece]:
    """The animal of one image, from back to front, in its own plane."""
    pose = draw_pose(d)
    shade, stretch = d.between(0.2, 0.45), d.between(0.8, 1.25)
    tilt = [d.between(-15, 15) for _ in PART_NAMES]
    phases = [(d.between(0, 1), d.between(0, 1)) for _ in PART_NAMES]
    pieces = []
    for part, cones, light in anatomy(t, pose):
        coat = t.coats[part]
        surface = Coat(
            coat.kind,
            _scaled(palette[coat.ground], light),
            _scaled(palette[coat.mark], light),
            coat.period * stretch,
            phases[part],
            coat.angle + tilt[part],
            shade,
        )
        pieces.append(Piece(part, cones, surface))
    skull = next(p.cones[0] for p in pieces if p.label == HEAD)
    cosine, sine = direction(pose.gaze + 35)
    x, y = skull.x0 + 0.45 * t.head * cosine, skull.y0 + 0.45 * t.head * sine
    for radius, colour in ((0.034, (0.96, 0.95, 0.9)), (0.021, (0.06, 0.05, 0.07))):
        dot = Cone(x, y, x, y, radius, radius)
        pieces.append(Piece(HEAD, (dot,), Coat("plain", colour, colour, 1.0, (0, 0), shade=0.0)))
    return pieces


def _draw_placement(d: Draws, pieces: list[Piece], size: int) -> Placement:
    """Turn, flip, scale and a place at which nearly all of the animal is in the frame."""
    # One in five lies, dives or looks up: else place alone would tell head and legs too well.
    degrees = d.between(-110, 110) if d.chance(0.2) else d.between(-35, 35)
    flip, scale = d.chance(0.5), d.between(0.7, 1.02)
    turned = Placement(0.0, 0.0, 1.0, degrees, flip)
    left, top, right, bottom = bounds([turned.place(c) for p in pieces for c in p.cones])
    slack = 0.04
    unit = min(scale, (1 + 2 * slack) / (right - left), (1 + 2 * slack) / (bottom - top))

    def place(low: float, high: float) -> float:
        return d.between(-slack - low * unit, 1 + slack - high * unit) * size

    return Placement(place(left, right), place(top, bottom), unit * size, degrees, flip)


def _clutter(d: Draws, palette: list[Colour]) -> Piece:
    """One shape that is no part, in a part's kind of coat: a fan, bent twig, thorn or pebble."""
    form = d.below(4)
    if form == 0:
        tip = d.between(0.03, 0.07)
        cones = fan(0, 0, 0, d.between(8, 26), d.between(0.2, 0.4), (0.04, tip))
    elif form == 1:
        first = limb(0, 0, 0, d.between(0.12, 0.3), 0.05, 0.04)
        cones = (first, limb(first.x1, 0, d.between(-80, 80), d.between(0.1, 0.25), 0.04, 0.02))
    elif form == 2:
        cones = (limb(0, 0, 0, d.between(0.15, 0.4), d.between(0.05, 0.1), 0.01),)
    else:
        cones = (limb(0, 0, 0, d.between(0.02, 0.2), d.between(0.07, 0.14), d.between(0.06, 0.12)),)
    first_colour, second_colour = palette[d.below(len(palette))], palette[d.below(len(palette))]
    coat = Coat(
        PATTERNS[d.below(len(PATTERNS))],
        first_colour,
        second_colour,
        d.between(0.05, 0.11),
        (d.between(0, 1), d.between(0, 1)),
        d.between(-45, 45),
        d.between(0.25, 0.5),
    )
    return Piece(0, cones, coat)


def _draw_scene(d: Draws, palette: list[Colour], size: int) -> Plane:
    """What is behind everything: three colours in soft patches, float32 (H, W, 3)."""
    first, second, third = (np.array(palette[d.below(len(palette))], np.float32) for _ in range(3))
    broad, fine = (
        cloud(d, size, 2 + d.below(2))[..., None],
        cloud(d, size, 5 + d.below(6))[..., None],
    )
    patches = np.minimum(np.maximum(fine * np.float32(4) - np.float32(2), 0), 1)
    picture = first + broad * (second - first)
    return np.asarray(picture + patches * np.float32(d.between(0.3, 0.9)) * (third - picture))


def _scatter(d: Draws, canvas: Canvas, palette: list[Colour], count: int, size: int) -> None:
    for _ in range(count):
        piece = _clutter(d, palette)
        place = Placement(
            d.between(-0.1, 1.1) * size,
            d.between(-0.1, 1.1) * size,
            d.between(0.5, 1.0) * size,
            d.between(0, 360),
            d.chance(0.5),
        )
        canvas.paint(piece, place)


def _expose(d: Draws, picture: Plane) -> NDArray[np.uint8]:
    """Light from one side, grain, and the step to uint8."""
    size = len(picture)
    level, across, down = d.between(0.85, 1.2), d.between(-0.5, 0.5), d.between(-0.5, 0.5)
    strength = d.between(0.02, 0.08)
    ramp = np.arange(size, dtype=np.float32) * np.float32(1 / size) + np.float32(0.5 / size - 0.5)
    light = np.float32(level) + ramp[:, None] * np.float32(down) + ramp * np.float32(across)
    grain = (d.plane(size, size) - np.float32(0.5)) * np.float32(strength)
    lit = picture * light[..., None] + grain[..., None]
    return (np.minimum(np.maximum(lit, 0), 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def draw_creature(
    seed: int,
    index: int,
    *,
    size: int = 96,
    species: int | None = None,
    split: Split = "train",
    species_seed: int = SPECIES_SEED,
) -> Creature:
    """Draws one image, a pure function of the arguments, the same on every platform.

    Another ``size`` shows the same scene, sampled more or less finely (grain apart); another
    ``species`` shows another animal in the same pose before the same scene.

    Args:
        seed: Seed of the set, not negative.
        index: Number of the image in its split, not negative.
        size: Height and width in pixels, 32 or more.
        species: 0 .. `SPECIES` - 1; the default goes round by index, so sets are balanced.
        split: "train" or "val"; the splits share no image.
        species_seed: What the species look like, not negative; see the module's text.

    Returns:
        The image with its part labels and species.

    Raises:
        SettingError: An argument is out of its range.
    """
    species = index % SPECIES if species is None else species
    _check(
        seed=seed, index=index, size=size, species=species, split=split, species_seed=species_seed
    )
    traits = species_traits(species, species_seed)
    d = Draws(GENERATOR_VERSION, seed, _SPLITS[split], index)
    palette = _image_palette(d)
    pieces = _draw_pieces(d, traits, palette)
    placement = _draw_placement(d, pieces, size)
    canvas = Canvas(_draw_scene(d, palette, size))
    _scatter(d, canvas, palette, 6 + d.below(8), size)
    for piece in pieces:
        canvas.paint(piece, placement)
    return Creature(_expose(d, canvas.picture), canvas.labels, species)


def _check(
    *, seed: int, index: int, size: int, species: int, split: str, species_seed: int
) -> None:
    for name, value, low in (
        ("seed", seed, 0),
        ("index", index, 0),
        ("size", size, 32),
        ("species_seed", species_seed, 0),
    ):
        if value < low:
            raise SettingError(f"creatures: {name} must be {low} or more, got {value}.")
    if not 0 <= species < SPECIES:
        raise SettingError(f"creatures: species must be in 0 to {SPECIES - 1}, got {species}.")
    if split not in _SPLITS:
        raise SettingError(f"creatures: split must be 'train' or 'val', got {split!r}.")
