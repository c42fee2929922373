import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from semmae.stages.part_watch import WINDOW, PartWatch


def maps_of(owners: list[int], parts: int) -> Tensor:
    """Maps (B, P, 1, 5) of patches owned by the parts listed, over and over."""
    labels = torch.tensor(owners).repeat(5).reshape(-1, 1, 5)
    return F.one_hot(labels, parts).permute(0, 3, 1, 2).float() * 0.6


def steps(watch: PartWatch, maps: Tensor, count: int) -> None:
    for _ in range(count):
        watch.count(maps)
        watch.after_step(0.5)


def test_count__is_the_smallest_share_of_the_batch() -> None:
    watch = PartWatch(1)
    assert float(watch.count(maps_of([0, 0, 1, 2], 3))) == pytest.approx(1 / 4)
    assert float(watch.count(maps_of([0, 0, 1, 1], 3))) == 0
    # A plain count, of maps without any pattern.
    torch.manual_seed(0)
    maps = torch.rand(3, 4, 6, 5)
    owners = [int(maps[b, :, y, x].argmax()) for b in range(3) for y in range(6) for x in range(5)]
    slow = min(owners.count(part) for part in range(4)) / len(owners)
    assert float(PartWatch(1).count(maps)) == pytest.approx(slow)


def test_watch__tells_once_of_a_part_that_dies_and_once_when_it_is_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = PartWatch(1)
    all_live, two_died = maps_of([0, 1, 2, 3], 4), maps_of([0, 2], 4)
    steps(watch, all_live, 100)
    assert capsys.readouterr().err == ""
    steps(watch, two_died, WINDOW - 1)
    assert capsys.readouterr().err == ""  # the last batch in which they lived still counts
    steps(watch, two_died, 1)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" owns")[0] for line in told] == ["part 1", "part 3"]
    for line in told:
        assert "--num-parts" in line
        assert "--diversity-weight" in line
        assert "--seed" in line
    steps(watch, two_died, 400)
    assert capsys.readouterr().err == ""
    steps(watch, all_live, 1)
    back = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in back] == ["part 1 is back", "part 3 is back"]


def test_watch__waits_for_enough_steps(capsys: pytest.CaptureFixture[str]) -> None:
    watch, without_one = PartWatch(1), maps_of([0], 2)
    steps(watch, without_one, WINDOW - 1)
    assert capsys.readouterr().err == ""
    steps(watch, without_one, 1)
    assert capsys.readouterr().err.startswith("part 1 owns 0.00%")


def test_watch__weighs_batches_by_their_patches(capsys: pytest.CaptureFixture[str]) -> None:
    watch, rarely = PartWatch(1), maps_of([0] * 1997 + [1] * 3, 2)
    for _ in range(WINDOW // 2):  # 3 of 2,001 patches; the mean of both shares is 0.075 %
        steps(watch, rarely, 1)
        steps(watch, maps_of([0], 2), 1)
    assert capsys.readouterr().err == ""


def test_look__tells_of_a_window_that_is_not_full(capsys: pytest.CaptureFixture[str]) -> None:
    watch = PartWatch(1)
    watch.look(0.0)  # before any batch
    steps(watch, maps_of([0], 2), 3)
    assert capsys.readouterr().err == ""
    watch.look(1.0)
    told = "part 1 owns 0.00% of the patches of the last 3 batches, 100% into the run: "
    assert capsys.readouterr().err.startswith(told)


def test_watch__looks_only_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    watch, without_one = PartWatch(40), maps_of([0], 2)
    steps(watch, without_one, 79)
    assert capsys.readouterr().err == ""
    steps(watch, without_one, 1)
    assert "part 1" in capsys.readouterr().err


def test_watch__takes_no_random_numbers_and_no_gradients() -> None:
    maps = torch.rand(2, 3, 4, 4, requires_grad=True)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert not PartWatch(1).count(maps).requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)
