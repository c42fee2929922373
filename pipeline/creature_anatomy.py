"""Species, poses and bodies of the generated creatures: what is drawn, before how and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .creature_drawing import PATTERNS, Colour, Cone, Draws, direction

SPECIES_SEED = 20
PART_NAMES: tuple[str, ...] = ("background", "body", "head", "beak", "wing", "tail", "legs")
SPECIES_NAMES: tuple[str, ...] = (
    "amberpiper",
    "bracklark",
    "cindercrake",
    "dunwhistle",
    "elderfinch",
    "fenhopper",
    "gorsewing",
    "hollowjay",
    "inkwren",
    "junipertit",
    "knotplover",
    "lichenquail",
)
SPECIES: int = len(SPECIES_NAMES)
_BODY, HEAD, _BEAK, _WING, _TAIL, _LEGS = range(1, 7)
_HEX = (
    "f2e6c8 e8b04a d9692b b23a2e 7a2f4f c98aa5 6c4a8c 3d4f9c "
    "4f8fc0 8cc7c4 2f7f73 6f9b46 b7bf5a 8a6a42 4a3a33 9b9b96"
)
# One palette for parts, background and clutter: colour alone must not tell them apart.
PALETTE: tuple[Colour, ...] = tuple(
    (int(h[:2], 16) / 255, int(h[2:4], 16) / 255, int(h[4:], 16) / 255) for h in _HEX.split()
)


@dataclass(frozen=True)
class CoatTraits:
    """A part's surface in a species: pattern, two places in the palette, period, angle."""

    kind: str
    ground: int
    mark: int
    period: float
    angle: float


@dataclass(frozen=True)
class Traits:
    """What makes a species: lengths in units of about one animal's span, and a coat a part."""

    body: float
    girth: float
    neck: float
    head: float
    crest: int
    beak: float
    beak_bend: float
    beak_width: float
    wing: float
    wing_tip: float
    tail: float
    tail_tip: float
    tail_spread: float
    legs: float
    coats: tuple[CoatTraits, ...]


@dataclass(frozen=True)
class Pose:
    """How one animal holds itself; degrees, 0 pointing forward, 90 up."""

    neck: float
    gaze: float
    gape: float
    wing: float
    wing_fan: float
    tail: float
    legs: tuple[float, float]
    knee: float


@lru_cache(maxsize=256)
def species_traits(species: int, species_seed: int = SPECIES_SEED) -> Traits:
    """The traits of a species, a pure function of both numbers.

    Args:
        species: 0 .. `SPECIES` - 1.
        species_seed: Not negative; another one makes other animals.

    Returns:
        The traits.
    """
    d = Draws(species_seed, species)
    colours = [d.below(len(PALETTE)) for _ in range(4)]
    coats = []
    for _ in PART_NAMES:
        first = d.below(4)
        pair = colours[first], colours[(first + 1 + d.below(3)) % 4]
        kind = PATTERNS[(d.below(len(PATTERNS) - 1) + 1) if d.chance(0.85) else 0]
        coats.append(CoatTraits(kind, *pair, d.between(0.055, 0.1), d.between(-40, 40)))
    return Traits(
        body=d.between(0.22, 0.34),
        girth=d.between(0.145, 0.185),
        neck=d.between(0.09, 0.2),
        head=d.between(0.115, 0.145),
        crest=d.below(4),
        beak=d.between(0.2, 0.29),
        beak_bend=d.between(-10, 45),
        beak_width=d.between(0.062, 0.085),
        wing=d.between(0.29, 0.38),
        wing_tip=d.between(0.03, 0.065),
        tail=d.between(0.24, 0.36),
        tail_tip=d.between(0.035, 0.075),
        tail_spread=d.between(8, 26),
        legs=d.between(0.25, 0.34),
        coats=tuple(coats),
    )


def draw_pose(d: Draws) -> Pose:
    """A pose: wing raised in two of five, tail and legs anywhere that a bird could hold them."""
    wing = d.between(20, 140) if d.chance(0.4) else d.between(165, 215)
    return Pose(
        neck=d.between(5, 100),
        gaze=d.between(-45, 55),
        gape=d.between(0, 16),
        wing=wing,
        wing_fan=d.between(8, 20),
        tail=d.between(135, 230),
        legs=(d.between(-130, -85), d.between(-95, -50)),
        knee=d.between(5, 50),
    )


