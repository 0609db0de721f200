"""Which known bug is it? The catalogue of faults, planted on the engine's own inputs."""
