"""Holding a model and driving it: load, place, stream, prompt, generate."""