def limb(x: float, y: float, degrees: float, length: float, r0: float, r1: float) -> Cone:
    """The cone of a given length from a point, in a direction of so many degrees."""
    cosine, sine = direction(degrees)
    return Cone(x, y, x + length * cosine, y + length * sine, r0, r1)


def _leg(t: Traits, pose: Pose, x: float, degrees: float) -> tuple[Cone, ...]:
    thigh = limb(x, -0.6 * t.girth, degrees - pose.knee / 2, t.legs * 0.55, 0.07, 0.045)
    shank = limb(thigh.x1, thigh.y1, degrees + pose.knee / 2, t.legs * 0.5, 0.042, 0.036)
    toes = limb(shank.x1, shank.y1, degrees + 85, 0.12, 0.042, 0.026)
    return thigh, shank, toes


def fan(
    x: float, y: float, degrees: float, spread: float, length: float, radii: tuple[float, float]
) -> tuple[Cone, ...]:
    """Three feathers; the middle one, longest, first."""
    sides = [limb(x, y, degrees + turn, length * 0.9, *radii) for turn in (-spread, spread)]
    return limb(x, y, degrees, length, *radii), *sides


def _head(t: Traits, pose: Pose, x: float, y: float) -> tuple[Cone, ...]:
    skull = limb(x, y, pose.gaze, 0.3 * t.head, t.head, 0.85 * t.head)
    crest = [
        limb(x, y, pose.gaze + 100 + 32 * i, t.head * 1.65, 0.6 * t.head, 0.012)
        for i in range(t.crest)
    ]
    return skull, *crest


def _beak(t: Traits, pose: Pose, x: float, y: float) -> tuple[Cone, ...]:
    """An upper half in two lengths, so that it can bend, and a lower half."""
    root = limb(x, y, pose.gaze, t.head * 0.75, 0.0, 0.0)
    up = pose.gaze + pose.gape / 2
    width, half = t.beak_width, t.beak * 0.55
    upper = limb(root.x1, root.y1, up, half, width, 0.62 * width)
    tip = limb(upper.x1, upper.y1, up - t.beak_bend, half, 0.62 * width, 0.008)
    lower = limb(root.x1, root.y1, pose.gaze - 8 - pose.gape, t.beak * 0.8, 0.75 * width, 0.01)
    return upper, tip, lower


def anatomy(t: Traits, pose: Pose) -> Iterator[tuple[int, tuple[Cone, ...], float]]:
    """The parts of an animal, from back to front.

    Args:
        t: The species.
        pose: How it holds itself.

    Yields:
        Part id, cones in units (x forward, y up), and brightness, lower for what is far.
    """
    chest, rump = t.body * 0.45, -t.body * 0.55
    neck = limb(chest, 0.3 * t.girth, pose.neck, t.neck + 0.5 * t.girth, 0.6 * t.girth, 0.085)
    head = limb(neck.x1, neck.y1, pose.neck, 0.4 * t.head, 0.0, 0.0)
    torso = Cone(chest, 0.0, rump, 0.01, t.girth, 0.72 * t.girth)
    yield _LEGS, _leg(t, pose, 0.06, pose.legs[1]), 0.72
    tail = fan(rump, 0.02, pose.tail, t.tail_spread, t.tail + 0.1, (0.04, t.tail_tip))
    yield _TAIL, tail, 1.0
    yield _BODY, (torso, neck), 1.0
    yield _LEGS, _leg(t, pose, -0.06, pose.legs[0]), 1.0
    yield _BEAK, _beak(t, pose, head.x1, head.y1), 1.0
    yield HEAD, _head(t, pose, head.x1, head.y1), 1.0
    radii = (0.085, t.wing_tip)
    feathers = fan(0.3 * t.body, 0.35 * t.girth, pose.wing, pose.wing_fan, t.wing, radii)
    yield _WING, feathers, 1.0
