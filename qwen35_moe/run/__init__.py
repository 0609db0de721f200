"""Load, place, stream, prompt and generate."""
