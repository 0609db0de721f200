"""The layouts in which checkpoints of the family are stored, and the `quantization_config` that goes with each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import numpy as np

from .draw import draw
from .encode import Chunks, encodings, mxfp4_arrays
from .tensors import Json, Logical

EXPERT = re.compile(r"(?P<mlp>.*\.mlp)\.experts\.(?P<expert>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Layout:
    """How each part is stored: "float" (BF16), "mxfp4" (Quark), "compressed-tensors" (MXFP4), "fp8" (blocks of 128 x
    128), "fp8-channel" (a scale a row); routed experts also "fused" (3-D BF16) or "gpt-oss" (3-D MXFP4)."""

    experts: str = "fused"
    shared: str = "float"
    mixers: str = "float"
    mtp_experts: str = "fused"
    mtp_shared: str = "float"
    mtp_mixers: str = "float"
    method: str = ""  # quant_method of the config
    by_layer: tuple[str, ...] = ()  # experts of layer 0, 1, ... where they differ


QUARK = Layout(experts="mxfp4", mtp_experts="float", method="quark")
LAYOUTS = {
    "bf16": Layout(),
    "per-expert": Layout(experts="float", mtp_experts="float"),
    "mxfp4": QUARK,
    "moe-mxfp4": replace(QUARK, shared="mxfp4"),
    "mxfp4-attnfp8": replace(QUARK, mixers="fp8-channel"),
    "mxfp4-mtp": replace(QUARK, mtp_experts="mxfp4"),
    "fp8": Layout("fp8", "fp8", "fp8", "fp8", "fp8", "fp8", method="fp8"),
    "fp8-experts": Layout(experts="fp8", mtp_experts="fp8", method="fp8"),
    "compressed-tensors": Layout(
        experts="compressed-tensors", shared="compressed-tensors", method="compressed-tensors"
    ),
    "gpt-oss": Layout(experts="gpt-oss", method="mxfp4"),
    "mixed": Layout(by_layer=("fused", "mxfp4", "fp8", "float"), shared="mxfp4", mixers="fp8", method="quark"),
}


@dataclass(frozen=True)
class Stored:
    name: str
    dtype: str
    size: tuple[int, ...]
    data: Callable[[], Chunks]


def kind(layout: Layout, name: str) -> str:
    """How the layout stores the tensor of this canonical name."""
    mtp = name.startswith("mtp.")
    if EXPERT.fullmatch(name):
        if layout.by_layer and not mtp:
            return layout.by_layer[int(name.split(".")[1]) % len(layout.by_layer)]
        return layout.mtp_experts if mtp else layout.experts
    if fnmatchcase(name, "*.mlp.shared_expert.*_proj.weight"):
        return layout.mtp_shared if mtp else layout.shared
    # in_proj_a and in_proj_b, a few rows each, are never quantised.
    if fnmatchcase(name, "*.self_attn.[qkvo]_proj.weight") or re.search(
        r"linear_attn\.(in_proj_(qkv|z)|out_proj)\.", name
    ):
        return layout.mtp_mixers if mtp else layout.mixers
    return "float"


def raw_name(name: str, prefix: str) -> str:
    """The canonical name as a checkpoint with this prefix spells it."""
    if name.startswith("visual."):
        return "model." + name if prefix.startswith("model.") else name
    if name.startswith("lm_head."):
        return prefix.removesuffix("model.") + name if prefix == "language_model.model." else name
    if name.startswith("mtp."):
        return name
    return prefix + name


def stored(
    tensors: Iterable[Logical], layout: Layout, *, prefix: str, seed: int, method: str, float32: bool
) -> Iterator[Stored]:
    """The tensors of the checkpoint. float32: A_log and the DeltaNet norm are F32, as in Qwen3.5, not BF16."""
    fused: dict[str, list[Logical]] = {}
    for tensor in tensors:
        way, match = kind(layout, tensor.name), EXPERT.fullmatch(tensor.name)
        name = raw_name(tensor.name, prefix)
        if match and way in ("fused", "gpt-oss"):
            fused.setdefault(match["mlp"], []).append(tensor)
        elif len(tensor.size) == 2 and name.endswith(".weight"):
            for suffix, dtype, size, data in encodings(way, tensor, seed, method):
                yield Stored(name.removesuffix(".weight") + suffix, dtype, size, data)
        else:
            dtype = "F32" if float32 and name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16"
            yield Stored(name, dtype, tensor.size, _plain(tensor, seed, dtype))
    for mlp, matrices in fused.items():
        way = kind(layout, matrices[0].name)
        build = _fused if way == "fused" else _blocks
        yield from build(raw_name(mlp, prefix) + ".experts", matrices, seed, method)


def _plain(tensor: Logical, seed: int, dtype: str) -> Callable[[], Chunks]:
    return lambda: draw(seed, tensor.name, tensor.size, tensor.values, dtype)


def _fused(prefix: str, matrices: list[Logical], seed: int, method: str) -> Iterator[Stored]:
    """Experts one after another; gate rows, then up rows."""
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        own = [m for m in matrices if m.name.split(".")[-2] in parts]
        experts, (rows, columns) = len(own) // len(parts), own[0].size

        def data(own: list[Logical] = own) -> Chunks:
            for matrix in own:
                yield from draw(seed, matrix.name, matrix.size, matrix.values, "BF16")

        yield Stored(f"{prefix}.{name}", "BF16", (experts, rows * len(parts), columns), data)


def _blocks(prefix: str, matrices: list[Logical], seed: int, method: str) -> Iterator[Stored]:
    """The layout of gpt-oss: codes [E, rows, Q, 16], scales [E, rows, Q]; gate and up rows take turns."""
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        own = [m for m in matrices if m.name.split(".")[-2] in parts]
        experts, (rows, columns) = len(own) // len(parts), own[0].size
        size = (experts, rows * len(parts), columns // 32)

        def data(part: int, own: list[Logical] = own, count: int = len(parts)) -> Chunks:
            for first in range(0, len(own), count):
                turns = [mxfp4_arrays(matrix, seed, method)[part] for matrix in own[first : first + count]]
                yield np.stack(turns, axis=1)

        yield Stored(f"{prefix}.{name}_blocks", "U8", (*size, 16), partial(data, 0))
        yield Stored(f"{prefix}.{name}_scales", "U8", size, partial(data, 1))


LINEAR = re.compile(
    r".*\.(linear_attn\.(conv1d|in_proj_a|in_proj_b|in_proj_qkv|in_proj_z|out_proj)|self_attn\.[qkvo]_proj|mlp\.gate"
    r"|mlp\.shared_expert_gate|mlp\.shared_expert\.(gate|up|down)_proj|attn\.(proj|qkv)|linear_fc[12])|lm_head|mtp\.fc"
)


def quark_exclude(names: Iterable[str], layout: Layout, prefix: str, *, mtp_listed: bool = False) -> list[str]:
    """The `exclude` that Quark 0.13 exports: patterns are expanded to the exact names of all linear modules that stay
    unquantised, sorted. Embeddings, norms and the patch projection are no linear modules to it. MTP experts are named
    only where the source stored them one by one (mtp_listed); from a fused source they are left unquantised and
    unlisted all the same."""
    modules = []
    for name in names:
        module = name.removesuffix(".weight")
        listed = LINEAR.fullmatch(module) or (mtp_listed and module.startswith("mtp.") and EXPERT.fullmatch(name))
        if name.endswith(".weight") and listed and kind(layout, name) == "float":
            modules.append(raw_name(module + ".weight", prefix).removesuffix(".weight"))
    return sorted(modules)


def _unquantised(names: Iterable[str], layout: Layout, prefix: str) -> list[str]:
    """The module names that the configs of FP8 and compressed-tensors checkpoints list: everything left in BF16."""
    left = {raw_name(n, prefix).removesuffix(".weight") for n in names if kind(layout, n) == "float"}
    return sorted(n for n in left if not n.endswith(".bias"))


QUARK_WEIGHT: Json = {
    "dtype": "fp4", "is_dynamic": False, "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "block_size": None,
    "symmetric": None, "round_method": "half_even", "scale_type": "float", "zero_point_type": "int32",
    "scale_format": "e8m0", "scale_calculation_mode": "even", "mx_element_dtype": None,
    "observer_cls": "PerBlockMXObserver", "is_scale_quant": False, "enable_buffer_reuse": False,
    "max_input_numel": 4194304,
}  # fmt: skip
QUARK_FP8: Json = QUARK_WEIGHT | {
    "dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "group_size": None, "symmetric": True,
    "scale_format": None, "scale_calculation_mode": None, "observer_cls": "PerChannelMinMaxObserver",
}  # fmt: skip


def quantization_config(names: list[str], layout: Layout, prefix: str) -> Json | None:
    """What config.json says of the quantisation; None for an unquantised checkpoint."""
    if layout.method == "quark":
        return _quark(quark_exclude(names, layout, prefix), layout)
    if layout.method == "fp8":
        return {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": _unquantised(names, layout, prefix),
        }  # fmt: skip
    if layout.method == "compressed-tensors":
        weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                   "dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": None}  # fmt: skip
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
            "quantization_status": "compressed", "kv_cache_scheme": None, "config_groups": {"group_0": group},
            "ignore": _unquantised(names, layout, prefix),
        }  # fmt: skip
    if layout.method == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": _unquantised(names, layout, prefix)}
    return None


def _quark(exclude: list[str], layout: Layout) -> Json:
    spec = {"output_tensors": None, "bias": None, "target_device": None}
    by_layer = {}
    if layout.mixers == "fp8-channel":
        fp8 = {"weight": QUARK_FP8, "input_tensors": QUARK_FP8 | {"is_dynamic": True}} | spec
        by_layer = {"*linear_attn*": fp8, "*self_attn*": fp8}
    return {
        "quant_method": "quark", "quant_mode": "eager_mode", "version": "0.13",
        "global_quant_config": {"weight": QUARK_WEIGHT, "input_tensors": QUARK_WEIGHT | {"is_dynamic": True}} | spec,
        "exclude": exclude, "algo_config": None, "softmax_quant_spec": None, "layer_type_quant_config": {},
        "layer_quant_config": by_layer, "kv_cache_quant_config": {}, "kv_cache_post_rope": False,
        "export": {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder",
                   "weight_format": "real_quantized", "weight_merge_groups": None},
    }  # fmt: skip
