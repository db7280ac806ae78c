"""The directory of a run: lock, checkpoints, log."""
