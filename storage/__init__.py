"""What lasts: checked files, part stores, checkpoints, result records."""
