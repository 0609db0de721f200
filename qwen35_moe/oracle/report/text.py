"""A comparison as text that fits a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from ...numerics.tap_keys import base_name
from ..judge.records import CLASSES, Comparison, Record, layer_of, ratio_text

SYMBOLS = {"bit-equal": "=", "within rounding": ".", "suspicious": "?", "wrong": "X", "not comparable": "!"}
SHORT_NAMES = {
    "embed_tokens": "embed", "layer_input": "input", "input_layernorm": "norm1", "attn_output": "mixer",
    "pre_mlp_residual": "resid", "pre_mlp_layernorm_output": "norm2", "moe_router_logits": "router",
    "moe_topk_ids": "ids", "moe_topk_weights": "weight", "mlp_output": "mlp", "layer_output_sum": "output",
    "moe_shared_output": "shared", "moe_shared_gated": "sh.gtd", "moe_shared_gate": "shgate",
    "moe_routed_output": "routed", "moe_slot_ids": "slots", "moe_slot_weights": "sl.wgt",
    "inputs_embeds": "inputs",
    "gdn_state": "state", "gdn_core_out": "core", "final_norm": "norm", "next_token_logits": "logits",
}  # fmt: skip

QUIET = 8  # so many layers without an error, or more, share a row
GOOD_FIT = 0.2  # a fit that leaves more of the error is not shown


def short(tap: str) -> str:
    return SHORT_NAMES.get(tap, tap.removeprefix("moe_").removeprefix("gdn_"))


def _outside(records: Iterable[Record]) -> Iterable[tuple[str, str]]:
    """(label, text) of taps outside of the layers. Those of the tower, or of a draft head, that agree share a line."""
    for part, some in groupby(records, key=lambda r: r.key.split(".")[0] if "." in r.key else ""):
        found = list(some)
        if fine := [r for r in found if part and r.cls in ("bit-equal", "within rounding")]:
            yield part, f"{len(fine)} taps within rounding, at most {ratio_text(max(r.ratio or 0.0 for r in fine))} x"
        for r in found:
            ratios = (("added", r.added), ("inherited", r.inherited))
            said = ", ".join([r.cls, *(f"{ratio_text(ratio)} x {kind}" for kind, ratio in ratios if ratio is not None)])
            said += f" ({r.note})" if r.note else ""
            if r not in fine:
                yield (part, f"{r.key.partition('.')[2]}: {said}") if part else (short(r.key), said)


def grid(result: Comparison) -> tuple[list[int], list[str], dict[tuple[int, str], Record]]:
    """Rows, columns and cells of the table of errors: layers, names of taps, and their records. `layer_input` stands
    with the layer that reads it."""
    held = [(layer_of(r.key), r) for r in result.records if r.cls != "missing"]
    cells = {(layer, base_name(r.key)): r for layer, r in held if layer is not None}
    layers = sorted({layer for layer, _ in cells})
    order = {base_name(r.key): i for i, r in reversed(list(enumerate(result.records)))}
    return layers, sorted({tap for _, tap in cells}, key=order.__getitem__), cells


def worst(first: Record) -> str:
    """The worst row of a tap, and how many rows are bad."""
    where = f"worst row: {row_text(first)}; " if first.worst else ""
    columns = f", {first.where}" if first.where else ""
    many = f"{first.bad_rows} of {first.rows} rows beyond the limit"
    return f"{starts(first)}{where}{many}{columns}; relative error {first.rel:.2g}"


def row_text(record: Record) -> str:
    """The worst row: a token of a sequence, or a patch of the images."""
    row, token = record.worst or (0, 0)
    return f"patch {row}" if record.key.startswith("visual.") else f"sequence {row}, token {token}"


def starts(record: Record) -> str:
    """Where in each sequence a tap's bad rows begin."""
    found = [f"sequence {b}, token {t}" + (f" ({of})" if of else "") for b, t, of in record.starts]
    more = f" and in {len(found) - 3} other sequences" if len(found) > 3 else ""
    return f"first bad row: {', '.join(found[:3])}{more}; " if found else ""


