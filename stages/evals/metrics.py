"""How well part ids agree with labelled parts, with neighbours, and with what they should not.

Pure functions on integer arrays.  N counts images, L patches of an image, h x w the patch grid.
Scores are percent as plain floats, 100 the best agreement; the Rand index, being corrected for
chance, may fall below 0.  The foreground versions (``fg_``) count only patches whose true label is
not background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from ...errors import MismatchError, SettingError
from .rand_index import rand_indices

Ids = NDArray[np.integer]
BACKGROUND = 0


def _pair(predicted: Ids, true: Ids) -> tuple[Ids, Ids]:
    """Both arrays, checked to be of one shape and not empty."""
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape:
        raise MismatchError(
            f"metrics: part ids of shape {predicted.shape} cannot be compared with labels of shape "
            f"{true.shape}; give both on the same patch grid."
        )
    if predicted.size == 0:
        raise MismatchError("metrics: there are no patches to compare; give at least one image.")
    return predicted, true


def _foreground(predicted: Ids, true: Ids) -> tuple[Ids, Ids]:
    """The patches whose true label is not background, flat."""
    predicted, true = _pair(predicted, true)
    refuse_no_foreground(true)
    inside = true != BACKGROUND
    return predicted[inside], true[inside]


def refuse_no_foreground(true: Ids) -> None:
    """Refuse true labels of background alone.

    Raises:
        MismatchError: Every one is `BACKGROUND`.
    """
    if not (true != BACKGROUND).any():
        raise MismatchError(
            "metrics: every true label is background (0), so there is no foreground to score; "
            "check that the label images hold part ids above 0."
        )


def nmi(predicted: Ids, true: Ids) -> float:
    """Normalised mutual information (arithmetic mean of the entropies) over all patches.

    Args:
        predicted: Part ids, integers of any shape, usually (N, L).
        true: True labels of the same shape.

    Returns:
        Percent in [0, 100].

    Raises:
        MismatchError: Shapes differ, or there are no patches.
    """
    predicted, true = _pair(predicted, true)
    return 100.0 * float(normalized_mutual_info_score(true.ravel(), predicted.ravel()))


def ari(predicted: Ids, true: Ids) -> float:
    """Adjusted Rand index over all patches, at most 100; arguments and errors as in `nmi`."""
    predicted, true = _pair(predicted, true)
    return 100.0 * float(adjusted_rand_score(true.ravel(), predicted.ravel()))


def fg_nmi(predicted: Ids, true: Ids) -> float:
    """`nmi` on the foreground, as in the part discovery literature (FG-NMI on CUB).

    Raises:
        MismatchError: Shapes differ, or no true label is foreground.
    """
    return nmi(*_foreground(predicted, true))


def fg_ari(predicted: Ids, true: Ids) -> float:
    """`ari` on the foreground; errors as in `fg_nmi`."""
    return ari(*_foreground(predicted, true))


def ari_inside_images(predicted: Ids, true: Ids, *, foreground: bool = False) -> float:
    """Mean over images of the adjusted Rand index inside one image.

    Blind to what an id means from image to image: it judges the partition alone, which is what
    masks need.

    Args:
        predicted: Part ids, (N, ...) integers.
        true: True labels of the same shape.
        foreground: Count foreground patches only; images without any are left out.

    Returns:
        Percent, at most 100.

    Raises:
        MismatchError: Shapes differ, there are no patches, or none is foreground.
    """
    predicted, true = _pair(predicted, true)
    inside = np.ones(true.shape, dtype=np.bool_)
    if foreground:
        _foreground(predicted, true)
        inside = true != BACKGROUND
    return 100.0 * float(rand_indices(predicted, true, inside).mean())


def agreement(first: Ids, second: Ids, where: NDArray[np.bool_] | None = None) -> float:
    """Share of patches that have the same id in two maps of the same places.

    Args:
        first: Part ids, integers of any shape.
        second: Part ids of the same shape.
        where: bool of that shape, patches that count; all by default.

    Returns:
        Percent in [0, 100].

    Raises:
        MismatchError: Shapes differ, or no patch counts.
    """
    first, second = _pair(first, second)
    if where is not None:
        if where.shape != first.shape:
            raise MismatchError(
                f"metrics: a choice of patches of shape {where.shape} does not fit part ids of "
                f"shape {first.shape}; give one value a patch."
            )
        first, second = _pair(first[where], second[where])
    return 100.0 * float((first == second).mean())


def coherence(labels: Ids) -> float:
    """Share of neighbouring patches (left-right and up-down) that have the same part.

    Args:
        labels: Part ids, (N, h, w) or (h, w) integers.

    Returns:
        Percent in [0, 100].

    Raises:
        MismatchError: The grid has no neighbours.
    """
    labels = np.asarray(labels)
    if labels.ndim < 2 or labels.size == 0 or labels.shape[-1] * labels.shape[-2] < 2:
        raise MismatchError(
            f"metrics: coherence needs maps (N, h, w) of two patches or more, not {labels.shape}."
        )
    across = labels[..., :, 1:] == labels[..., :, :-1]
    down = labels[..., 1:, :] == labels[..., :-1, :]
    return 100.0 * float((across.sum() + down.sum()) / (across.size + down.size))


def _entropy(counts: NDArray[np.integer]) -> float:
    """Entropy in nats of a table of counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def information_share(part_ids: Ids, other: Ids) -> float:
    """I(part; other) / H(part): how much of the part id another variable tells.

    With ``other`` the place it is high for ids that follow the frame, with ``other`` the class for
    ids that change meaning from class to class.

    Args:
        part_ids: Part ids, integers of any shape.
        other: The other variable, integers that broadcast to that shape, as (N, 1) for a class.

    Returns:
        Percent in [0, 100]; 0 when there is one part only.

    Raises:
        MismatchError: ``other`` does not broadcast, or there are no patches.
    """
    part_ids = np.asarray(part_ids)
    try:
        other = np.broadcast_to(np.asarray(other), part_ids.shape)
    except ValueError:
        raise MismatchError(
            f"metrics: a variable of shape {np.shape(other)} does not fit part ids of shape "
            f"{part_ids.shape}; give one value a patch, or (N, 1) for one an image."
        ) from None
    part_ids, other = _pair(part_ids, other)
    parts, a = np.unique(part_ids.ravel(), return_inverse=True)
    others, b = np.unique(other.ravel(), return_inverse=True)
    table = np.bincount(a * len(others) + b, minlength=len(parts) * len(others))
    table = table.reshape(len(parts), len(others))
    whole = _entropy(table.sum(axis=1))
    if whole == 0.0:
        return 0.0
    shared = whole + _entropy(table.sum(axis=0)) - _entropy(table)
    return 100.0 * min(max(shared / whole, 0.0), 1.0)


