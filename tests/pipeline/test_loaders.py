import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from semmae.errors import MissingError, SettingError
from semmae.pipeline import feeding, ranks
from semmae.pipeline.crops import crop_boxes, crop_maps, flips, squash
from semmae.pipeline.feeding import batches_of
from semmae.pipeline.image_source import ImageSource
from semmae.pipeline.loaders import AugmentedData, PretrainingData, SquashedData
from semmae.pipeline.mask_counts import visible_count
from semmae.pipeline.mask_policies import POLICIES, MaskSchedule
from semmae.pipeline.part_maps import PartMaps
from semmae.pipeline.randomness import Purpose, partners, streams
from semmae.pipeline.schedule import BatchSampler, Draw, Schedule
from semmae.pipeline.sources import list_images

GRID, PARTS, PATCH, SIDE = 8, 6, 8, 64
PATCHES = (SIDE // PATCH) ** 2
STEP = 40
"""Levels of grey between the colours of two parts."""


def painted(
    root: Path, count: int, bad: Sequence[int] = (), grid: tuple[int, int] = (GRID, GRID)
) -> NDArray[np.uint8]:
    """Images of several sizes painted by their own maps, two classes; the maps."""
    maps = np.random.default_rng(3).integers(0, PARTS, (count, *grid), dtype=np.uint8)
    for number, places in enumerate(maps):
        tall, wide = 96 // grid[0] + number % 3, 96 // grid[1] + number % 5
        pixels = np.kron(places * STEP, np.ones((tall, wide), dtype=np.uint8))
        place = root / "train" / "ab"[number % 2] / f"{number:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(place)
        if number in bad:
            place.write_bytes(b"broken")
    order = [int(key.split("/")[-1][:3]) for key in list_images(root).keys]
    return maps[order]


class Example:
    def __init__(
        self,
        root: Path,
        count: int = 24,
        bad: Sequence[int] = (),
        grid: tuple[int, int] = (GRID, GRID),
    ) -> None:
        self.maps = painted(root, count, bad, grid)
        self.plan = list_images(root)
        self.numbers = [int(key.split("/")[-1][:3]) for key in self.plan.keys]

    def maps_of(self, policy: str, rows: NDArray[np.int64]) -> PartMaps:
        """What a policy reads, as `read_maps` gives it of a store; else part maps all the same."""
        reads = POLICIES[policy].reads if policy in POLICIES else None
        if reads == "attention":
            seen = np.random.default_rng(5).random(self.maps.shape).astype(np.float16)
            return PartMaps(seen, rows)
        return PartMaps(self.maps, rows[partners(0, len(rows))] if policy == "shuffled" else rows)

    def data(
        self, policy: str = "semantic", alpha: float | None = 1.0, seed: int = 0, **other: Any
    ) -> PretrainingData:
        rows = other.pop("rows", np.arange(len(self.plan)))
        masks = MaskSchedule(
            policy=policy,
            mask_ratio=other.pop("ratio", 0.5),
            gamma=2.0,
            start=0.0 if alpha is None else alpha,
            end=1.0 if alpha is None else alpha,
        )
        maps = other.pop("maps", self.maps_of(policy, rows))
        return PretrainingData(
            ImageSource(self.plan, rows),
            maps,
            PARTS,
            image_size=other.pop("image_size", (SIDE, SIDE)),
            patch_size=PATCH,
            masks=masks,
            seed=seed,
            **other,
        )


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(tmp_path_factory.mktemp("painted"))


def draws_of(count: int, epoch: int = 0) -> list[Draw]:
    return [Draw(index, epoch, (epoch + index / count) / 10) for index in range(count)]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def row(batch: dict[str, torch.Tensor], place: int) -> dict[str, torch.Tensor]:
    return {name: values[place : place + 1] for name, values in batch.items()}


def test_pretraining_data__has_the_shapes_it_says(example: Example) -> None:
    batch = example.data(alpha=None).__getitems__(draws_of(5))
    assert {n: (v.dtype, tuple(v.shape)) for n, v in batch.items()} == {
        "images": (torch.uint8, (5, SIDE, SIDE, 3)),
        "mask": (torch.bool, (5, PATCHES)),
        "alpha": (torch.float32, (5,)),
        "index": (torch.int64, (5,)),
        "parts": (torch.uint8, (5, PATCHES)),
    }
    assert batch["alpha"].tolist() == pytest.approx([(d.progress) ** 2 for d in draws_of(5)])


@pytest.mark.parametrize("policy", ["random", "block", "green", "attention", "shuffled"])
def test_pretraining_data__tells_an_image_its_own_parts_where_masks_follow_none(
    policy: str, example: Example
) -> None:
    own = PartMaps(example.maps, np.arange(len(example.plan)))
    followed = example.data().__getitems__(draws_of(9))["parts"]
    plain = example.data(policy).__getitems__(draws_of(9))
    told = example.data(policy, own_parts=own).__getitems__(draws_of(9))
    assert torch.equal(told["mask"], plain["mask"])
    # Those of another image are followed.
    assert ("parts" in plain) == (policy == "shuffled")
    assert torch.equal(told["parts"], plain["parts"] if policy == "shuffled" else followed)


@pytest.mark.parametrize("size", [(64, 96), (96, 48)])
def test_pretraining_data__crops_that_are_not_square_are_stretched_no_more_than_square_ones(
    size: tuple[int, int], tmp_path: Path
) -> None:
    # Grey says the row, red the column: their slopes in a crop are the stretch.
    rows, columns = np.mgrid[:200, :240]
    pixels = np.stack([columns, rows, rows], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    masks = MaskSchedule(policy="random", mask_ratio=0.75, gamma=2.0, start=0.0, end=1.0)
    data = PretrainingData(
        ImageSource(list_images(tmp_path)),
        None,
        0,
        image_size=size,
        patch_size=PATCH,
        masks=masks,
        seed=0,
        crop_scale=(0.2, 0.3),
    )
    batch = data.__getitems__([Draw(0, epoch, 0.0) for epoch in range(30)])
    assert batch["mask"].shape == (30, size[0] * size[1] // PATCH**2)
    crops = batch["images"].double()
    down = (crops[:, -5, :, 1] - crops[:, 4, :, 1]).mean(dim=1) / (size[0] - 9)
    across = (crops[:, :, -5, 0] - crops[:, :, 4, 0]).mean(dim=1).abs() / (size[1] - 9)
    stretch = across / down
    assert stretch.min() > 0.7
    assert stretch.max() < 1.4
    assert stretch.min() < 0.95
    assert stretch.max() > 1.05


@pytest.mark.parametrize("policy", POLICIES)
def test_pretraining_data__makes_a_sample_of_seed_epoch_and_index_alone(
    policy: str, example: Example
) -> None:
    data, draws = example.data(policy, alpha=None, predicted_share=0.3), draws_of(24)
    whole = data.__getitems__(draws)
    generator = np.random.default_rng(0)
    for size in (1, 5, 24):
        order = generator.permutation(24)[:size]
        part = data.__getitems__([draws[place] for place in order])
        for place, number in enumerate(order):
            assert equal(row(part, place), row(whole, int(number)))
    others = (
        data.__getitems__([Draw(d.index, 1, d.progress) for d in draws]),
        example.data(policy, alpha=None, predicted_share=0.3, seed=1).__getitems__(draws),
    )
    for other in others:
        for name in ("images", "mask", "predicted"):
            differing = (other[name] != whole[name]).flatten(1).any(dim=1)
            assert differing.float().mean() > 0.9


# Three workers are more than a small machine has cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("policy", POLICIES)
def test_pretraining_data__is_the_same_with_any_workers(policy: str, example: Example) -> None:
    schedule = Schedule(len(example.plan), 4, 2, 0.0, 0.1)
    found = []
    for workers in (0, 1, 3):
        sampler = BatchSampler(schedule, 0, 2, 1)
        data = example.data(policy, alpha=None)
        found.append(list(batches_of(data, sampler, workers, torch.device("cpu"))))
    assert [len(batches) for batches in found] == [schedule.steps - 2] * 3
    for batches in found[1:]:
        assert all(equal(one, other) for one, other in zip(found[0], batches, strict=True))


def parts_split_by(mask: torch.Tensor, images: torch.Tensor) -> tuple[list[int], float]:
    """For each image the parts with masked and visible patches, seen in its pixels; and the share
    of patches whose four middle pixels are of one part's colour."""
    counts, clear = [], []
    for pixels, row_mask in zip(images.numpy(), mask.numpy(), strict=True):
        rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
        patches = pixels[..., 0].reshape(rows, PATCH, columns, PATCH)[:, 3:5, :, 3:5]
        middle = patches.transpose(0, 2, 1, 3).reshape(-1, 4).astype(int)
        parts = np.rint(middle[:, 0] / STEP).astype(int)
        pure = (abs(middle - parts[:, None] * STEP) <= 1).all(axis=1)
        clear.append(pure.mean())
        shown = [set(row_mask[pure & (parts == part)].tolist()) for part in range(PARTS)]
        counts.append(sum(len(states) == 2 for states in shown))
    return counts, float(np.mean(clear))


@pytest.mark.parametrize("epoch", [0, 1])
def test_pretraining_data__moves_image_and_map_together(epoch: int, example: Example) -> None:
    batch = example.data(alpha=1.0, crop_scale=(0.4, 1.0)).__getitems__(draws_of(24, epoch))
    split, clear = parts_split_by(batch["mask"], batch["images"])
    # Whole parts are masked; the last one is cut, so one part at most is half visible.
    assert max(split) == 1
    assert clear > 0.3
    mirrored = batch["images"].flip(2)
    assert np.mean(parts_split_by(batch["mask"], mirrored)[0]) > 2


def test_pretraining_data__draws_what_is_predicted_by_numbers_of_its_own(example: Example) -> None:
    draws = draws_of(24)
    whole = example.data().__getitems__(draws)
    some = example.data(predicted_share=0.26).__getitems__(draws)
    assert some["predicted"].shape == (24, 8)  # of 32 masked patches
    assert some["predicted"].dtype == torch.int64
    del some["predicted"]
    assert equal(some, whole)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@pytest.mark.parametrize("grid", [(5, 9), (3, 2), (12, 12)])
def test_pretraining_data__moves_image_and_map_together_whatever_grid_the_map_has(
    grid: tuple[int, int], size: tuple[int, int], tmp_path: Path
) -> None:
    other = Example(tmp_path, grid=grid)
    batch = other.data(alpha=1.0, image_size=size).__getitems__(draws_of(24))
    split, clear = parts_split_by(batch["mask"], batch["images"])
    assert max(split) <= 1
    assert clear > 0.25
    mirrored = batch["images"].flip(2)
    assert np.mean(parts_split_by(batch["mask"], mirrored)[0]) > 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 1), (4, 2)])
