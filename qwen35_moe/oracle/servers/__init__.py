"""A running server, judged by the log-probabilities that it answers with."""
