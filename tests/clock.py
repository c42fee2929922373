"""A clock that stands still until it is moved."""


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time it is set to."""
        return self.now
