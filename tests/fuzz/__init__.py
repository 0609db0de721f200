"""Fuzzing of everything that strangers write."""
