"""Tensors of many images that come in batches."""

from torch import Tensor


class Gathered:
    """Batches as one, each put in place as it comes.

    A list of batches and what they are joined to would take the memory twice, and much of the
    list's is not given back to the system.

    Args:
        most: Images that come, at most.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._whole: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self._count

    def add(self, *parts: Tensor) -> None:
        """Take a batch: tensors (B, ...), of the same shapes but for B each time."""
        if not self._whole:
            self._whole = tuple(part.new_empty(self._most, *part.shape[1:]) for part in parts)
        stop = self._count + len(parts[0])
        for whole, part in zip(self._whole, parts, strict=True):
            whole[self._count : stop] = part
        self._count = stop

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Each of the tensors (N, ...), of the N images that came."""
        return tuple(whole[: self._count] for whole in self._whole)
