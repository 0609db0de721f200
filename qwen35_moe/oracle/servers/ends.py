"""What makes logits of the last stream."""

from __future__ import annotations

import torch
from torch import nn

from ...model.norms import RMSNorm
from ...model.ops import Linear
from ...numerics.arithmetics import Arithmetic
from ...run.fill import fill
from ...run.source import WeightSource
from ...run.streamed import StreamedHead
from ..judge.rerun_parts import LayerSource


class Ends:
    """The last norm and the head in the dtypes of tables. On a GPU they stay, read once."""

    def __init__(self, source: WeightSource, device: torch.device):
        self.source, self.device, self.held = source, device, LayerSource(source, device)
        self.norms: dict[str, RMSNorm] = {}
        self.heads: dict[torch.dtype, nn.Module] = {}

    def of(self, table: Arithmetic) -> tuple[RMSNorm, nn.Module]:
        c, dtype = self.source.config, table.weight_dtype("lm_head.weight")
        if table.name not in self.norms:
            with torch.device("meta"):
                norm = self.norms[table.name] = RMSNorm(c.hidden_size, c.rms_norm_eps, "final_norm")
                head = Linear(c.hidden_size, c.vocab_size)
            fill(norm, "norm", self.held, table, self.device)
            if self.device.type == "cpu":
                self.heads[dtype] = StreamedHead(self.source, table, self.device)
            elif dtype not in self.heads:
                name = "embed_tokens" if c.tie_word_embeddings else "lm_head"
                fill(head, name, self.held, table, self.device)
                self.heads[dtype] = head
        return self.norms[table.name], self.heads[dtype]
