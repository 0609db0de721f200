"""The records of a comparison. Text, JSONL and HTML are views of them; there is one verdict and one exit code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from ...errors import Qwen35Error
from ...numerics.tap_keys import base_name
from .diagnosis import Diagnosis, Weight
from .envelope import LIMIT, Class, class_of
from .routing import Routing

POSITIONS = "positions"
BAD = ("suspicious", "wrong")
CLASSES: tuple[Class, ...] = get_args(Class)
_BLOCKS = (
    (r"vis_(pixels|patch)", "vision patches"),
    (r"vis_(pos|embed|rope|layer_input)", "vision positions"),
    (r"vis_(norm1|qkv|q|k|v|attn_\w+)$", "vision attn"),
    (r"vis_(norm2|mlp_\w+|layer_output)$", "vision mlp"),
    (r"vis_|image_embeds", "vision merger"),
    (r"inputs_embeds", "images"),
    (r"embed_tokens", "embedding"),
    (r"final_norm", "final_norm"),
    (r"next_token_logits|next_token_logprobs", "head"),
    (r"input_layernorm", "input_layernorm"),
    (r"pre_mlp_layernorm_output", "post_attention_layernorm"),
    (r"layer_input|layer_output_sum|pre_mlp_residual", "stream"),
    (r"moe_|mlp_output", "mlp"),
    (r"gdn_", "gdn"),
    (r"attn_|rope_", "attn"),
)

# A state that is rounded at every token errs no more than roundings of its inputs, for hundreds of tokens. Its digits
# show it at once.
BF16_GRID = "all its values are bf16, where every legal arithmetic keeps more digits"


def block_of(key: str, kind: str = "") -> str:
    """The block that computes a tap. `kind` ("gdn" or "attn") tells whose attn_output it is."""
    if key.startswith("mtp."):
        return "mtp"
    name, tower = base_name(key), re.match(r"visual\.layers\.(\d+)", key)
    block = next((b for pattern, b in _BLOCKS if re.match(pattern, name)), "other")
    if tower is not None and name != "vis_layer_input":
        return block.replace("vision", f"vision layer {tower[1]},")
    return kind if name == "attn_output" and kind else block


BlockId = tuple[int | None, str]  # layer and block


def layer_of(key: str) -> int | None:
    found = re.match(r"layers\.(\d+)\.", key)
    return int(found[1]) if found else None


@dataclass
class Record:
    """One tap. Ratios are in units of the legal error: `added` on the engine's input, `inherited` against the truth.

    `layer` is the layer that computed the tap (layer 2 for `layers.3.layer_input`), or the key's layer if nothing was
    rerun. `suspects` of a bad tap that was rerun are all blocks since the engine's own values, the tap's own block
    among them. `worst` is (sequence, token). `starts` says where the bad rows of each sequence begin: (sequence, token,
    what this token is the first of, such as "first of a step", or "").
    """

    key: str
    cls: Class
    block: str
    layer: int | None
    added: float | None = None
    inherited: float | None = None
    inherited_rel: float | None = None
    rel: float = 0.0
    worst: tuple[int, int] | None = None
    rows: int = 0
    bad_rows: int = 0
    excluded: int = 0
    nan: int = 0
    where: str = ""  # in which columns
    equal_to: str = ""
    note: str = ""
    suspects: list[BlockId] = field(default_factory=list)
    starts: list[tuple[int, int, str]] = field(default_factory=list)
    by_rows: float = 0.0  # the ratio by rows, where `added` may be that of a constant factor

    @property
    def bad(self) -> bool:
        return self.cls in BAD

    @property
    def ratio(self) -> float | None:
        """The ratio that decides: that of the added error, if it is known."""
        return self.inherited if self.added is None else self.added

    def exceed(self, ratio: float, note: str, limit: float) -> None:
        """Take another statistic's ratio and note, if it is beyond the limit and beyond the ratio known so far."""
        if ratio > max(limit, self.ratio or 0.0):
            self.cls, self.note = class_of(ratio, limit), note
            if self.added is None:
                self.inherited = ratio
            else:
                self.added = ratio


