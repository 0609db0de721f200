"""Rotary frequencies for contexts longer than those of training: what `rope_parameters.rope_type` of config.json means.

Plain RoPE rotates pair j by position * w_j, w_j = theta^(-2j/R). Each type below changes w_j, and some multiply cos and
sin (`attention_factor`). With s = factor and L = original_max_position_embeddings:

    linear        w_j / s
    dynamic       theta grows with the sequence (NTK-aware; Reddit, bloc97 and emozilla 2023)
    yarn          w_j / s for slow pairs, w_j for fast ones, a ramp between them (arXiv 2309.00071)
    longrope      w_j / e_j, with a list e of the file for short and another for long sequences (arXiv 2402.13753)
    llama3        w_j / s where the wavelength is long, smooth in between (Llama 3.1)
    proportional  the whole head is rotated, the pairs beyond the rotated part by 0

Agrees bit for bit in float32 with transformers 5.23 `ROPE_INIT_FUNCTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import Qwen35Error

WHERE = "config.json: rope_parameters"
MAX_POSITION = 32768  # `max_position_embeddings` of the family in transformers, where a file has none

# Type -> keys that it needs, keys that it may have.
KEYS_OF_TYPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "proportional": ((), ("factor",)),
}
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved",
          "original_max_position_embeddings", "finetuned")  # fmt: skip
PLAIN = ("default", "mrope")


@dataclass(frozen=True)
class RopeScaling:
    """A scaled rotary embedding. Fields carry the names of config.json; None: the type's own default."""

    rope_type: str
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def of(cls, rope: Mapping[str, Any], max_position: Any) -> RopeScaling | None:
        """From `rope_parameters` and `max_position_embeddings`; None for plain RoPE. Error: an unknown type or key, a
        key that is missing or no positive number."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in PLAIN:
            return None
        if not isinstance(kind, str) or kind not in KEYS_OF_TYPE:
            what, expected = "unsupported rotary embedding", ", ".join((*PLAIN, *KEYS_OF_TYPE))
            raise Qwen35Error(what, where=WHERE, expected=expected, found=f"rope_type {kind!r}")
        needed, optional = KEYS_OF_TYPE[kind]
        given = {key: value for key, value in rope.items() if key not in COMMON and value is not None}
        if missing := [key for key in needed if key not in given]:
            raise Qwen35Error("keys are missing", where=f"{WHERE}, rope_type {kind}", expected=", ".join(missing))
        if unknown := sorted(given.keys() - {*needed, *optional}):
            expected, found = ", ".join((*needed, *optional)), ", ".join(unknown)
            raise Qwen35Error("unknown keys, which might change what the model computes",
                              where=f"{WHERE}, rope_type {kind}", expected=expected, found=found)  # fmt: skip
        longest = MAX_POSITION if max_position is None else max_position
        original = rope.get("original_max_position_embeddings") or longest
        lengths = {"max_position_embeddings": longest, "original_max_position_embeddings": original}
        numbers = {key: _number(key, value) for key, value in {**given, **lengths}.items()}
        return cls(kind, **numbers)

    def ratio(self) -> float:
        """s: `factor`, or else how much longer the context became."""
        return self.factor or self.max_position_embeddings / self.original_max_position_embeddings

    def amplitude(self) -> float:
        """The factor of cos and sin. YaRN: 0.1 ln s + 1; LongRoPE: sqrt(1 + ln s / ln L)."""
        s = self.ratio()
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            return 1.0 if s <= 1 else math.sqrt(1 + math.log(s) / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return _mscale(s, self.mscale) / _mscale(s, self.mscale_all_dim)
        return _mscale(s, 1.0)

    def frequencies(self, theta: float, rotated: int, head_dim: int, position_ids: Tensor, wide: torch.dtype) -> Tensor:
        """w [R/2] in `wide`. dynamic and longrope go by the largest of the positions of this call."""
        R = head_dim if self.rope_type == "proportional" else rotated
        power = torch.arange(0, R, 2, device=position_ids.device).to(wide) / R
        if self.rope_type == "dynamic":
            theta = self._grown(theta, R, position_ids, wide)
        if self.rope_type == "longrope":
            long = int(position_ids.max()) + 1 > self.original_max_position_embeddings
            e = torch.tensor(self.long_factor if long else self.short_factor, dtype=wide, device=power.device)
            return 1 / (e * theta**power)
        wavelength_over_2pi = theta**power
        w = 1 / wavelength_over_2pi
        if self.rope_type == "linear":
            return w / self.ratio()
        if self.rope_type == "yarn":
            share = 1 - self._ramp(theta, R, power)
            return 1 / (self.ratio() * wavelength_over_2pi) * (1 - share) + w * share
        if self.rope_type == "llama3":
            return self._llama3(w)
        if self.rope_type == "proportional":
            pair = torch.arange(R // 2, device=power.device)
            return torch.where(pair < rotated // 2, w, 0.0) / (1.0 if self.factor is None else self.factor)
        return w

    def _grown(self, theta: float, R: int, position_ids: Tensor, wide: torch.dtype) -> Any:
        """theta (s n / L - (s - 1))^(R / (R - 2)) for n tokens, n > L = max_position_embeddings; else theta."""
        s, n = self.ratio(), position_ids.max() + 1
        if int(n) <= self.max_position_embeddings:
            return theta
        return theta * (s * n.to(wide) / self.max_position_embeddings - (s - 1)) ** (R / (R - 2))

    def _ramp(self, theta: float, R: int, power: Tensor) -> Tensor:
        """0 below the pair that turns beta_fast times in L tokens, 1 above the one that turns beta_slow times, linear
        in the pair's number between them (in the paper: in the number of turns)."""

        def pair(turns: float) -> float:
            return R * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        j = torch.arange(R // 2, device=power.device).to(power.dtype)
        return ((j - low) / ((high if high != low else high + 0.001) - low)).clamp(0, 1)

    def _llama3(self, w: Tensor) -> Tensor:
        """w / s where the wavelength is above L / low_freq_factor, w where it is below L / high_freq_factor."""
        L, s = self.original_max_position_embeddings, self.ratio()
        low, high = self.low_freq_factor, self.high_freq_factor
        assert low is not None and high is not None
        wavelength = 2 * math.pi / w
        smooth = (L / wavelength - low) / (high - low)
        between = (1 - smooth) * w / s + smooth * w
        return torch.where(wavelength > L / low, w / s, torch.where(wavelength < L / high, w, between))


def _mscale(s: float, m: float) -> float:
    return 1.0 if s <= 1 else 0.1 * m * math.log(s) + 1.0


def _number(key: str, value: Any) -> Any:
    """The value of a key, checked: a flag, a positive number, or a list of those."""
    if key == "truncate" and isinstance(value, bool):
        return value
    several = key in ("short_factor", "long_factor")
    items = value if several and isinstance(value, (list, tuple)) else [value]
    good = all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf for x in items)
    whole = not key.endswith("position_embeddings") or float(value).is_integer() if good and not several else True
    if key == "truncate" or not good or not whole or several and items is not value:
        expected = "a list of positive numbers" if several else "a positive number"
        expected = "true or false" if key == "truncate" else expected
        raise Qwen35Error("bad value", where=f"{WHERE}: {key}", expected=expected, found=repr(value))
    return tuple(value) if several else value