def facts(result: Comparison, most: int = 10) -> list[tuple[str, str]]:
    """(label, text) of all but the verdict and the errors of taps. most: names that are shown of each kind."""

    def some(keys: Sequence[str], what: str = "") -> str:
        folded = fold(keys)
        return f"{len(keys)}{what}: {', '.join(folded[:most])}{', ...' if len(folded) > most else ''}"

    found = []
    if result.routing:
        counts = ((r.tokens, r.agree, len(r.flips), len(r.illegal), r.nonsense) for r in result.routing)
        total, agree, flips, illegal, nonsense = map(sum, zip(*counts, strict=True))
        more = f", {nonsense} with ids that are repeated or no expert's" if nonsense else ""
        agreed = f"{agree} of {total} sets of experts agree"
        found.append(("routing", f"{agreed}; {flips - illegal} legal flips, {illegal} illegal{more}"))
    found += [("" if i else "drafts", str(said)) for i, said in enumerate(result.acceptance)]
    if (x := result.logits) is not None:
        legal = "" if x.legal_flips is None or not x.flips else f" ({x.legal_flips} of {x.flips} flips within noise)"
        kl = f"KL mean {x.kl_mean:.2g}, max {x.kl_max:.2g}"
        best = f"top-1 {100 * x.top1:.1f} %{legal}, top-5 {100 * x.top5:.1f} %"
        found.append(("logits", f"{kl}; {best}; delta log p rms {x.delta_log_p_rms:.2g}"))
    if result.weights:
        good, wrong = sum(w.good for w in result.weights), [w for w in result.weights if w.bad]
        rest = len(result.weights) - good - len(wrong)
        others = f"; {rest} not compared (one rank's shares, or not in the checkpoint)" if rest else ""
        of = f"{good} of {len(result.weights)} as the checkpoint has them"
        found.append(("weights", f"{of}, {len(wrong)} wrong{others}"))
        found += [("", f"X {w.name}: {w.detail}") for w in wrong[:most]]
    *classes, (_, total) = result.summary.items()
    found.append(("taps", f"{', '.join(f'{n} {c}' for c, n in classes if n)}: {total} in all"))
    missing = [r.key for r in result.records if r.cls == "missing"]
    for label, what, keys in (("missing", "not in the dump", missing), ("extra", "in the dump only", result.extra),
                              ("unknown", "names that no reader knows", result.unknown),
                              ("holes", "dumped for other layers or steps only", result.holes)):  # fmt: skip
        found += [(label, some(keys, f" {what}"))] if keys else []
    if nan := [f"{r.key} ({r.nan} rows)" for r in result.records if r.nan]:
        found.append(("NaN in", some(nan)))
    broken: dict[str, list[str]] = {}
    for r in [r for r in result.records if r.cls == "not comparable"]:
        broken.setdefault(" ".join(r.note.split()), []).append(r.key)
    found += [("broken", f"{some(keys)}: {reason}") for reason, keys in broken.items()]
    found += [("problem", " ".join(str(problem).split())) for problem in result.problems]
    return found + [("note", note) for note in result.notes]


def text(result: Comparison, width: int = 80) -> str:
    """The whole report; no line is longer than `width`."""
    lines: list[str] = []

    def say(label: str, value: str) -> None:
        lines.extend(textwrap.wrap(f"{label[:8]:<9}{value}", width, subsequent_indent=" " * 9) or [""])

    def indented(value: str) -> None:
        lines.extend(textwrap.wrap(value, width, initial_indent="  ", subsequent_indent="  "))

    say("truth", result.truth)
    say("engine", f"{result.engine}; {result.tokens[0]} of {result.tokens[1]} tokens")
    say("limit", f"{result.limit:g} x the largest error of {', '.join(result.members)}, or of one rounding")
    lines += ["", *textwrap.wrap(result.verdict, width)]
    if result.first:
        indented(worst(result.first))
    for d in result.diagnoses:
        lines += ["", *textwrap.wrap(str(d), width, subsequent_indent="  ")]
        if d.fit and d.fit_left < GOOD_FIT:
            a, b, c = d.fit
            left = f"{100 * d.fit_left:.2g} % left"
            indented(f"fit: {a:.3f} routed + {b:.3f} gated shared + {c:.3f} ungated shared, {left}")
    lines += ["", *_heat(result, width)]
    for name, told in _outside([r for r in result.records if not r.key.startswith("layers.") and r.cls != "missing"]):
        say(name, told)
    lines.append("")
    for label, told in facts(result):
        say(label, told)
    return "\n".join(line[:width] for line in lines)


