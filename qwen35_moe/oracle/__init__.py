"""The oracle: traces of the truth, dumps of engines, and what to say about their difference."""
