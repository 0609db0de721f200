"""MXFP4 against the OCP tables, against other libraries, and against the bytes of Aiter's kernel and of AMD Quark."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qwen35_moe.errors import Qwen35Error
from qwen35_moe.quant import mxfp4_compiled
from qwen35_moe.quant.mxfp4 import (
    QUANTISERS,
    SCALE_RULES,
    PackedMXFP4,
    decode,
    decode_plain,
    encode,
    products,
    quantise_dequantise,
)

DATA = Path(__file__).parent / "data"
INTEGER = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
EXACT = (torch.bfloat16, torch.float32, torch.float64)


def bits(x: Tensor) -> Tensor:
    """What a float is made of, with one NaN for all: -0 and 0 differ, NaN equals NaN."""
    return torch.where(x.isnan(), torch.tensor(torch.nan, dtype=x.dtype), x).view(INTEGER[x.dtype])


def every_byte_pair() -> tuple[Tensor, Tensor]:
    """Codes [256, 256] with every code byte in each row, scales [256, 16]: row s has scale byte s."""
    byte = torch.arange(256, dtype=torch.uint8)
    return byte.expand(256, 256).contiguous(), byte[:, None].expand(256, 16).contiguous()


def ocp_element(code: int) -> Fraction:
    """OCP MX v1.0, table 5: sign, two bits of exponent (bias 1), one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = Fraction(2 + mantissa, 2) * 2 ** (exponent - 1) if exponent else Fraction(mantissa, 2)
    return -magnitude if sign else magnitude


def ocp_value(code: int, scale: int) -> float:
    """The scalar decoder: a float64, which has room for all of them."""
    if scale == 255:
        return math.nan
    value = float(ocp_element(code) * Fraction(2) ** (scale - 127))
    return math.copysign(value, -1.0) if code >> 3 else value


# --- decode


@pytest.mark.parametrize("dtype", EXACT)
def test_every_byte_pair_is_what_ocp_says(dtype: torch.dtype) -> None:
    codes, scales = every_byte_pair()
    table = [[ocp_value(code, scale) for code in range(16)] for scale in range(256)]
    expected = torch.tensor(
        [[table[scale][code] for byte in range(256) for code in (byte & 15, byte >> 4)] for scale in range(256)],
        dtype=torch.float64,
    )
    held = expected.isnan() | (expected.abs() <= torch.finfo(dtype).max)
    assert torch.equal(bits(expected[held]), bits(expected[held].to(dtype).double())), "nothing is rounded"
    beyond = [] if dtype == torch.float64 else [2.0**128, 1.5 * 2.0**128, 2.0**129, 1.5 * 2.0**129]
    assert sorted(set(expected[~held].abs().tolist())) == beyond
    result = decode(codes, scales, dtype)
    assert torch.equal(bits(result), bits(expected.to(dtype)))
    assert torch.equal(bits(result), bits(decode_plain(codes, scales, dtype)))


@pytest.mark.parametrize("dtype", EXACT)
def test_the_formula_that_a_gpu_compiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = every_byte_pair()
    table = products(torch.promote_types(dtype, torch.float32), torch.device("cpu"))
    result = torch.empty(256, 512, dtype=dtype)
    monkeypatch.setattr(mxfp4_compiled, "_compiled", lambda: mxfp4_compiled.decode_flat)
    assert mxfp4_compiled.decode_compiled(codes, scales, table[127], table[:, 2].contiguous(), result)  # code 2 is 1.0
    assert torch.equal(bits(result), bits(decode_plain(codes, scales, dtype)))


def test_what_cannot_be_compiled_is_tried_once_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def broken(*_: Tensor) -> None:
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(mxfp4_compiled, "_compiled", lambda: broken)
    monkeypatch.setattr(mxfp4_compiled, "_not_compiled", [])
    given = (*every_byte_pair(), torch.empty(16), torch.empty(256), torch.empty(256, 512))
    with pytest.warns(UserWarning, match="slower, since it could not be compiled: .*Failed to find C compiler"):
        assert not mxfp4_compiled.decode_compiled(*given)
    assert not mxfp4_compiled.decode_compiled(*given) and len(calls) == 1


def test_every_byte_pair_in_float16_is_the_exact_value_rounded_once() -> None:
    codes, scales = every_byte_pair()
    exact = decode_plain(codes, scales, torch.float64)
    assert torch.equal(bits(decode(codes, scales, torch.float16)), bits(exact.to(torch.float16)))