def fold(keys: Iterable[str]) -> list[str]:
    """One name for a tap of many layers: `layers.*.gdn_q (3)`."""
    found: dict[str, list[str]] = {}
    for key in keys:
        name = f"layers.*.{base_name(key)}" if key.startswith("layers.") else re.sub(r"layers\.\d+\.", "layers.*.", key)
        found.setdefault(name, []).append(key)
    return [all_[0] if len(all_) == 1 else f"{name} ({len(all_)})" for name, all_ in found.items()]


def _heat(result: Comparison, width: int) -> list[str]:
    layers, taps, cells = grid(result)
    if not layers:
        return []
    legend = ("error of each tap, in units of the legal error: = bit-equal to the rounded truth, . within rounding, "
              "? suspicious, X wrong, ! not comparable; > marks the first divergence")  # fmt: skip
    lines = textwrap.wrap(legend, width)
    rows = _quiet_as_one(layers, cells)
    if len(rows) < len(layers):
        lines += ["a range of layers in which nothing is wrong shows its largest error"]
    for part in _parts(taps, max(1, (width - 9) // 8), result.first):
        lines += ["", *_head([short(t).split("_") for t in part])]
        for row in rows:
            kind = result.layers[row[0]] if row[0] < len(result.layers) else ""
            label = f"{row[0]:>3} {kind}" if len(row) == 1 else f"{row[0]:>3}-{row[-1]}"
            line = "".join(_cell(_largest(cells, row, tap), result.first) for tap in part)
            lines.append(f"{label:<9}{line}".rstrip())
    return [*lines, ""]


def _parts(taps: list[str], room: int, first: Record | None) -> list[list[str]]:
    """The columns, cut into tables of `room`: the first table has the first divergence and what runs before it."""
    names = [base_name(first.key)] if first and first.key.startswith("layers.") else []
    end = max([taps.index(name) + 1 for name in names if name in taps] + [room])
    shown, rest = taps[max(0, end - room) : end], taps[: max(0, end - room)] + taps[end:]
    return [shown, *(rest[i : i + room] for i in range(0, len(rest), room))]


def _quiet_as_one(layers: Sequence[int], cells: Mapping[tuple[int, str], Record]) -> list[list[int]]:
    """The layers of each row: one; or QUIET and more that are fine, as are the layers next to each."""
    loud = {layer for (layer, _), r in cells.items() if r.cls not in ("bit-equal", "within rounding")}
    rows: list[list[int]] = []
    for near, run in groupby(layers, key=lambda i: not loud.isdisjoint((i - 1, i, i + 1))):
        some = list(run)
        rows += [[i] for i in some] if near or len(some) < QUIET else [some]
    return rows


def _largest(cells: Mapping[tuple[int, str], Record], row: Sequence[int], tap: str) -> Record | None:
    found = [cells[i, tap] for i in row if (i, tap) in cells]
    return max(found, key=lambda r: (CLASSES.index(r.cls), r.ratio or 0.0), default=None)


def _head(names: list[list[str]]) -> list[str]:
    """Names of columns, a word a line, the last ones beside "layer"."""
    depth = max(map(len, names))
    words = [[""] * (depth - len(name)) + name for name in names]
    lines = ["".join(f"{name[i][:7]:>7} " for name in words) for i in range(depth)]
    return [*(f"{'':9}{line}".rstrip() for line in lines[:-1]), f"layer    {lines[-1]}".rstrip()]


def _cell(record: Record | None, first: Record | None) -> str:
    if record is None:
        return " " * 8
    mark = ">" if record is first else " "
    return f"{mark}{ratio_text(record.ratio):>6}{SYMBOLS[record.cls]}"
