"""What a rerun needs: the tokens, the layers with their weights, the shared expert's part, the draft head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...model.moe import Experts, MoE
from ...model.mtp import MTP, draft_chains
from ...model.text import Layer, Model
from ...numerics.arithmetics import Arithmetic, using
from ...numerics.taps import Handler, Site, attach
from ...quant.packed import Packed
from ...run.experts import PackedExpert, moved
from ...run.fill import fill
from ...run.gpu.grouped_experts import ResidentExperts
from ...run.gpu.passing import PassingExperts
from ...run.load import build_part
from ...run.prompt import Images
from ...run.source import WeightSource
from ..diagnose.faults import Fault, FaultSite, SlotChange
from ..dumps.step_rows import StepRows
from .hand_over import stepped
from .replay import Restart
from .split_k import splitting


@dataclass
class TruthTokens:
    """The tokens of the truth. ids, positions, mask [B, T], with images positions [3, B, T]; step_rows: those
    of the engine's steps."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    step_rows: StepRows | None = None
    images: Images | None = None
    drafts: Sequence[Tensor] = ()  # [B, T] what each draft started from, where the draft head was traced

    def on(self, device: torch.device) -> TruthTokens:
        """The same on a device."""
        ids, positions, mask = (x.to(device) for x in (self.ids, self.positions, self.mask))
        return replace(self, ids=ids, positions=positions, mask=mask)

    @property
    def count(self) -> int:
        return self.ids.numel()

    @property
    def real(self) -> Tensor | None:
        return None if bool(self.mask.all()) else self.mask.bool()


class LayerSource(WeightSource):
    """The weights of one layer but those of its routed experts: read once, and kept in their stored format on its
    device."""

    def __init__(self, inner: WeightSource, device: torch.device):
        super().__init__(inner.checkpoint, inner.config, inner.online)
        self.inner, self.device, self.conversion, self.as_stored = inner, device, inner.conversion, inner.as_stored
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Packed] = {}

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self.inner.tensor(name).to(self.device)
        return self.tensors[name]

    def weight(self, module: str, rows: slice | None = None) -> Packed:
        if rows is not None:
            return self.inner.weight(module, rows)
        if module not in self.weights:
            self.weights[module] = moved(self.inner.weight(module), self.device)
        return self.weights[module]

    def slot(self, mlp: str, e: int) -> PackedExpert:
        return self.inner.slot(mlp, e)


class Layers:
    """Layers with the weights of a source, in the dtypes of tables. Those of the current layer are kept. device: that
    of a layer; mode: as of `load`.

    On a GPU, experts are read once, in their stored format, and those of the next layer ahead; "decoded" ones are
    decoded once a dtype.
    """

    def __init__(self, source: WeightSource, device: Callable[[int], torch.device], mode: str):
        self.source, self.device, self.mode = source, device, mode
        self.current, self.held = -1, LayerSource(source, torch.device("cpu"))
        self.filled: dict[Any, Layer] = {}
        self.passing: PassingExperts | None = None  # of the current layer, on a GPU
        self.ahead: tuple[int, PassingExperts] | None = None  # of the next, while layers come in their order

    def whole(self, i: int, table: Arithmetic, fused: bool, once: bool = False) -> Layer:
        """Layer i as the checkpoint has it. once: no other run takes it in this dtype, so that its experts are decoded
        when they are chosen."""
        in_order = self.current + 1 == i
        if self.current != i:
            self.current, self.filled, self.held = i, {}, LayerSource(self.source, self.device(i))
            self.passing = self.ahead[1] if self.ahead and self.ahead[0] == i else None
        key = (table.dtype, tuple(sorted(table.weights.items())), table.quantised, fused)
        if key not in self.filled:
            layer = self.filled[key] = self._empty(i, fused)
            mode = "stream" if once else self.mode
            fill(layer, f"layers.{i}", self.held, table, self.device(i), self._mode(i, mode))
            experts = layer.mlp.experts
            if isinstance(experts, PassingExperts):
                if self.passing is None or self.passing.count != experts.count:
                    self.passing = experts
                experts.stay_with(self.passing)
                if mode == "decoded":
                    layer.mlp.experts = self.passing.resident(experts.dtype, experts.quantised)
                self.ahead = self._ahead(i + 1, experts) if in_order else self.ahead
        return self.filled[key]

    def broken(self, i: int, table: Arithmetic, fused: bool, fault: Fault, place: FaultSite) -> Layer:
        """Layer i with the weights of a fault. What the fault leaves alone is shared with the layer as it is."""
        if fault.source(self.source, place) is self.source:
            return self.whole(i, table, fused)
        whole, layer = self.whole(i, table, fused), self._empty(i, fault.fused or fused)
        source = fault.source(self.held, place)
        for name, part in list(layer.named_children()):
            if (name == "mlp") != (fault.block == "mlp"):
                layer.add_module(name, whole.get_submodule(name))
                continue
            fill(part, f"layers.{i}.{name}", source, table, self.device(i), self._mode(i, self.mode))
            if isinstance(part, MoE) and self.mode == "decoded" and self.device(i).type == "cuda":
                changed = self._changed(whole.mlp.experts, partial(source.slot, f"layers.{i}.mlp"), fault, place.expert)
                part.experts = part.experts if changed is None else changed
        return layer

    def _changed(
        self, plain: Experts, read: Callable[[int], PackedExpert], fault: Fault, single: int
    ) -> ResidentExperts | None:
        """The experts of a fault, made of those that a GPU holds; None where they have to be read one by one. read: a
        slot as the fault has it."""
        if not isinstance(plain, ResidentExperts) or plain.count > self.source.config.num_experts:
            return None
        dtype, quantised = plain.down_proj.dtype, plain.quantised
        if isinstance(fault.slot, SlotChange) and not (fault.single or fault.fused or self.passing is None):
            found, shift = self.passing.resident(dtype, quantised, fault.slot.on), -fault.slot.shift
            gate_up, down = (x.roll(shift, 0) if shift else x for x in (found.gate_up_proj, found.down_proj))
            return ResidentExperts(gate_up, down, quantised)
        if fault.fused or fault.single:
            e = single if fault.single else plain.count  # the slot of a fused shared expert is one more
            gate_up, down = (torch.cat((x, x[: fault.fused])) for x in (plain.gate_up_proj, plain.down_proj))
            gate_up[e], down[e] = (moved(packed, down.device).decode(dtype) for packed in read(e))
            return ResidentExperts(gate_up, down, quantised)
        return plain if fault.slot is None else None

    def _mode(self, i: int, mode: str) -> str:
        return "stream" if self.device(i).type == "cuda" else mode

    def _ahead(self, i: int, like: PassingExperts) -> tuple[int, PassingExperts] | None:
        """The experts of layer i, which are being read."""
        if self.ahead is not None and self.ahead[0] == i:
            return self.ahead
        if i == self.source.config.num_hidden_layers or self.device(i) != like.device:
            return None
        slot, stored = partial(self.source.slot, f"layers.{i}.mlp"), partial(self.source.stored, f"layers.{i}.mlp")
        packed = like.count, like.intermediate, slot, like.dtype, like.quantised, like.device
        experts = PassingExperts(*packed, stored=stored)
        experts.stay_with(experts)
        return i, experts

    def _empty(self, i: int, fused: bool) -> Layer:
        with torch.device("meta"):
            return Layer(self.source.config, self.source.config.layer_types[i], fused)