def test_subnormals_survive_a_cpu_that_flushes_them() -> None:
    codes, scales = every_byte_pair()
    expected = {dtype: bits(decode(codes, scales, dtype)) for dtype in EXACT}
    products.cache_clear()
    torch.set_flush_denormal(True)
    try:
        flushed = {dtype: decode(codes, scales, dtype).view(INTEGER[dtype]) for dtype in EXACT}
    finally:
        torch.set_flush_denormal(False)
        products.cache_clear()
    for dtype in EXACT:
        assert torch.equal(flushed[dtype][:255], expected[dtype][:255])


def test_decode_in_pieces_into_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (3, 10, 48), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (3, 10, 3), dtype=torch.uint8, generator=generator)
    weight = PackedMXFP4(codes, scales)
    assert weight.shape == (3, 10, 96)
    for dtype in EXACT:
        whole = decode_plain(codes, scales, dtype)
        for pieces in (1, 7, 2**16):
            monkeypatch.setattr("qwen35_moe.quant.mxfp4.CACHED_BLOCKS", pieces)
            out = torch.full((3, 10, 96), torch.nan, dtype=dtype)
            assert weight.decode(dtype, out=out) is out
            assert torch.equal(bits(out), bits(whole))
            strided = PackedMXFP4(codes.transpose(0, 1), scales.transpose(0, 1)).decode(dtype)
            assert torch.equal(bits(strided), bits(whole.transpose(0, 1).contiguous()))
        odd = torch.empty(1 + whole.numel(), dtype=dtype)[1:].view(whole.shape)
        assert torch.equal(bits(weight.decode(dtype, out=odd)), bits(whole))


# --- encode


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("case", ["normal", "randexp", "ties", "tiny"])
def test_the_bytes_of_aiters_kernel(case: str, dtype: torch.dtype) -> None:
    """Codes bit-equal, scales too where the exponent is not negative.

    Below, the file says 127 throughout, which the kernel cannot have meant: `tiny` has values near 2^-120 with codes
    that are right for the scale 2^-121. The kernel casts the negative exponent to uint8 and adds 127, counting on
    wrap-around as on AMD's GPUs; the file was made on a GPU where that cast saturates to 0.
    """
    golden = load_file(DATA / "golden" / "quant.safetensors")
    codes, scales = encode(golden[f"{case}.x"].to(dtype), **QUANTISERS["aiter-triton"])
    assert torch.equal(codes, golden[f"{case}.codes"])
    assert torch.equal(scales.clamp_min(127), golden[f"{case}.scales"])