def test_pretraining_data__is_the_same_shared_out_among_ranks(
    ranks: int, workers: int, example: Example
) -> None:
    schedule, device = Schedule(len(example.plan), 8, 2, 0.0, 0.1), torch.device("cpu")
    data = example.data(alpha=None)
    alone = list(batches_of(data, BatchSampler(schedule, 0, 1, 1), 0, device))
    shares = [
        list(
            batches_of(data, BatchSampler(schedule, 0, 1, ranks, range(r, r + 1)), workers, device)
        )
        for r in range(ranks)
    ]
    assert len(alone) == schedule.steps - 1
    for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert equal(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})


class CountingSampler(BatchSampler):
    """Counts the lists of draws that were taken of it."""

    taken_so_far = 0

    def __iter__(self) -> Iterator[list[Draw]]:
        for draws in super().__iter__():
            self.taken_so_far += 1
            yield draws


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of__works_two_batches_a_worker_ahead_at_most(
    workers: int, example: Example
) -> None:
    sampler = CountingSampler(Schedule(len(example.plan), 2, 3, 0.0, 0.1), 0, 0, 1)
    with closing(batches_of(example.data(), sampler, workers, torch.device("cpu"))) as batches:
        for number, _ in enumerate(batches, 1):
            assert number <= sampler.taken_so_far <= number + 2 * workers
    assert number == len(sampler) == 36


