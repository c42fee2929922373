import pytest

from semmae.benchmarks.intervals import interval


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0], "1.500 ± 6.353"),  # 12.706 * 0.7071 / sqrt(2)
        ([1.0, 2.0, 3.0, 4.0, 5.0], "3.000 ± 1.963"),  # 2.776 * 1.5811 / sqrt(5)
        ([3.0] * 9, "3.000 ± 0.000"),
    ],
)
def test_interval__is_students(values: list[float], expected: str) -> None:
    assert interval(values) == expected