def tensors(checkpoint: str) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for shard in sorted((DATA / "fixtures" / checkpoint).glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            merged |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return merged


@pytest.mark.parametrize(("checkpoint", "count"), [("quark-mxfp4", 4 * 8 * 3), ("quark-moe-mxfp4", 4 * 9 * 3)])
def test_the_bytes_of_amd_quark(checkpoint: str, count: int) -> None:
    bf16, quark = tensors("bf16-hub"), tensors(checkpoint)
    checked = 0
    for name in quark:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        prefix, projection = module.rsplit(".", 1)
        if ".experts." in module:
            experts, expert = prefix.rsplit(".", 1)
            fused = bf16[f"{experts}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            gate, up = fused.chunk(2)
            weight = {"gate_proj": gate, "up_proj": up, "down_proj": fused}[projection]
        else:
            weight = bf16[f"{module}.weight"]
        codes, scales = encode(weight, **QUANTISERS["quark"])
        assert torch.equal(codes, quark[f"{module}.weight"]), module
        assert torch.equal(scales, quark[name]), module
        checked += 1
    assert checked == count


def test_quarks_activation_quantiser(expected: dict[str, Tensor]) -> None:
    ours = quantise_dequantise(expected["qdq/x"], **QUANTISERS["quark"])
    assert torch.equal(bits(ours), bits(expected["qdq/y.quark"]))


# amax, then the scale byte by rule: computed by hand, and the same in the engines' sources
AMAX_TO_BYTE = [
    (1.0, 125, 125, 125, 125, 125),
    (1.0078125, 125, 125, 125, 125, 126),
    (1.5, 125, 126, 125, 125, 126),
    (1.5078125, 125, 126, 126, 125, 126),
    (1.625, 125, 126, 126, 125, 126),
    (1.7421875, 125, 126, 126, 125, 126),
    (1.75, 126, 126, 126, 125, 126),
    (1.9921875, 126, 126, 126, 125, 126),
    (448.0, 134, 134, 134, 133, 134),
    (1e-10, 91, 92, 92, 91, 92),
    (2.0**-149, 0, 0, 0, 0, 0),
    (1.5 * 2.0**127, 252, 253, 252, 252, 253),
    (3.4028234663852886e38, 253, 253, 253, 252, 253),
]


@pytest.mark.parametrize("row", AMAX_TO_BYTE, ids=lambda row: str(row[0]))
def test_scale_byte_of_a_largest_magnitude(row: tuple[float, ...]) -> None:
    amax, *expected = row
    x = torch.zeros(32, dtype=torch.float32)
    x[5] = -amax
    rules = ("even", "threshold-1.5", "round-up", "floor", "ceil")
    assert [int(encode(x, rule)[1]) for rule in rules] == expected
    assert [int(encode(x.double(), rule)[1]) for rule in rules] == expected


def scalar_encode(x: list[float], rule: str, ties: str) -> tuple[list[int], int]:
    """The encoder in exact rationals: the scale by the rule's words, the element by comparing all distances."""
    amax = max(abs(Fraction(v)) for v in x)
    byte = 0
    if amax:
        k = math.frexp(float(amax))[1] - 1
        fraction = amax / Fraction(2) ** k
        bump = {
            "even": fraction >= Fraction(7, 4),
            "round-up": fraction > Fraction(3, 2),
            "threshold-1.5": fraction >= Fraction(3, 2),
            "floor": False,
            "ceil": fraction > 1,
        }[rule]
        byte = min(max(k - 2 + bump + 127, 0), 254)
    codes = []
    for v in x:
        scaled = abs(Fraction(v)) / Fraction(2) ** (byte - 127)
        distances = [abs(scaled - ocp_element(code)) for code in range(8)]
        near = [code for code in range(8) if distances[code] == min(distances)]
        code = near[-1] if ties == "half-up" else min(near, key=lambda c: c % 2)
        codes.append(code | 8 * (math.copysign(1, v) < 0))
    return codes, byte


def finite_float32(pattern: int) -> float:
    """Any float32 by its bits, the infinities and NaNs replaced by what is just below them."""
    exponent = min(pattern >> 23 & 255, 254)
    return float(np.uint32(pattern & 0x807FFFFF | exponent << 23).view(np.float32))


near_midpoints = st.builds(
    lambda midpoint, ulps, sign: sign * float(np.float32(midpoint) + np.float32(ulps * 2.0**-23 * midpoint)),
    st.sampled_from([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1.5, 3.0, 6.0, 7.0, 0.0]),
    st.integers(-1, 1),
    st.sampled_from([1.0, -1.0]),
)
any_float32 = st.integers(0, 2**32 - 1).map(finite_float32)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.lists(near_midpoints, min_size=32, max_size=32),
        st.lists(any_float32, min_size=32, max_size=32),
        st.lists(any_float32 | st.just(-0.0), min_size=1, max_size=3).map(lambda x: x + [0.0] * (32 - len(x))),
    ),
    st.sampled_from(sorted(SCALE_RULES)),
    st.sampled_from(["even", "half-up"]),
)
def test_encode_is_the_encoder_in_rationals(x: list[float], rule: str, ties: str) -> None:
    codes, byte = scalar_encode(x, rule, ties)
    for dtype in (torch.float32, torch.float64):
        got_codes, got_scales = encode(torch.tensor(x, dtype=dtype), rule, ties)
        assert got_scales.tolist() == [byte]
        assert torch.stack((got_codes & 15, got_codes >> 4), -1).flatten().tolist() == codes


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=16, max_size=16), st.integers(0, 252), st.sampled_from(sorted(SCALE_RULES))
)
def test_decode_then_encode(code_bytes: list[int], scale: int, rule: str) -> None:
    codes, scales = torch.tensor(code_bytes, dtype=torch.uint8), torch.tensor([scale], dtype=torch.uint8)
    for dtype in EXACT:
        values = decode(codes, scales, dtype)
        again_codes, again_scales = encode(values, rule)
        largest = (values.abs().amax().double() / 2.0 ** (scale - 127)).item()
        if largest == 4 or (largest == 6 and rule not in ("threshold-1.5", "ceil")):  # these two make room above 6
            assert torch.equal(again_codes, codes)
            assert torch.equal(again_scales, scales)
        if rule != "threshold-1.5":  # what has been rounded once stays as it is
            once = quantise_dequantise(values, rule)
            assert torch.equal(bits(quantise_dequantise(once, rule)), bits(once))