@pytest.mark.parametrize(
    ("ranks_here", "most"),
    [
        ([("here", {0, 1, 2, 3})], 4),
        ([("here", {0, 1, 2, 3}), ("here", {0, 1, 2, 3})], 2),  # all to all
        ([("here", {0, 1, 2, 3}), ("here", {4, 5, 6, 7})], 4),  # its own to each
        ([("here", {0, 1, 2, 3}), ("there", {0, 1, 2, 3})], 4),
        ([("here", {0, 1, 2, 3}), *[("here", set(range(64)))] * 7], 1),
    ],
)
def test_batches_of__starts_as_many_workers_as_it_has_processors_and_says_so(
    ranks_here: list[tuple[str, set[int]]],
    most: int,
    example: Example,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: ranks_here[0][1])
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(ranks, "of_all", lambda mine: [mine, *ranks_here[1:]])
    started = []

    def watched(*given: Any, num_workers: int, **settings: Any) -> list[Any]:
        started.append(num_workers)
        return []

    monkeypatch.setattr(feeding, "DataLoader", watched)
    sampler = BatchSampler(Schedule(len(example.plan), 4, 1, 0.0, 0.1), 0, 0, 1)
    for workers in (0, 1, most, most + 1, 100):
        list(batches_of(example.data(), sampler, workers, torch.device("cpu")))
        said = capsys.readouterr().err
        if workers > most:
            assert said.startswith(f"--loader-workers is {workers}: {most} are started")
            assert said.count("\n") == 1
        else:
            assert said == ""
    assert started == [0, 1, most, most, most]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("policy", POLICIES)
