"""Baselines beside a part learner: what its tokens give without learning.

They are part learners themselves, so background, blur and labels are made by the same code.

Legend of shapes: N images, L patches, D width.
"""

from dataclasses import replace
from typing import Any, Literal

from ...models.encoders import Tokens
from ...models.parts import PartArchitecture, PartLearner
from ..part_start import object_features, start_scores

Baseline = Literal["kmeans", "bare_kmeans", "image_kmeans", "colour", "attention", "grid"]

BASELINES: tuple[Baseline, ...] = (
    "kmeans",
    "bare_kmeans",
    "image_kmeans",
    "colour",
    "attention",
    "grid",
)


def beside(
    learner: PartLearner, tokens: Tokens, grid: tuple[int, int], variant: Baseline, seed: int
) -> PartLearner:
    """A baseline with the token statistics of a learner, and as many part ids as it has.

    ``kmeans`` over the set, ``image_kmeans`` inside each image and ``colour`` regions have the
    learner's background mask, temperature and blur, which is of the features, too.
    ``bare_kmeans``, raw ``attention`` heads and the fixed ``grid`` have no background;
    ``bare_kmeans`` and the ``grid`` are not blurred either.

    Args:
        learner: The learner.
        tokens: Of the images that k-means is made of; the attention's heads are counted in them.
        grid: (h, w), with h w = L.
        variant: Which baseline.
        seed: Of k-means over the set, which has three starts.

    Returns:
        The baseline, on the CPU, in evaluation mode.

    Raises:
        SettingError: There are fewer object patches than parts, or the grid has too few places.
    """
    shape = _shape(learner.architecture, variant, tokens.attention.shape[1], grid)
    made = PartLearner(shape).eval().requires_grad_(False)
    for name, own in made.named_buffers(recurse=False):
        if len(own):  # without a background there is no vote to take over
            own.copy_(getattr(learner, name))
    if made.predictor is not None and learner.predictor is not None:
        made.predictor.load_state_dict(learner.predictor.state_dict())
    points = tokens.patches[:0]
    if shape.variant == "kmeans":
        points, _ = object_features(made, tokens, grid)
    start_scores(made, points.numpy(), grid, seed)
    return made


def _shape(
    shape: PartArchitecture, variant: Baseline, heads: int, grid: tuple[int, int]
) -> PartArchitecture:
    no_places: dict[str, Any] = {"grid_places": 0, "predictor": "none"}
    whole: dict[str, Any] = {"background": "none", "parts": shape.channels, **no_places}
    like: dict[str, Any] = {"parts": shape.parts}
    if not shape.masked:
        like = whole
    elif shape.background != "predicted":
        like |= no_places
    changes: dict[Baseline, dict[str, Any]] = {
        "kmeans": {"variant": "kmeans", **like},
        "bare_kmeans": {"variant": "kmeans", **whole, "blur": 0.0},
        "image_kmeans": {"variant": "image-kmeans", **like},
        "colour": {"variant": "colour", **like},
        "attention": {"variant": "attention", **whole, "parts": heads},
        "grid": {"variant": "grid", **whole, "blur": 0.0, "grid_places": grid[0] * grid[1]},
    }
    plain: dict[str, Any] = {"pixel_decoder": False, "told_by": "tokens", "look_rounds": 0}
    return replace(shape, **{**plain, **changes[variant]})
