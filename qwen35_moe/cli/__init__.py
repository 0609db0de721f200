"""The commands, which parse and print."""