def area_shares(labels: Ids, parts: int) -> NDArray[np.float64]:
    """Share of all patches that each part holds.

    Args:
        labels: Part ids in 0 .. parts - 1, integers of any shape.
        parts: Number of part ids.

    Returns:
        float64 (parts,), percent, sum 100.

    Raises:
        MismatchError: There are no patches, or an id lies outside.
    """
    flat = np.asarray(labels).ravel()
    if flat.size == 0 or int(flat.min()) < 0 or int(flat.max()) >= parts:
        found = f"{flat.min()} to {flat.max()}" if flat.size else "none"
        raise MismatchError(f"metrics: expected part ids in 0 to {parts - 1}, found {found}.")
    return 100.0 * np.bincount(flat, minlength=parts) / flat.size


def dead_parts(labels: Ids, parts: int, threshold: float = 0.001) -> tuple[int, ...]:
    """The ids of parts that hold less than ``threshold`` (a fraction) of the patches, in order."""
    return tuple(np.flatnonzero(area_shares(labels, parts) < 100.0 * threshold).tolist())


def area_entropy(labels: Ids, parts: int) -> float:
    """Entropy of the area shares in percent of its maximum, log(parts); 100 for equal areas."""
    counts = np.rint(area_shares(labels, parts) * np.size(labels) / 100.0).astype(np.int64)
    return 100.0 * _entropy(counts) / float(np.log(parts)) if parts > 1 else 0.0


def fixed_grid(h: int, w: int, cells: int) -> NDArray[np.int64]:
    """Parts that know nothing but place: the floor under every score.

    The image is cut into round(sqrt(cells)) rows of equal height; each row holds cells / rows cells
    of equal width, and the rows in the middle take what is left over (7 cells: rows of 2, 3 and 2).

    Args:
        h: Patches down.
        w: Patches across.
        cells: Number of cells, 1 or more.

    Returns:
        int64 (h * w,), cell ids in reading order.

    Raises:
        SettingError: The grid is too small for that many cells.
    """
    rows = max(1, round(cells**0.5))
    widths = _row_lengths(max(cells, 1), rows)
    if cells < 1 or h < rows or w < max(widths):
        raise SettingError(
            f"a grid of {h} x {w} patches cannot be cut into {cells} cells in "
            f"{rows} rows; use fewer cells or a finer grid."
        )
    row_of = np.arange(h) * rows // h
    starts = np.cumsum([0, *widths[:-1]])
    columns = [np.arange(w) * widths[r] // w + starts[r] for r in row_of]
    return np.concatenate(columns).astype(np.int64)


def _row_lengths(cells: int, rows: int) -> Sequence[int]:
    """Cells of each row: equal, and one more for as many middle rows as needed."""
    each, left = divmod(cells, rows)
    first = (rows - left) // 2
    return [each + (first <= r < first + left) for r in range(rows)]


def majority_labels(
    label_map: NDArray[np.integer], grid: tuple[int, int], classes: int
) -> NDArray[np.uint8]:
    """The most frequent label of each patch; the lowest id wins a tie.

    Args:
        label_map: Labels a pixel, (H, W) integers in 0 .. classes - 1.
        grid: Patches down and across; they must divide H and W.
        classes: Number of labels, at most 256.

    Returns:
        uint8 of shape ``grid``.

    Raises:
        MismatchError: The grid does not divide the map, or a label lies outside.
    """
    label_map = np.asarray(label_map)
    h, w = grid
    if label_map.ndim != 2 or label_map.shape[0] % h or label_map.shape[1] % w:
        raise MismatchError(
            f"metrics: a label map of shape {label_map.shape} cannot be cut into {h} x {w} equal "
            f"patches; resize it to a multiple of the grid first."
        )
    area_shares(label_map, classes)
    patches = label_map.reshape(h, label_map.shape[0] // h, w, -1).transpose(0, 2, 1, 3)
    flat = patches.reshape(h * w, -1).astype(np.int64)
    offsets = np.arange(h * w)[:, None] * classes
    counts = np.bincount((flat + offsets).ravel(), minlength=h * w * classes)
    return np.asarray(counts.reshape(h, w, classes).argmax(axis=2), dtype=np.uint8)
