"""May the shared expert be fused? One predicate for each engine, on the declared and the stored precision."""
