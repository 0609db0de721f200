"""Real engines on a checkpoint of ours, clean and with bugs planted in the running engine, judged by the oracle."""