@dataclass
class Comparison:
    """All that is known of a dump. `summary` adds up: every tap of the truth has exactly one class."""

    records: list[Record] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)  # taps of the dump that the truth was not traced at
    unknown: list[str] = field(default_factory=list)  # names of the dump that are no tap's
    holes: list[str] = field(default_factory=list)  # taps that the dump has for other layers or steps
    routing: list[Routing] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)
    acceptance: list[Any] = field(default_factory=list)  # of drafts, one a draft of a chain
    logits: Any = None
    problems: list[Qwen35Error] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    limit: float = LIMIT
    truth: str = ""
    engine: str = ""
    members: tuple[str, ...] = ()
    tokens: tuple[int, int] = (0, 0)
    layers: tuple[str, ...] = ()  # kinds
    absent: list[str] = field(default_factory=list)  # parts of the truth that the dump does not hold, in words
    checkpoint: str = ""  # where it was, and hashes of its headers and bytes
    partial: bool = False  # whether a dump of some tokens may agree

    @property
    def summary(self) -> dict[str, int]:
        counts = Counter(record.cls for record in self.records)
        return {cls: counts[cls] for cls in CLASSES} | {"total": len(self.records)}

    @property
    def compared(self) -> int:
        counts = self.summary
        return counts["total"] - counts["missing"] - counts["not comparable"]

    @property
    def first(self) -> Record | None:
        """The first tap, in order of execution, whose added error is too large; else the first whose inherited error
        is."""
        bad = [record for record in self.records if record.bad]
        own = [record for record in bad if record.added is not None and record.added > self.limit]
        return next(iter(own or bad), None)

    @property
    def diverges(self) -> bool:
        illegal = any(r.illegal or r.nonsense for r in self.routing)
        return any(r.bad for r in self.records) or illegal or any(w.bad for w in self.weights)

    @property
    def incomplete(self) -> list[str]:
        """What could not be compared, in words."""
        counts = {"taps not comparable": self.summary["not comparable"],
                  "taps dumped for other layers or steps only": len(self.holes),
                  "problems": len(self.problems)}  # fmt: skip
        figures = [(r.key, x) for r in self.records for x in (r.added, r.inherited, r.rel)]
        said = {} if self.logits is None else asdict(self.logits)
        figures += [("logits", x) for x in said.values() if isinstance(x, float)]
        unsaid = [f"figures of {key} are NaN" for key, x in figures if x is not None and x != x]
        return [f"{count} {what}" for what, count in counts.items() if count] + unsaid[:1]

    @property
    def exit_code(self) -> int:
        """0: all of it agrees; 1: something diverges; 2: something could not be compared."""
        if self.diverges:
            return 1
        return 2 if self.incomplete or not self.compared or (self.absent and not self.partial) else 0

    @property
    def verdict(self) -> str:
        record = self.first
        if self.diverges and record is None:
            wrong = next((w for w in self.weights if w.bad), None)
            return f"DIVERGES: weight {wrong.name}" if wrong else "DIVERGES: routing"
        if record is not None:
            if record.key == POSITIONS:
                return f"DIVERGES: first at positions: {record.note}"
            places = record.suspects or [(record.layer, record.block)]
            tap, where = f"tap {record.key}, {ratio_text(record.ratio)} x the legal error", span(places)
            if len(places) == 1:
                return f"DIVERGES: first at {where}, {tap}"
            return f"DIVERGES: first seen at {tap}; made somewhere in {where}"
        if not self.compared:
            return "NOT COMPARED: no tap of the dump could be compared"
        some = f" on {self.tokens[0]} of {self.tokens[1]} tokens" if self.absent else ""
        if self.incomplete:
            return f"INCOMPLETE: {', '.join(self.incomplete)}; {self.compared} taps agree{some}"
        strange = f"; {len(self.unknown)} names of the dump are unknown" if len(self.unknown) > self.compared else ""
        agrees = f"AGREES{some}: {self.compared} taps within rounding{strange}"
        return agrees if self.exit_code == 0 else f"{agrees}; not compared: {', '.join(self.absent)}"

    def rows(self) -> list[dict[str, Any]]:
        """Everything as plain dicts, one a line of the JSONL report."""
        routing = [
            {"layer": r.layer, "tokens": r.tokens, "agree": r.agree, "legal_flips": len(r.flips) - len(r.illegal),
             "illegal_flips": len(r.illegal), "nonsense": r.nonsense, "flips": [asdict(f) for f in r.flips]}
            for r in self.routing
        ]  # fmt: skip
        run = {"truth": self.truth, "engine": self.engine, "limit": self.limit, "envelope": list(self.members),
               "tokens": list(self.tokens), "absent": self.absent, "partial": self.partial}  # fmt: skip
        end = {**self.summary, "extra": len(self.extra), "verdict": self.verdict, "exit_code": self.exit_code}
        lines: dict[str, list[dict[str, Any]]] = {
            "run": [run],
            "tap": [asdict(r) for r in self.records],
            "extra": [{"key": key} for key in self.extra],
            "unknown name": [{"key": key} for key in self.unknown],
            "hole": [{"key": key} for key in self.holes],
            "routing": routing,
            "weight": [asdict(w) for w in self.weights],
            "diagnosis": [{"text": str(d), "name": d.name, **asdict(d)} for d in self.diagnoses],
            "acceptance": [asdict(a) for a in self.acceptance],
            "logits": [] if self.logits is None else [asdict(self.logits)],
            "problem": [{"text": str(p)} for p in self.problems],
            "note": [{"text": note} for note in self.notes],
            "summary": [end],
        }
        return [{"type": kind, **line} for kind, some in lines.items() for line in some]


def span(places: Sequence[BlockId]) -> str:
    """The first and the last of some blocks.

    >>> span([(0, "gdn"), (0, "mlp"), (1, "gdn")])
    'layer 0, gdn, to layer 1, gdn'
    """
    (layer, _), (last, end) = places[0], places[-1]
    first, other = (b if i is None else f"layer {i}, {b}" for i, b in (places[0], places[-1]))
    return first if len(places) == 1 else f"{first} to {end}" if layer == last else f"{first}, to {other}"


def ratio_text(ratio: float | None) -> str:
    """A ratio in at most five characters."""
    if ratio is None:
        return "-"
    if ratio != ratio or ratio == float("inf"):
        return "inf"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}" if ratio < 1e5 else f"{ratio:.0e}".replace("e+0", "e")
