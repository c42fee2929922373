import numpy as np
import pytest

from semmae.stages.background_vote import objectness_of


def test_objectness_of__finds_the_attended_middle() -> None:
    assigned = np.zeros((5, 16), dtype=np.int64)
    assigned[:, [5, 6, 9, 10]] = 1
    attention = np.where(assigned == 1, 0.1, 0.02).astype(np.float32)
    assert (objectness_of(assigned, attention, (4, 4), 2) > 0).tolist() == [False, True]


def test_objectness_of__goes_by_the_border_where_attention_knows_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = np.broadcast_to(np.arange(64) // 8, (5, 64)).astype(np.int64)
    # Each row is a cluster: the first and last lie on the border, the others by a quarter.
    knowing = np.where((rows >= 2) & (rows <= 4), 0.03, 0.001).astype(np.float32)
    wanted = [False, False, True, True, True, False, False, False]
    assert (objectness_of(rows, knowing, (8, 8), 8) > 0).tolist() == wanted
    assert not capsys.readouterr().err
    ignorant = np.where(rows == 0, 0.03, 0.001).astype(np.float32)
    wanted = [False, True, True, True, True, True, True, False]
    assert (objectness_of(rows, ignorant, (8, 8), 8) > 0).tolist() == wanted
    assert "the border alone votes" in capsys.readouterr().err
