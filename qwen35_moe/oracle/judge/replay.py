"""Handlers that replace values of the truth by an engine's captured ones: its routing, or the inputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...numerics.arithmetics import current
from ...numerics.taps import OBSERVE, REPLAY, Handler, Site


class ReplayRouting(Handler):
    """Repeats a captured choice of experts; their weights are our own at those ids. `values` maps keys
    ("layers.3.moe_topk_ids") to tensors of the same shape as ours."""

    stage, sees_experts = REPLAY, False

    def __init__(self, values: Mapping[str, Tensor]):
        self.values = values

    def __call__(self, site: Site, x: Tensor) -> Tensor | None:
        if site.name == "moe_topk_ids" and site.key in self.values:
            return self.values[site.key].reshape(x.shape).to(x)
        return None


# Where a rerun goes on with what the engine had. What the norm reads, a sum, is dumped as pre_mlp_residual.
RESTARTS = (
    "vis_pixels", "vis_patch_embed", "vis_layer_input", "vis_norm1", "vis_qkv", "vis_attn_output", "vis_attn_residual",
    "vis_norm2", "vis_mlp_act", "vis_mlp_output", "vis_layer_output", "vis_hidden", "vis_merger_norm", "vis_merger_act",
    "image_embeds", "inputs_embeds",
    "embed_tokens", "input_layernorm", "attn_output", "pre_mlp_residual_sum", "pre_mlp_layernorm_output",
    "moe_topk_ids", "mlp_output", "final_norm", "mtp_embedding", "mtp_hidden", "mtp_fc",
)  # fmt: skip
BIG_BYTES = 1 << 26  # a tensor of fewer bytes stays on its GPU
ROOM_FOR = 8  # a larger one stays where the GPU has room for so many of its size


def kept(x: Tensor) -> Tensor:
    """x on its device, or in the host's memory if its GPU has little room left."""
    if not x.is_cuda or x.nbytes < BIG_BYTES:
        return x
    unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return x if torch.cuda.mem_get_info(x.device)[0] + unused > ROOM_FOR * x.nbytes else x.cpu()


class Captured(dict[str, tuple[Tensor, Tensor]]):
    """Values of an engine by key: rows [n] of the flat [B*T] tokens, and the engine's values there [n, features]."""

    def covers(self, keys: Iterable[str], mask_BT: Tensor) -> bool:
        """Whether one of these values is known at all tokens of the mask."""
        return any(key in self and len(self[key][0].unique()) >= int(mask_BT.count_nonzero()) for key in keys)

    def whole(self, key: str, tokens: int) -> Tensor | None:
        """The engine's values at all tokens [tokens, n], NaN where they are not known; None if none is known."""
        if key not in self:
            return None
        rows, x = self[key]
        found = torch.full((tokens, x.shape[1]), torch.nan, dtype=torch.float64)
        found[rows.cpu()] = x.to(found)
        return found

    def put(self, key: str, x: Tensor, tokens: int, keep_sums: bool = False) -> Tensor:
        """`x` with the engine's rows. keep_sums: a row of x stays if it rounds to the engine's row. So a stream that
        was stored rounded keeps the digits that the engine's norm read."""
        rows, theirs = self[key] = self[key][0].to(x.device), self[key][1].to(x.device)  # moved once
        flat, new = x.reshape(tokens, -1).clone(), theirs.to(x.dtype)
        flat[rows] = torch.where((ours := flat[rows]).to(theirs.dtype) == theirs, ours, new) if keep_sums else new
        return flat.view(x.shape)


class Reached(Exception):
    """The run need not go on."""


class Until(Handler):
    """Ends a run behind the tap of this key. It acts after `Restart`, which has the value by then."""

    stage, sees_experts = OBSERVE + 2, False

    def __init__(self, key: str):
        self.key = key

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.key == self.key and site.expert is None and site.index is None:
            raise Reached


class Restart(Handler):
    """Records the model's values, and lets it continue with the engine's. So every block runs on the engine's own
    input, and an error shows only where it is made.
    """

    stage, sees_experts = OBSERVE + 1, False

    def __init__(self, captured: Captured, tokens: int):
        self.captured, self.tokens = captured, tokens
        self.seen: dict[str, Tensor] = {}

    def __call__(self, site: Site, x: Tensor) -> Tensor | None:
        if site.expert is not None or site.index is not None:
            return None
        self.seen.setdefault(site.key, kept(x))
        if site.name not in RESTARTS:
            return None
        key = site.key.removesuffix("_sum")
        if key not in self.captured:
            return None
        if is_sum := key != site.key:
            dtype = current().rounding(site.name.removesuffix("_sum"))
            self.seen.setdefault(key, kept(x.to(dtype) if isinstance(dtype, torch.dtype) else x))
        rows = x.shape[0] if site.part == "visual" else self.tokens
        return self.captured.put(key, x, rows, keep_sums=is_sum)
