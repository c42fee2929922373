import numpy as np
import pytest

from semmae.stages.evals.metrics import information_share
from semmae.stages.evals.part_measures import (
    Evidence,
    FoundParts,
    followed,
    measured,
    objects_of,
    prefixed,
    stability,
)
from semmae.stages.evals.part_views import Boxes, View


def random_maps(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, (20, 4, 5), dtype=np.uint8)


def moved(labels: np.ndarray) -> dict[View, np.ndarray]:
    """Views in which nothing changes its part; the crops are the whole images."""
    shifted = np.pad(labels, ((0, 0), (1, 0), (1, 0)), mode="edge")[:, :4, :5]
    return {"flip": labels[:, :, ::-1], "shift": shifted, "crop": labels}


def whole_boxes(count: int = 20) -> Boxes:
    return Boxes(np.array([[0, 0, 40, 50]] * count), np.array([[40, 50]] * count))


def test_stability__is_full_where_parts_move_with_the_image() -> None:
    labels = random_maps()
    found = FoundParts(labels, 4, 0, moved(labels))
    objects = objects_of(found, None)
    figures = stability(found, objects, whole_boxes())
    names = {f"{view}_agreement{tail}" for view in moved(labels) for tail in ("", "_fg")}
    assert figures.keys() == names
    assert set(figures.values()) == {100.0}


def test_stability__is_of_chance_where_they_stay_behind() -> None:
    labels = random_maps()
    stays = FoundParts(labels, 4, 0, {"flip": labels, "shift": labels})
    figures = stability(stays, objects_of(stays, None), None)
    assert all(value < 60 for value in figures.values())


def test_stability__counts_object_patches_by_hand() -> None:
    labels = np.array([[[0, 1], [2, 1]]], dtype=np.uint8)
    flipped = np.array([[[2, 0], [1, 1]]], dtype=np.uint8)
    found = FoundParts(labels, 3, 0, {"flip": flipped})
    # Mirrored back, the view says 0 2 / 1 1: two of four are equal, one of three objects.
    figures = stability(found, objects_of(found, None), None)
    assert figures["flip_agreement"] == 50
    assert figures["flip_agreement_fg"] == pytest.approx(100 / 3)
    true = np.array([[[1, 0], [0, 1]]], dtype=np.uint8)
    assert stability(found, objects_of(found, true), None)["flip_agreement_fg"] == 100


def test_objects_of__true_labels_before_the_background_before_all() -> None:
    labels, true = random_maps(), random_maps(1)
    assert np.array_equal(objects_of(FoundParts(labels, 4, 0), true), true > 0)
    assert np.array_equal(objects_of(FoundParts(labels, 4, 2), None), labels != 2)
    assert objects_of(FoundParts(labels, 4), None).all()


def test_followed__looks_at_object_patches_alone() -> None:
    labels = random_maps()
    classes = np.arange(20) % 2
    objects = random_maps(1) > 1
    labels[objects] = np.broadcast_to(classes[:, None, None], labels.shape)[objects]
    figures = followed(labels, objects, Evidence(classes=classes, clusters=classes[::-1]))
    assert figures["class_share"] == pytest.approx(100)
    kinds = np.broadcast_to(classes[::-1, None, None], labels.shape)
    expected = information_share(labels[objects], kinds[objects])
    assert figures["cluster_share"] == expected
    assert followed(labels, objects, Evidence(classes=np.zeros(20, int))) == {}


def test_measured__says_all_that_is_known_and_no_more() -> None:
    labels = random_maps()
    bare = measured(FoundParts(labels, 4), Evidence())
    assert bare.keys() == {"coherence", "dead_parts", "position_share", "area_entropy"}
    full = measured(
        FoundParts(labels, 5, 0, moved(labels), 0.25),
        Evidence(labels, np.arange(20) % 3, np.arange(20) % 4, whole_boxes()),
    )
    assert {"class_share", "cluster_share", "crop_agreement_fg", "fg_nmi"} <= full.keys()
    assert full["dead_parts"] == 1
    assert full["confidence"] == 25
    assert all(
        full[name] == pytest.approx(100)
        for name in ("fg_nmi", "fg_ari", "nmi", "ari", "in_image_ari", "in_image_fg_ari")
    )


def test_measured__an_image_set_without_objects_leaves_out_what_needs_them() -> None:
    labels = np.zeros((3, 4, 5), dtype=np.uint8)
    figures = measured(FoundParts(labels, 4, 0, {"flip": labels}), Evidence(classes=np.arange(3)))
    assert figures["flip_agreement"] == 100
    assert not {"flip_agreement_fg", "class_share"} & figures.keys()


def test_prefixed__names_whose_figures_they_are() -> None:
    assert prefixed("grid", {"nmi": 1.0}) == {"grid.nmi": 1.0}
