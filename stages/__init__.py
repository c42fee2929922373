"""What a command does: one module a command, its options dataclass beside it."""
