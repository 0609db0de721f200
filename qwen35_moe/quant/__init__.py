"""Packed weights: MXFP4, FP8, plain floats, and the layouts that checkpoints and engines keep them in."""
