"""Evaluations of stored checkpoints and part stores, and the metrics they share."""
