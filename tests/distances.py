"""How far two results are apart."""

from __future__ import annotations

from torch import Tensor


def apart(found: Tensor, truth: Tensor) -> float:
    """Logits: max |difference of log p|."""
    assert found.shape == truth.shape
    return (found.double().log_softmax(-1) - truth.double().log_softmax(-1)).abs().max().item()


def relative(found: Tensor, truth: Tensor) -> float:
    """The largest difference, by the largest value."""
    assert found.shape == truth.shape
    return ((found.double() - truth.double()).abs().max() / truth.abs().max()).item()
