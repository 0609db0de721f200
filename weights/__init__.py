"""Checkpoints with the structure of the real ones, built from an integer hash. See README.md."""
