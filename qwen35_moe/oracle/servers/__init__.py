"""Judges a running server by the log-probabilities in its answers."""