def test_pretraining_data__masks_the_same_count_in_every_image(
    policy: str, ratio: float, example: Example
) -> None:
    batch = example.data(policy, alpha=None, ratio=ratio).__getitems__(draws_of(24))
    assert set((~batch["mask"]).sum(dim=1).tolist()) == {visible_count(PATCHES, ratio)}


def test_pretraining_data__hands_on_the_parts_that_a_mask_follows(example: Example) -> None:
    # Whole parts are masked but for the last one, by the parts that come with the mask.
    for policy in ("semantic", "shuffled"):
        batch = example.data(policy, alpha=1.0).__getitems__(draws_of(24))
        for ids, mask in zip(batch["parts"], batch["mask"], strict=True):
            kinds = [len(mask[ids == part].unique()) for part in ids.unique()]
            assert kinds.count(2) <= 1
    levels = PartMaps(example.maps.astype(np.float16), np.arange(len(example.plan)))
    for data in (example.data("random"), example.data("attention", maps=levels)):
        assert "parts" not in data.__getitems__(draws_of(4))


def test_pretraining_data__attention_moves_with_the_image(example: Example) -> None:
    # Attention that is the grey of the image: what is masked is what is bright.
    levels = PartMaps(example.maps.astype(np.float16), np.arange(len(example.plan)))
    data = example.data("attention", maps=levels, crop_scale=(0.4, 1.0))
    batch = data.__getitems__(draws_of(24))
    grey = batch["images"][..., 0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    middle = grey[..., PATCH // 2, PATCH // 2].flatten(1).float()
    hidden = (middle * batch["mask"]).sum(dim=1) / batch["mask"].sum(dim=1)
    seen = (middle * ~batch["mask"]).sum(dim=1) / (~batch["mask"]).sum(dim=1)
    assert (hidden - seen).min() > STEP


def test_pretraining_data__shuffled_masks_follow_the_partner_s_map(example: Example) -> None:
    draws = draws_of(24)
    shuffled = example.data("shuffled").__getitems__(draws)
    semantic = example.data("semantic").__getitems__(draws)
    assert torch.equal(shuffled["images"], semantic["images"])
    # Whole parts of the partner's map, cropped where the image is, are masked, and one is cut.
    images = ImageSource(example.plan)
    sizes = np.array([images.decoded(index).shape[:2] for index in range(24)])
    index = np.arange(24)
    boxes = crop_boxes(streams(0, Purpose.CROP, 0, index), sizes[:, 0], sizes[:, 1])
    mirrored = flips(streams(0, Purpose.FLIP, 0, index))
    taken = crop_maps(example.maps[partners(0, 24)], boxes, sizes, (PATCH, PATCH), mirrored)
    for labels, mask in zip(taken.reshape(24, -1), shuffled["mask"].numpy(), strict=True):
        states = [set(mask[labels == part].tolist()) for part in range(PARTS)]
        assert sum(len(one) == 2 for one in states) <= 1
    assert np.mean(parts_split_by(shuffled["mask"], shuffled["images"])[0]) > 2


def test_pretraining_data__random_masks_do_not_follow_parts(example: Example) -> None:
    draws = draws_of(24)
    with_maps = example.data("random").__getitems__(draws)
    without = example.data("random", maps=None).__getitems__(draws)
    assert equal(with_maps, without)
    assert np.mean(parts_split_by(without["mask"], without["images"])[0]) > 2


def test_pretraining_data__refuses_parts_without_a_store(example: Example) -> None:
    with pytest.raises(SettingError, match="--masking semantic needs --parts"):
        example.data("semantic", maps=None)
    with pytest.raises(SettingError, match="--masking is 'sematnic': expected one of"):
        example.data("sematnic")


def test_pretraining_data__fingerprint_follows_images_and_store(example: Example) -> None:
    prints = {
        example.data(**more).fingerprint[:12]
        for more in (
            {"store": {"store": "1"}},
            {"store": {"store": "2"}},
            {"store": {"store": "1"}, "rows": np.arange(3)},
        )
    }
    assert len(prints) == 3
    one, other = (example.data(store={"store": "1"}, seed=seed) for seed in (0, 1))
    assert one.fingerprint == other.fingerprint


def test_pretraining_data__never_draws_what_the_store_found_bad(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = [0, 7, 8, 11]
    broken = Example(tmp_path, 12, bad)
    good = np.array([row for row, number in enumerate(broken.numbers) if number not in bad])
    data = broken.data(rows=good)
    assert len(data) == 8
    batch = data.__getitems__(draws_of(8))
    assert max(parts_split_by(batch["mask"], batch["images"])[0]) == 1
    assert capfd.readouterr().err == ""


def test_pretraining_data__takes_the_map_of_the_image_it_took(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Example(tmp_path, 12, [2, 4])
    batch = broken.data(crop_scale=(0.4, 1.0)).__getitems__(draws_of(12))
    assert max(parts_split_by(batch["mask"], batch["images"])[0]) == 1
    assert capfd.readouterr().err.count("skipped") == 2


def test_pretraining_data__says_in_a_worker_that_nothing_can_be_read(tmp_path: Path) -> None:
    broken = Example(tmp_path, 4, range(4))
    sampler = BatchSampler(Schedule(4, 2, 1, 0.0, 0.1), 0, 0, 1)
    with pytest.raises(MissingError, match="not one of 4 images"):
        list(batches_of(broken.data(), sampler, 1, torch.device("cpu")))


def test_batches_of__workers_share_parquet_that_was_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, trace = pq.ParquetFile, tmp_path / "opened"

    def traced(place: Path, **settings: Any) -> pq.ParquetFile:
        with trace.open("a") as opened:
            opened.write("once\n")
        return original(place, **settings)

    pixels = [np.full((8, 8, 3), number, dtype=np.uint8) for number in range(40)]
    encoded = []
    for image in pixels:
        stream = BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        encoded.append(stream.getvalue())
    table = pa.table({"image": pa.array(encoded, pa.binary())})
    pq.write_table(table, tmp_path / "train-0.parquet")
    data = SquashedData(ImageSource(list_images(tmp_path)), (4, 4))
    sampler = BatchSampler(Schedule(40, 1, 2, 0.0, 0.1), 0, 0, 1)
    monkeypatch.setattr(pq, "ParquetFile", traced)
    with closing(batches_of(data, sampler, 2, torch.device("cpu"))) as batches:
        found = list(batches)
    assert trace.read_text() == "once\n"
    assert [int(b["images"][0, 0, 0, 0]) for b in found] == [int(b["index"]) for b in found]
    assert len(found) == 80


def test_squashed_data__holds_whole_images(example: Example) -> None:
    images = ImageSource(example.plan)
    batch = SquashedData(images, (16, 24)).__getitems__([Draw(5, 0, 0.0), Draw(1, 3, 0.5)])
    assert batch["index"].tolist() == [5, 1]
    for pixels, index in zip(batch["images"].numpy(), (5, 1), strict=True):
        assert np.array_equal(pixels, squash(images.decoded(index), (16, 24)))


def test_augmented_data__keeps_image_and_class_together(example: Example) -> None:
    images = ImageSource(example.plan)
    data, draws = AugmentedData(images, (16, 16), seed=4), draws_of(24, 2)
    whole = data.__getitems__(draws)
    assert whole["images"].shape == (24, 16, 16, 3)
    assert whole["labels"].tolist() == [number % 2 for number in example.numbers]
    assert equal(row(whole, 9), data.__getitems__([draws[9]]))
