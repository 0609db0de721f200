"""The bugs that are planted in running engines: what each is, and what the oracle should say of it.

How a bug gets into an engine is the engine's file's matter (`sglang_bugs.py`, `transformers_bugs.py`); the names are
the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass

GDN, ATTN = 1, 3  # the layers that bugs are planted in: a Gated DeltaNet and the attention of `engine-size`
CLEAN = "clean"


@dataclass(frozen=True)
class Bug:
    """layer and block where the oracle should find it (None: outside of the layers), and the catalogue's name for it.
    An empty name: the catalogue has none, so the answer is "unknown". A name may go on: with which expert or step; * is
    which experts these are."""

    layer: int | None
    block: str
    called: str = ""


BUGS: dict[str, Bug] = {
    "shared-dropped": Bug(GDN, "mlp", "shared expert dropped"),
    "shared-twice": Bug(GDN, "mlp", "shared expert counted twice"),
    "shared-times-0.4": Bug(GDN, "mlp", "shared expert times 1/routed_scaling_factor"),
    "shared-gate-ignored": Bug(GDN, "mlp", "shared gate ignored"),
    "no-renormalisation": Bug(GDN, "mlp", "routing weights not renormalised"),
    "last-expert-dropped": Bug(GDN, "mlp", "last chosen expert dropped"),
    "routed-times-2.5": Bug(GDN, "mlp", "routed experts times 2.5"),
    "experts-swapped": Bug(GDN, "mlp", "experts 0 and 1 swapped"),
    "experts-shifted": Bug(GDN, "mlp", "experts shifted by one"),
    "expert-zero": Bug(GDN, "mlp", "one expert's slot is zero"),
    "gate-up-swapped": Bug(GDN, "mlp", "gate and up swapped"),
    "half-intermediate": Bug(GDN, "mlp", "half of the intermediate missing"),
    "nan": Bug(GDN, "mlp"),
    "input-norm": Bug(GDN, "input_layernorm", "input norm without 1 +"),
    "post-norm": Bug(GDN, "post_attention_layernorm", "post-attention norm without 1 +"),
    "final-norm": Bug(None, "final_norm", "final norm without 1 +"),
    "qk-norms": Bug(ATTN, "attn", "q and k norms without 1 +"),
    "full-rotary": Bug(ATTN, "attn", "rotary over the whole head"),
    "no-rotary": Bug(ATTN, "attn", "no rotary at all"),
    "rotary-theta": Bug(ATTN, "attn", "rotary theta 10000"),
    "output-gate-ignored": Bug(ATTN, "attn", "output gate ignored"),
    "scores-not-scaled": Bug(ATTN, "attn", "scores not scaled"),
    "kv-of-another-request": Bug(ATTN, "attn", "KV rows of another sequence, the first 8"),
    "wrong-positions": Bug(None, "positions", "positions one too high"),
    "b-and-a-swapped": Bug(GDN, "gdn", "b and a swapped"),
    "no-decay": Bug(GDN, "gdn", "no decay"),
    "convolution-reversed": Bug(GDN, "gdn", "convolution reversed"),
    "gated-norm": Bug(GDN, "gdn", "gated norm with 1 +"),
    "conv-state-lost": Bug(GDN, "gdn", "conv state not handed over"),
    "gdn-state-zeroed": Bug(GDN, "gdn", "recurrent state not handed over"),
    "gdn-state-lost": Bug(GDN, "gdn", "recurrent state not handed over"),
    "as-released": Bug(ATTN, "attn", "M-RoPE height and width dropped"),
    "height-and-width-swapped": Bug(ATTN, "attn", "M-RoPE height and width swapped"),
    "positions-by-tokens": Bug(ATTN, "attn", "image positions counted by tokens"),
    "images-reversed": Bug(None, "vision", "images in the wrong order"),
    "embeddings-late": Bug(None, "vision", "image embeddings one token late"),
    "position-table-ignored": Bug(None, "vision", "position table ignored"),
    "rank-1-shared-twice": Bug(GDN, "mlp", "shared expert counted twice on rank 1"),
    "rank-1-experts-swapped": Bug(GDN, "mlp", "experts * and * swapped on rank 1"),
    "rank-1-not-reduced": Bug(GDN, "mlp", "not reduced on rank 1"),
}
