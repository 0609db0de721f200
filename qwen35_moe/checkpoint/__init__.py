"""Real checkpoints, read tensor by tensor: every layout in the wild, nothing believed that headers can refute."""

from .checkpoint import Checkpoint
from .header import Stored
from .recognise import recognise
from .stored_experts import Experts
from .tensor_names import canonical
from .usage import UsageReport
from .weight import Weight

__all__ = ["Checkpoint", "Experts", "Stored", "UsageReport", "Weight", "canonical", "recognise"]
