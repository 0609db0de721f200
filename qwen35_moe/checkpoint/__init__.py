"""Real checkpoints, read tensor by tensor, in every public layout. Headers are checked before anything is read."""

from .checkpoint import Checkpoint
from .header import TensorEntry
from .recognise import recognise
from .stored_experts import StoredExperts
from .tensor_names import canonical
from .usage import UsageReport
from .weight import StoredWeight

__all__ = ["Checkpoint", "StoredExperts", "StoredWeight", "TensorEntry", "UsageReport", "canonical", "recognise"]
