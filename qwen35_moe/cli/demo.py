"""What `make demo` shows: the model agrees with itself and with transformers, and an engine's known failure is found.

Exit code 0 if all that is claimed held.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import qwen35_moe as q

from ..errors import Qwen35Error, extra
from ..numerics.metrics import TapDistance, compare_traces, distance
from ..oracle.dumps.align import align
from ..weights.build import build

FAILURE = "BF16 shared expert read as FP4"
EXACT_BOUND = 1e-12  # relative L2 of two orders of the same float64 sums; measured 1e-15 on this checkpoint


def by_name(rows: Iterable[TapDistance]) -> dict[str, list[TapDistance]]:
    """The rows of all layers under the tap's name."""
    groups: dict[str, list[TapDistance]] = {}
    for row in rows:
        groups.setdefault(row.key.rpartition(".")[2], []).append(row)
    return groups


def table(rows: Iterable[TapDistance]) -> str:
    """One line a tap: in how many layers, the smallest share of equal elements, the worst distances."""
    lines = [f"  {'tap':<26} {'layers':>6} {'equal':>8} {'max ulp':>8} {'rel. L2':>9}"]
    for name, group in by_name(rows).items():
        share, ulps = min(row.equal_share for row in group), [row.max_ulp for row in group if row.max_ulp is not None]
        equal = "all" if share == 1 else f"{share:.4f}"
        worst = max(row.rel_l2 for row in group)
        lines.append(f"  {name:<26} {len(group):>6} {equal:>8} {max(ulps, default=0):>8} {worst:>9.1e}")
    return "\n".join(lines)


def fused_against_unfused(checkpoint: Path, ids: Tensor) -> bool:
    """The shared expert beside the routed ones, and as slot E of E+1: one function."""
    traces = [q.trace(q.load(checkpoint, "exact", way, text_only=True), ids) for way in ("unfused", "fused")]
    rows = compare_traces(traces[1], {key: x for key, x in traces[0].items() if key in traces[1]})
    names = ("moe_topk_ids", "moe_topk_weights", "moe_shared_gate", "mlp_output", "next_token_logits")
    shown = [row for row in rows if row.key.rpartition(".")[2] in names]
    worst = max(row.rel_l2 for row in rows)
    print(f"\nUnfused against fused shared expert, float64 ({len(rows)} values compared, worst {worst:.1e}):")
    print(table(shown))
    return worst <= EXACT_BOUND


def against_transformers(checkpoint: Path, ids: Tensor) -> bool:
    """transformers in bf16 on the same bytes, captured by hooks, against the table of where it rounds."""
    with extra("hf"):
        from transformers import Qwen3_5MoeForConditionalGeneration, __version__
        from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = Qwen3_5MoeForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ours = q.trace(q.load(checkpoint, "transformers-bf16", "unfused", text_only=True), ids)
    pairs = align(q.capture_transformers(peer, input_ids=ids), ours)
    rows = [distance(pair.key, pair.truth, pair.engine) for pair in pairs if pair.engine is not None]
    equal = sum(row.equal for row in rows)
    print(f"\ntransformers {__version__}, bf16 eager, against arithmetic transformers-bf16:")
    print(table(rows))
    print(f"  {equal} of {len(rows)} values are equal bit for bit")
    return len(rows) > 0 and equal == len(rows)


def planted_failure(checkpoint: Path, out: Path, layer: int = 1) -> bool:
    """SGLang PR 22948 in one layer: the BF16 shared expert copied into the fused slot of MXFP4 experts.

    The engine is our model in SGLang's bf16 arithmetic; its dump has the form of SGLang's dumper. True if the oracle
    names layer, block and cause.
    """
    ids = (torch.arange(32) * 7919 % 251)[None]
    truth = q.write_truth(checkpoint, ids, out / "truth")
    dump = q.play_engine(checkpoint, ids, out / "engine_dump", fault=FAILURE, layer=layer)
    result = q.compare(truth, dump, checkpoint)
    print(f"\nAn engine with the failure of SGLang PR 22948 in layer {layer}, its dump compared with the truth:\n")
    print(q.report(result))
    page = out / "report.html"
    page.write_text(q.report(result, "html", title="An engine with the failure of SGLang PR 22948"), encoding="utf-8")
    print(f"\nThe same as a page: {page.resolve()}")
    said = result.diagnoses[0] if result.diagnoses else None
    return said is not None and (said.layer, said.block, said.name) == (layer, "mlp", FAILURE)


def configure(p: argparse.ArgumentParser) -> None:
    p.description = "Builds tiny checkpoints, compares the model with transformers, and finds a planted fault."
    p.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for checkpoints and report")


def run(args: argparse.Namespace) -> int:
    out = args.out
    checkpoint = out / "tiny"
    if not checkpoint.exists():
        build("tiny", checkpoint)
    print(f"{checkpoint}: a tiny Qwen3.5 MoE, {sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e6:.1f} MB")
    packed = out / "tiny-mxfp4"
    if not packed.exists():
        build("tiny-mxfp4", packed)
    ids = (torch.arange(2 * 33) * 7919 % 251).view(2, 33)
    claims = {"unfused and fused are one function": fused_against_unfused(checkpoint, ids)}
    try:
        claims["transformers' bf16 is reproduced bit for bit"] = against_transformers(checkpoint, ids)
    except Qwen35Error as error:  # it is not installed
        print(f"\nNot compared with transformers: {error}")
    claims["an engine's failure is found, and named"] = planted_failure(packed, out / "oracle")
    print()
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    return 0 if all(claims.values()) else 1
