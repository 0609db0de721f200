"""Names of local tensors end in the letters of their dimensions (`x_BTD`); this audit holds them to it.

While the tiny model runs, every function of the core is watched as it returns: each local whose name ends so must
have that rank, and within one call a letter must mean one size. Letters of the architecture must have the config's.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import qwen35_moe as q

CORE = Path(q.__file__).parent
FILES = {str(CORE / "model" / f"{n}.py") for n in ("attention", "deltanet", "router", "moe", "text", "norms", "rope")}
SUFFIX = re.compile(r"_([A-Z12][A-Za-z12]*)$")
DIMENSION = re.compile(r"1|(2?)([A-Za-z])")


SIZES = {
    "D": "hidden_size", "V": "vocab_size", "N": "num_attention_heads", "G": "num_key_value_heads", "H": "head_dim",
    "J": "linear_num_value_heads", "M": "linear_num_key_heads", "K": "linear_key_head_dim",
    "P": "linear_value_head_dim", "C": "conv_dim", "E": "num_experts", "A": "num_experts_per_tok",
    "F": "moe_intermediate_size",
}  # fmt: skip
# Functions in which a letter is free: N is any number of rows in an expert, A also counts the fused slot, W counts the
# memory of the convolution, which is one less than its taps, H is any head's width in `_chunks`.
FREE = {"moe.py": "NTA", "router.py": "TAE", "deltanet.py": "HWS"}


class Audit:
    def __init__(self, config: q.Config):
        self.sizes = {letter: getattr(config, name) for letter, name in SIZES.items()}
        self.seen, self.wrong = set(), []

    def __call__(self, frame, event, _):
        if event != "return" or frame.f_code.co_filename not in FILES:
            return
        file = Path(frame.f_code.co_filename).name
        known = {letter: size for letter, size in self.sizes.items() if letter not in FREE.get(file, "")}
        for name, x in frame.f_locals.items():
            suffix = SUFFIX.search(name)
            if not suffix or not isinstance(x, torch.Tensor):
                continue
            self.seen.add(f"{file}:{frame.f_code.co_name}:{name}")
            dimensions = [m.groups() for m in DIMENSION.finditer(suffix[1])]
            if found := self.complaint(dimensions, x, known, FREE.get(file, "")):
                self.wrong.append(f"{file}: {frame.f_code.co_name}: {name} is {list(x.shape)}: {found}")

    @staticmethod
    def complaint(dimensions, x, known, free) -> str:
        if len(dimensions) != x.dim():
            return "another rank"
        for (times, letter), size in zip(dimensions, x.shape, strict=True):
            if letter is None:
                if size != 1:
                    return "1 is not 1"
            elif letter not in free:
                expected = known.setdefault(letter, size // int(times or 1)) * int(times or 1)
                if size != expected:
                    return f"{times}{letter} is not {expected}"
        return ""


def watch(model: q.Model) -> Audit:
    audit, ids, cache = Audit(model.config), torch.arange(14).view(2, 7) % 200, q.Cache()
    sys.setprofile(audit)
    try:
        model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), cache=cache)
        model(ids[:, :1], cache=cache)
    finally:
        sys.setprofile(None)
    return audit


def test_every_suffix_tells_the_truth(built):
    for shared_expert in ("unfused", "fused"):
        audit = watch(q.load(built("tiny"), shared_expert=shared_expert))
        assert not audit.wrong, "\n".join(audit.wrong)
    assert len(audit.seen) > 80


def test_the_audit_sees_a_lie(built, monkeypatch):
    from qwen35_moe.model import moe
    from qwen35_moe.run import experts

    def lie(x_ND, gate_up_2FD, down_DF, quantised=False):
        y_FD = moe.linear("moe_expert_down", x_ND[:, : down_DF.shape[1]], down_DF)
        return y_FD

    lie.__code__ = lie.__code__.replace(co_filename=str(CORE / "model" / "moe.py"))
    monkeypatch.setattr(moe, "expert", lie)
    monkeypatch.setattr(experts, "expert", lie)
    lie.__globals__["moe"] = moe
    assert any("y_FD" in line for line in watch(q.load(built("tiny"))).wrong)
