"""The model, and nothing else: plain PyTorch, every named value through `tap`."""