class SharedPart(Handler):
    """Records what the shared expert adds to mlp_output, whether it is unfused or a slot."""

    def __init__(self, experts: int, table: Arithmetic, fused: bool):
        self.slot = experts if fused and table.switch("moe_sum_order") == "expert" else None
        self.value: Tensor | None = None

    @property
    def sees_experts(self) -> bool:
        return self.slot is not None

    def __call__(self, site: Site, x: Tensor) -> None:
        if site.name == "moe_shared_gated" or (site.name == "moe_expert_weighted" and site.index == self.slot):
            self.value = x


@contextmanager
def under(table: Arithmetic, *handlers: Handler, model: Model | None = None) -> Iterator[None]:
    """A context in which values are computed in an arithmetic, its products split as its name says, before handlers.
    model: one that computes in it, too, when it is called."""
    with splitting(table), attach(*handlers):
        if model is None:
            with using(table):
                yield
            return
        before, model.arithmetic = model.arithmetic, table
        try:
            yield
        finally:
            model.arithmetic = before


def drafted(
    rerun: Any, model: Model, stream_BTD: Tensor, table: Arithmetic, fault: Fault, place: FaultSite
) -> dict[str, Tensor]:
    """The values at the draft head's taps, on the engine's own hidden states. stream_BTD: the input of the final
    norm. Empty where the truth has no drafts."""
    device, captured, count, wrong = rerun.device("norm"), rerun.captured, rerun.tokens.count, fault.draft
    if not rerun.tokens.drafts:
        return {}
    tokens, restart = rerun.tokens.on(device), Restart(captured, count)
    mode = "stream" if fault.hand_over is None else "packed"  # a streamed part has no layers until it is called
    part = build_part("mtp", fault.source(rerun.source, place), table, False, device, mode)
    stream_BTD = stream_BTD.to(device)
    with under(table):
        hidden_BTD = model.norm(stream_BTD)
    if "final_norm" in captured:
        hidden_BTD = captured.put("final_norm", hidden_BTD, count)
    hidden_BTD = stream_BTD.to(hidden_BTD.dtype) if wrong.first == "pre-norm" else hidden_BTD
    first, *more = (x.to(device) for x in tokens.drafts)
    first = tokens.ids if wrong.first == "same token" else first
    more = [first] * len(more) if wrong.chained == "first token" else more
    at_BT = (tokens.mask.long().cumsum(1) - 1).clamp_min(0)
    positions = [at_BT + (0 if wrong.chained == "in place" else k) for k in range(len(more) + 1)]

    def hand_on(k: int, right_BTD: Tensor) -> Tensor:
        before = f"mtp.{k}" if k > 1 else "mtp"
        stream = restart.seen.get(f"{before}.layers.0.layer_output_sum", right_BTD)
        return {
            "target's": hidden_BTD,
            "row before": right_BTD.roll(1, 1),
            "pre-norm": stream.to(right_BTD),
        }.get(wrong.chained, right_BTD)

    layer = part.layers[0] if isinstance(part, MTP) else None
    steps = stepped(layer, fault.hand_over, restart, replace(tokens, positions=at_BT), model.config)
    with under(table, *fault.handlers(place), restart, model=model), steps:
        draft_chains(model, part, [first, *more], hidden_BTD, tokens.mask, positions, hand_on)
    return restart.seen
