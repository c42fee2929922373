"""Streams of tables: cut to a length, or gone through side by side in the order of a column.

So plans of any length are written, merged and compared in the memory of a few tables.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

PLAN_FILE_ROWS = 1 << 16
"""Rows of the plan in one file of a store: a worker reads the file of its shard, which lies in it
whole.  A plan in memory is looked at by as many, so that a file is encoded without a copy."""


def in_lengths(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of one length.

    Args:
        tables: Tables of one schema.
        rows: Rows of each table but the last, at least 1.

    Yields:
        Tables with at least one row.
    """
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        if count >= rows:
            whole = pa.concat_tables(held)
            for start in range(0, count - rows + 1, rows):
                yield whole.slice(start, rows)
            held, count = [whole.slice(count - count % rows)], count % rows
    if count:
        yield pa.concat_tables(held)


def in_step(streams: Sequence[Iterable[pa.Table]]) -> Iterator[list[pa.Table]]:
    """Streams that are sorted by their column ``path``, a stretch of paths at a time.

    All rows of a path, in whichever stream, come in the same step.

    Args:
        streams: Each gives at least one table; of a table as a rule some rows are held at a time,
            but never less than all rows of one path.

    Yields:
        A table of each stream, of which some may have no rows.
    """
    heads = [_Head(iter(stream)) for stream in streams]
    over = False
    while not over:
        for head in heads:
            head.fill()
        ends = [head.last for head in heads if not head.over]
        over = not ends
        # What comes after the least of the last paths may not be read yet in that stream.
        yield [head.held if over else head.taken_before(min(ends)) for head in heads]


class _Head:
    """What was read of a stream and not yet given on."""

    def __init__(self, stream: Iterator[pa.Table]) -> None:
        self._stream = stream
        self.held: pa.Table = next(stream)
        self.over = False

    @property
    def last(self) -> str:
        """The last path that was read."""
        path: str = self.held["path"][-1].as_py()
        return path

    def fill(self) -> None:
        """Read on until there is a whole path, or the stream is over."""
        while not self.over and (
            not self.held.num_rows or self.held["path"][0].as_py() == self.last
        ):
            following = next(self._stream, None)
            self.over = following is None
            if following is not None:
                self.held = pa.concat_tables([self.held, following])

    def taken_before(self, path: str) -> pa.Table:
        """Take the rows whose path comes before another one."""
        count = bisect_left(self.held["path"], path, key=pa.StringScalar.as_py)
        taken, self.held = self.held.slice(0, count), self.held.slice(count)
        return taken
