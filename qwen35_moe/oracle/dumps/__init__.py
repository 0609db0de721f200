"""Engines' dumps: readers, names, steps and alignment with the truth."""
