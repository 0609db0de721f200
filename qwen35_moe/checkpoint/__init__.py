"""Real checkpoints, read tensor by tensor: every layout in the wild, nothing believed that headers can refute."""

from .checkpoint import Checkpoint
from .experts import Experts
from .header import Stored
from .names import canonical
from .recognise import recognise
from .validate import Report
from .weight import Weight

__all__ = ["Checkpoint", "Experts", "Report", "Stored", "Weight", "canonical", "recognise"]
