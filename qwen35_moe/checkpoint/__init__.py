"""Real checkpoints, read tensor by tensor: every layout in the wild, nothing believed that headers can refute."""

from .checkpoint import Checkpoint
from .header import TensorEntry
from .recognise import recognise
from .stored_experts import StoredExperts
from .tensor_names import canonical
from .usage import UsageReport
from .weight import StoredWeight

__all__ = ["Checkpoint", "StoredExperts", "StoredWeight", "TensorEntry", "UsageReport", "canonical", "recognise"]
