"""Real checkpoints, read tensor by tensor, in every public layout. Headers are checked before anything is read."""

from .checkpoint import Checkpoint
from .folder import UsageReport
from .header import TensorEntry, canonical
from .recognise import recognise
from .weight import StoredExperts, StoredWeight

__all__ = ["Checkpoint", "StoredExperts", "StoredWeight", "TensorEntry", "UsageReport", "canonical", "recognise"]