def test_a_block_of_zeros() -> None:
    x = torch.zeros(2, 32)
    x[1, 3] = -0.0
    codes, scales = encode(x)
    assert scales.tolist() == [[0], [0]]
    assert int(codes[0].amax()) == 0
    assert codes[1, 1] == 0x80, "the sign of a zero is kept"
    assert torch.equal(bits(decode(codes, scales, x.dtype)), bits(x))
    assert int(encode(x, negative_zero=False)[0].amax()) == 0, "or not, as in AMD Quark"
    assert encode(x, **QUANTISERS["aiter-hip"])[1].tolist() == [[92], [92]], "the floor of Aiter's HIP kernels"


def test_below_the_floor_of_the_largest_magnitude_values_vanish() -> None:
    x = torch.zeros(32)
    x[0], x[1] = 0.25 * 2.0**-35, 0.26 * 2.0**-35
    codes, scales = encode(x, **QUANTISERS["aiter-hip"])
    assert int(scales) == 92
    assert codes[0] == 0x10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", sorted(SCALE_RULES))
@pytest.mark.parametrize("dtype", [torch.float16, *EXACT])
def test_nan_and_infinity_take_their_whole_block_and_no_other(bad: float, rule: str, dtype: torch.dtype) -> None:
    x = torch.ones(64, dtype=dtype)
    x[7] = bad
    codes, scales = encode(x, rule, absmax_floor=1e-10)
    assert int(scales[0]) == 255
    assert not (codes[:16] & 0x77).any()
    back = decode(codes, scales, dtype)
    assert back[:32].isnan().all()
    assert torch.equal(back[32:], x[32:])


def test_beyond_the_largest_scale_float64_saturates() -> None:
    x = torch.zeros(32, dtype=torch.float64)
    x[0], x[1] = 1e300, 2.0**127
    codes, scales = encode(x, "floor")
    assert int(scales) == 254
    assert decode(codes, scales, x.dtype)[:2].tolist() == [6 * 2.0**127, 2.0**127]


def test_the_rounding_keeps_the_dtype_and_the_shape() -> None:
    x = torch.linspace(-3, 3, 2 * 5 * 64).view(2, 5, 64)
    for dtype in EXACT:
        y = quantise_dequantise(x.to(dtype), "round-up")
        assert (y.dtype, y.shape) == (dtype, x.shape)


# --- what is refused


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.zeros(2, 16), torch.zeros(2, 1), "stored as bytes"),
        (torch.zeros(2, 16).byte(), torch.zeros(2, 1).to(torch.float8_e4m3fn), "NVFP4"),
        (torch.zeros(2, 24).byte(), torch.zeros(2, 1).byte(), "whole blocks"),
        (torch.zeros(2, 32).byte(), torch.zeros(2, 1).byte(), r"\[2, 2\]"),
        (torch.zeros(2, 16).byte(), torch.zeros(2).byte(), r"\[2, 1\]"),
        (torch.zeros(2, 16).byte(), torch.zeros(3, 1).byte(), r"\[2, 1\]"),
    ],
)
def test_codes_and_scales_that_are_not_mxfp4(codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(Qwen35Error, match=message):
        PackedMXFP4(codes, scales)
    with pytest.raises(Qwen35Error, match=message):
        decode(codes, scales, torch.float32)


def test_arguments_that_are_refused() -> None:
    x, codes, scales = torch.ones(2, 32), torch.zeros(2, 16).byte(), torch.zeros(2, 1).byte()
    for bad in (torch.ones(2, 33), torch.ones(2, 0), torch.ones(()), torch.ones(2, 32, dtype=torch.int32)):
        with pytest.raises(Qwen35Error):
            encode(bad)
    with pytest.raises(Qwen35Error, match="round-up"):
        encode(x, "nearest")
    with pytest.raises(Qwen35Error, match="half-up"):
        encode(x, ties="odd")
    with pytest.raises(Qwen35Error, match="decodes to floats"):
        decode(codes, scales, torch.int32)
    for out in (torch.empty(2, 31), torch.empty(2, 32).bfloat16(), torch.empty(32, 2).T):
        with pytest.raises(Qwen35Error, match="out does not fit"):
            decode(codes, scales, torch.float32, out)
