"""The oracle's own test: every fault of the catalogue is planted in a run that plays the engine, and must be found.

A run in an engine's arithmetic stands for the engine; its taps are what a dump of SGLang's hooks holds. Faults are
planted in one layer, and must be found there, in the right block, and be named by the diagnosis. Clean variants, which
round and add in other legal ways, must pass; the arithmetic that made a run is left out of its envelope.

Faults hide where their part is small: so there are regimes with the shared gate as it is (near 0.5), with the gate near
0.05, and with all outputs of experts 256 times smaller. In others the dump has an engine's own shape (`shapes.py`), or
the engine ran in steps (`stepped.py`), where faults between steps are planted, too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracle_score import stepped
from benchmarks.oracle_score.score import Outcome
from benchmarks.oracle_score.shapes import as_files
from benchmarks.oracle_score.stepped import LEGAL_STEPS, Handlers, Planted, Step, plan
from benchmarks.oracle_score.stepped import REGIMES as STEPS
from benchmarks.oracle_score.variants import SMALL, UNLISTED, UNSEEN, Variant, variants
from qwen35_moe.model.cache import Cache
from qwen35_moe.model.text import Model
from qwen35_moe.numerics import arithmetics
from qwen35_moe.numerics.choices import KV, with_choices
from qwen35_moe.numerics.tables import A8, AITER, SGLANG_BF16
from qwen35_moe.numerics.tap_table import TAPS
from qwen35_moe.numerics.taps import REPLAY, Handler, Site, attach
from qwen35_moe.oracle.compare import compare
from qwen35_moe.oracle.diagnose.catalogue import FAULTS
from qwen35_moe.oracle.diagnose.faults import Fault, FaultSite
from qwen35_moe.oracle.diagnose.step_faults import STEP_FAULTS, StepFault
from qwen35_moe.oracle.dumps.dump import Dump, Piece
from qwen35_moe.oracle.dumps.readers.own import from_trace
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.envelope import legal
from qwen35_moe.oracle.judge.envelope_file import write_envelope
from qwen35_moe.oracle.judge.records import Comparison
from qwen35_moe.oracle.judge.rerun import CPU
from qwen35_moe.run.load import build
from qwen35_moe.run.prompt import padded
from qwen35_moe.run.source import WeightSource
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import trace

# All that hooks on SGLang's modules see. What FP8 does to inputs on the way through a block hides more than bf16 does.
HOOKED = ",".join(name for name, tap in TAPS.items() if tap.sglang or name in DUMPED.split(","))
UNFUSED = {"moe_shared_act"}  # a fused shared expert has no such tap
ALL = slice(None)
Found = tuple[list[Outcome], list[Outcome], list[Outcome]]
IN_STEPS = ("undeclared FP8 KV cache",)  # faults of later steps, which one pass cannot have
LISTS = ("unfused lists", "fused lists")
REGIMES = ("gate 0.5", "gate 0.05", "outputs / 256", *LISTS, *STEPS)


class Regime(Handler):
    """Moves the model, truth and engine alike, to where faults of a kind are small."""

    stage = REPLAY

    def __init__(self, name: str):
        self.name = name

    def __call__(self, site: Site, x: Tensor) -> Tensor | None:
        if self.name == "gate 0.05" and site.name == "moe_shared_gate_logit":
            return x - 3
        if self.name == "outputs / 256" and site.name in ("moe_expert_down", "moe_shared_output"):
            return x / 256
        return None


class Bench:
    """One checkpoint in one regime: the truth, once, and engines to compare with it."""

    def __init__(self, source: WeightSource, regime: str, ids: Tensor, function: str = ""):
        self.source, self.regime, self.ids, self.function = source, regime, ids, function
        if regime in STEPS:
            self.ids = torch.cat((ids, ids.flip(1)))  # what one sequence leaves behind may go to the other
        self.handler: Handler = Regime(regime)
        self.exact = arithmetics.get("exact" + function)
        self.taps = HOOKED if function in A8 or regime in LISTS else DUMPED
        self.table = AITER if function.startswith("+a4") else arithmetics.get(SGLANG_BF16.name + function)
        self.unfused = [False] * source.config.num_hidden_layers
        self.folder: TemporaryDirectory[str] | None = None  # where the last dump lies
        self.steps = plan(regime, ids.shape[1]) if regime in STEPS else [Step(0, ids.shape[1])]
        with attach(self.handler):
            self.truth = self._truth(*padded(self.steps[0].real(self.ids)))

    def _truth(self, ids: Tensor, mask: Tensor | None = None) -> Trace:
        models = (build(self.source, t, self.unfused, CPU, "decoded") for t in legal(self.exact.name))
        truth = trace(
            build(self.source, self.exact, self.unfused, CPU, "decoded"), ids, taps=self.taps, attention_mask=mask
        )
        write_envelope(truth, models)
        return truth

    def layer_of(self, fault: Fault) -> int | None:
        """Where to plant: the last layer of the kind that the fault strikes, or the second. The format of a cache is
        wrong in all layers, and so in the first of their kind."""
        kinds = self.source.config.layer_types
        if self.in_cache(fault):
            return kinds.index("full_attention")
        if fault.block in ("final_norm", "mtp"):
            return None
        if fault.block in ("attn", "gdn"):
            wanted = "full_attention" if fault.block == "attn" else "linear_attention"
            return max(i for i, kind in enumerate(kinds) if kind == wanted)
        return 1

    def in_cache(self, fault: Fault) -> bool:
        """Whether it is in what a step reads of those before, which no handler of its own taps sees."""
        return self.regime in STEPS and fault.name.startswith(IN_STEPS)

    def place(self, layer: int | None, positions: Tensor) -> FaultSite:
        busy = int(self.truth[f"layers.{layer or 0}.moe_topk_ids"].flatten().bincount().argmax())
        return FaultSite(self.source.config, positions, None if layer is None else frozenset({layer}), busy)

    def engine(self, fault: Fault) -> Dump:
        """A dump of the engine with this fault."""
        layer = self.layer_of(fault)
        place = self.place(layer, self.truth.positions)
        source, table = fault.source(self.source, place), fault.arithmetic(self.table)
        table = with_choices(table, KV) if self.in_cache(fault) else table
        fused = [self.regime == "fused lists" or (fault.fused and i == layer) for i in range(len(self.unfused))]
        with attach(self.handler):
            model = build(source, table, fused, CPU, "decoded")
            dump = self.run(model, lambda at: () if self.in_cache(fault) else fault.handlers(self.place(layer, at)))
        if fault.weights:
            dump.weights = _parameters(source, fault, layer)
        return dump

    def run(self, model: Model, handlers: Handlers = lambda _: (), planted: Planted | None = None) -> Dump:
        """What the engine dumps in this regime."""
        if self.regime in STEPS:
            meta = {"config": self.truth.meta["config"]}
            return stepped.run(model, self.ids, self.steps, self.taps, meta, handlers, planted)
        run = trace(model, self.ids, taps=self.taps, replay=handlers(self.truth.positions))
        if self.regime not in LISTS:
            return from_trace(run)
        if self.folder is not None:
            self.folder.cleanup()
        self.folder = TemporaryDirectory()
        return as_files(run, Path(self.folder.name) / "dump", self.regime == "fused lists")

    def compare(self, dump: Dump, **options: Any) -> Comparison:
        with attach(self.handler):
            return compare(self.truth, dump, self.source, fused=self.regime == "fused lists", **options)

    def planted(self, fault: Fault) -> Outcome:
        layer = self.layer_of(fault)
        result = self.compare(self.engine(fault), diagnoses=1)
        if fault.weights:
            bad = [w for w in result.weights if w.bad]
            return Outcome(self.regime, fault.name, fault.block, layer, 0.0, bool(bad) and result.exit_code == 1,
                           "weights: " + "; ".join(f"{w.name} {w.detail}" for w in bad[:1]), fault.name)  # fmt: skip
        return self.outcome(result, fault, layer)

    def between_steps(self, fault: StepFault, seed: object = 0) -> Outcome | None:
        """A fault of what one step hands to the next, at a place that is drawn; None: this regime has no such place."""
        kind = "full_attention" if fault.block == "attn" else "linear_attention"
        layers = [i for i, other in enumerate(self.source.config.layer_types) if other == kind]
        planted = Planted.drawn(fault, self.steps, layers, (seed, self.regime))
        if planted is None:
            return None
        with attach(self.handler):
            model = build(self.source, self.table, self.unfused, CPU, "decoded")
            dump = self.run(model, planted=planted)
        found = self.outcome(self.compare(dump, diagnoses=1), fault, planted.layer)
        return replace(found, right=planted.names(self.steps))

    def outcome(self, result: Comparison, fault: Fault | StepFault, layer: int | None) -> Outcome:
        """Found: the first tap that is wrong is of the layer and block that were struck."""
        first = result.first
        found = first is not None and first.layer == layer and first.block == fault.block and result.exit_code == 1
        where = "not found" if first is None else f"{first.layer} {first.block}"
        said = result.diagnoses[0] if result.diagnoses else None
        shares = [h.explains for h in said.hypotheses[:2]] if said else []
        struck = [r.ratio or 0.0 for r in result.records if (r.layer, r.block) == (layer, fault.block)]
        return Outcome(self.regime, fault.name, fault.block, layer, max(struck, default=0.0), found, where,
                       said.name if said else "-", *shares)  # fmt: skip

    def clean(self, variant: Variant) -> Outcome:
        truth, ids, mask = self.truth, self.ids, None
        fused = [variant.fused or self.regime == "fused lists"] * len(self.unfused)
        with attach(self.handler), variant.products():
            model = build(self.source, variant.table, fused, CPU, "decoded")
            if variant.batch:
                half = ids.shape[1] // 2
                ids = torch.cat((ids, torch.cat((torch.zeros_like(ids[:, :half]), ids[:, half:]), 1)))
                mask = torch.ones_like(ids)
                mask[1, :half] = 0
            if variant.batch or variant.chunks:
                cache = Cache() if variant.chunks else None
                chunks = {"chunks": variant.chunks, "cache": cache}
                dump = from_trace(trace(model, ids, taps=self.taps, attention_mask=mask, **chunks))
            else:
                dump = self.run(model)
        if variant.batch:
            with attach(self.handler):
                truth = self._truth(ids, mask)
        members = [m for m in legal(self.exact.name) if m.name != variant.left_out]
        with attach(self.handler):
            result = compare(truth, dump, self.source, fused=fused[0], diagnoses=0, members=members)
        worst = max((r for r in result.records if r.added is not None), key=lambda r: r.added or 0)
        cached = self.regime == "prefix" and result.exit_code == 2  # rows after cached tokens may have no verdict
        return Outcome(self.regime, variant.name, worst.block, worst.layer, worst.added or 0.0,
                       result.exit_code == 0 or cached, worst.key, "")  # fmt: skip


def _fusable(source: WeightSource) -> bool:
    """Whether the shared expert is stored as the routed ones are, and may be a slot among them."""
    c, mlps = source.config, [f"layers.{i}.mlp" for i in range(source.config.num_hidden_layers)]
    alike = (source.spec(f"{m}.experts").kind == source.spec(f"{m}.shared_expert.gate_proj").kind for m in mlps)
    return c.shared_expert_intermediate_size == c.moe_intermediate_size and all(alike)


def _square(source: WeightSource) -> bool:
    return source.config.linear_key_head_dim == source.config.linear_value_head_dim


def _parameters(source: WeightSource, fault: Fault, layer: int | None) -> dict[str, Piece]:
    """The parameters of the struck module as the engine holds them."""
    if fault.block == "mtp":
        names = [f"mtp.layers.0.mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")]
        values = {f"{n}.weight": source.weight(n).decode(torch.bfloat16) for n in names}
    else:
        names = [f"layers.{layer}.linear_attn.{n}" for n in ("A_log", "dt_bias")]
        values = {n: source.tensor(n) for n in names}
    return {f"{n}@0": Piece(n, partial(values.__getitem__, n)) for n in values}


def run(source: WeightSource, ids: Tensor, regime: str, function: str = "", share: slice = ALL) -> Found:
    """(faults planted, faults that the catalogue lacks, clean variants) in a regime; of each kind a share."""
    found: Found = ([], [], [])
    if regime == "fused lists" and not _fusable(source):
        return found
    bench, a4 = Bench(source, regime, ids, function), function.startswith("+a4")
    # Activations in four or eight bits err by more than the small ones: what they hide is no fault of the oracle.
    faults = [f for f in FAULTS if f.name not in IN_STEPS] + ([] if function else [*SMALL])
    for outcomes, kind in zip(found, (faults, [*UNLISTED, *UNSEEN]), strict=False):
        can = [f for f in kind if f.applies(source, bench.layer_of(f) or 0, a4)]
        if regime in LISTS:  # SGLang's hooks do not see the state
            can = [f for f in can if f.name != "state in bf16"]
        if regime == "fused lists":
            can = [f for f in can if not f.taps or not UNFUSED.issuperset(f.taps)]
        outcomes += map(bench.planted, can[share])
    if regime in STEPS:
        can = [f for f in STEP_FAULTS if f.name not in LEGAL_STEPS and (f.needs != "square" or _square(source))]
        found[0].extend(o for o in map(bench.between_steps, can[share]) if o is not None)
    clean = variants(function, ids.shape[1], _fusable(source))
    if regime in (*LISTS, *STEPS):  # these have a shape, or steps, of their own
        clean = [v for v in clean if not (v.batch or v.chunks or v.fused)]
    if regime == "padded":  # transformers lets its state fade over padding inside of a run: another function
        clean = [v for v in clean if v.table.switch("gdn_padding") == "still"]
    found[2].extend(map(bench.clean, clean[share]))
    return found
