"""Is it rounding? Envelopes, reruns, routing, and the records of a comparison."""
