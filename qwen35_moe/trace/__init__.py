"""Writing the truth: recorder, trace files, resume."""
