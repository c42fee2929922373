"""How sure the mean of a few rounds is."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student


def interval(values: Sequence[float]) -> str:
    """Mean of at least two values with the half width of its 95 % interval (Student's)."""
    quantile = float(student.ppf(0.975, len(values) - 1))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"
