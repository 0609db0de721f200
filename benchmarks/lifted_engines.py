"""Deciding functions of SGLang and vLLM, lifted out of their wheels by `ast`, and what they ask of a machine stood in.

Nothing is installed: functions, methods and constants are compiled one by one, without their imports.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, Literal, Optional, Protocol, cast

Json = dict[str, Any]
Answer = tuple[str, str]  # of the target and of the draft: "fused", "no" or "stops"
TYPING = {"Any": Any, "Optional": Optional, "Iterable": Iterable, "Mapping": Mapping, "Literal": Literal, "cast": cast}
TYPING |= {"ClassVar": ClassVar}
TYPING |= {"Dict": dict, "List": list, "MappingProxyType": MappingProxyType, "dataclass": dataclass, "field": field}


class Source(Protocol):
    """A wheel, or a folder with an engine's sources."""

    def read(self, name: str) -> bytes: ...


class Folder:
    def __init__(self, root: Path):
        self.root = root

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class WithoutImports(ast.NodeTransformer):
    """Drops imports inside functions, decorators and annotations: the names are stand-ins."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.Pass()

    visit_Import = visit_ImportFrom  # type: ignore[assignment]


def lift(wheel: Source, module: str, names: Iterable[str], given: Json) -> Json:
    """Functions, methods ("Class.method") and constants of a module, run in a namespace that `given` begins."""
    wanted, found = set(names), dict(TYPING) | given
    body = ast.parse(wheel.read(module)).body
    kept: list[ast.stmt] = [ast.ImportFrom("__future__", [ast.alias("annotations")], 0)]
    for node in body:
        targets = [t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)]
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and f"{node.name}.{m.name}" in wanted]
            if methods or node.name in wanted:
                node.bases, node.keywords = [], []
                node.body = node.body if node.name in wanted else methods  # type: ignore[assignment]
                kept.append(node)
        elif getattr(node, "name", None) in wanted or wanted.intersection(targets):
            kept.append(node)
    tree = ast.fix_missing_locations(WithoutImports().visit(ast.Module(kept, [])))
    tree.body[0] = ast.parse("from __future__ import annotations").body[0]
    exec(compile(tree, module, "exec"), found)
    missing = wanted - found.keys() - {name for name in wanted if "." in name}
    if missing:
        raise SystemExit(f"{module} has no {', '.join(sorted(missing))}: the engine has changed, so must its rule")
    return found


class Sglang:
    """SGLang's chain: sizes, Quark's and ModelOpt's gates, the draft's own quantisation, what raises while building."""

    rule, pattern = "sglang-0.5.23", "sglang-*.whl"
    at = "sglang/srt/layers/quantization/"

    def __init__(self, wheel: Source):
        quiet = SimpleNamespace(debug=lambda *_: None, warning_once=lambda *_: None, warning=lambda *_: None)
        self.moe = SimpleNamespace(enforce_shared_experts_fusion=False, disable_shared_experts_fusion=False)
        stand_ins: Json = {
            "re": re,
            "fnmatch": fnmatch,
            "logger": quiet,
            "is_hip": lambda: True,
            "is_npu": lambda: False,
            "_use_aiter": True,
            "is_gfx95_supported": lambda: True,
        }
        stand_ins["torch"] = SimpleNamespace(nn=SimpleNamespace(Module=SimpleNamespace))
        stand_ins["envs"] = SimpleNamespace(SGLANG_USE_AITER=SimpleNamespace(get=lambda: True))
        stand_ins["get_exec"] = lambda: SimpleNamespace(moe=self.moe)
        ignoring = ("deep_compare", "should_ignore_layer", "check_equal_or_regex_match", "_is_equal_or_regex_match")
        known = lift(wheel, f"{self.at}quark/utils.py", ignoring, stand_ins)
        methods = ("_find_matched_config", "_fused_expert_config", "_is_draft_layer", "_get_block_fp8_config")
        methods += ("shared_expert_excluded_from_quant", "can_fuse_shared_expert")
        names = ["_MOE_SHARED_EXPERT_QUANT_LAYER0_BASES", "_MOE_SHARED_EXPERT_QUANT_DRAFT_BASES"]
        names += ["_SHARED_EXPERT_BODY_PROJ_SUFFIXES", *(f"QuarkConfig.{m}" for m in methods)]
        online = ("shared_expert_online_mxfp4_supported", "_non_mxfp4_moe_layer_overrides", "_is_mx_fp4")
        names += [f"QuarkConfig.{m}" for m in (*online, "_warn_online_mxfp4_unavailable")]
        names += ["_ONLINE_SHARED_EXPERT_MXFP4_MODEL_TYPES"]
        self.quark = lift(wheel, f"{self.at}quark/quark.py", names, known | {"Fp8Config": SimpleNamespace})
        keys = lift(wheel, f"{self.at}base_config.py", ["QuantizationConfig.get_from_keys"], stand_ins)
        wanted = [f"ModelOptFp4Config.{m}" for m in ("can_fuse_shared_expert", "from_config", "common_group_size")]
        self.fp4 = lift(wheel, f"{self.at}modelopt_quant.py", wanted, stand_ins)["ModelOptFp4Config"]
        self.fp4.get_from_keys = staticmethod(keys["QuantizationConfig"].get_from_keys)
        self.fp4.__init__ = _kept
        backend = SimpleNamespace(is_deepep=lambda: False, is_deepep_v2=lambda: False, is_mori=lambda: False)
        asked = stand_ins | {"get_moe_a2a_backend": lambda: backend}
        self.gate = lift(wheel, "sglang/srt/models/qwen2_moe.py", ["can_fuse_shared_expert"], asked)
        names = ["_mtp_quant_config"]
        self.draft = lift(wheel, "sglang/srt/models/qwen3_5_mtp.py", names, stand_ins)["_mtp_quant_config"]
        source = wheel.read("sglang/srt/models/qwen3_5.py").decode()
        packed = re.search(r"packed_modules_mapping = (\{.*?\n    \})", source, re.S)
        self.packed = ast.literal_eval(packed[1]) if packed else {}

    def config(self, top: Json, raw: Json) -> Any:
        """The object that SGLang makes of a quantization_config; by model_config._parse_modelopt_quant_config."""
        method, inner = raw.get("quant_method"), raw.get("quantization", raw)
        algo, name = str(inner.get("quant_algo", "")), str(method)
        if method == "quark":
            made = self.quark["QuarkConfig"]()
            excluded = raw.get("exclude")
            vars(made).update(quant_config=raw, exclude_layers=excluded, is_prequantized=True)
            vars(made).update(num_hidden_layers=top.get("num_hidden_layers"), num_nextn_predict_layers=0)
            vars(made).update(packed_modules_mapping=self.packed, model_type=top.get("model_type"))
        elif method == "modelopt" and "FP4" in algo:
            made, name = self.fp4.from_config(raw), "modelopt_fp4"
        else:
            made = SimpleNamespace(quantized_layers=inner.get("quantized_layers") or {})
            name = "modelopt_mixed" if algo == "MIXED_PRECISION" else name
        made.get_name = lambda: name
        return made

    def answer(self, top: Json, raw: Json, options: Json) -> Answer:
        self.moe.enforce_shared_experts_fusion = options["enforce_shared_experts_fusion"]
        prefix = "model.language_model" if "text_config" in top else "model"
        text = SimpleNamespace(**(top.get("text_config") or top))
        try:
            made = self.config(top, raw) if raw else None
        except ValueError:
            return "stops", "stops"
        target = self.one(text, made, [f"{prefix}.layers.{n}.mlp" for n in range(text.num_hidden_layers)])
        try:
            draft = self.draft(made)
        except TypeError:  # exclude: null
            return target, "stops"
        return target, self.one(text, draft, ["mtp.layers.0.mlp"])

    def one(self, text: Any, made: Any, blocks: list[str]) -> str:
        try:
            fused = self.gate["can_fuse_shared_expert"](text, made)
            if made is not None and made.get_name() == "quark":
                for block in blocks:
                    for module in (f"{block}.experts", *([] if fused else [f"{block}.shared_expert.gate_up_proj"])):
                        if not self.quark["should_ignore_layer"](module, made.exclude_layers, self.packed):
                            made._get_block_fp8_config(made._find_matched_config(module, None), self.packed)
        except (ValueError, TypeError, AttributeError):
            return "stops"
        return "fused" if fused else "no"


def _kept(self: Any, serialized: bool, kv: Any, group: Any, excluded: Any, packed: Any = None, **_: Any) -> None:
    vars(self).update(is_checkpoint_nvfp4_serialized=serialized, exclude_modules=excluded)


class Vllm:
    """vLLM's chain: mapper, compatibility check layer by layer, all layers or none, what raises while building."""

    rule, pattern = "vllm-0.33", "vllm-*.whl"
    at = "vllm/model_executor/layers/quantization/"

    def __init__(self, wheel: Source):
        names = ("is_shared_expert_quant_fse_compatible", "find_matching_patterns", "is_equal_or_regex_match")
        given: Json = {"re": re, "fnmatch": fnmatch.fnmatch}
        known = lift(wheel, f"{self.at}utils/config_utils.py", names, given)
        quark = lift(wheel, f"{self.at}quark/utils.py", ("should_ignore_layer", "deep_compare"), known)
        methods = ("get_layer_quant_config_from_name", "_find_matched_config", "apply_vllm_mapper")
        methods += ("get_quant_method_target",)
        known |= {"RoutedExperts": Routed, "LinearBase": Linear, "Attention": type("Attention", (), {})}
        moe = {"QuarkMoEMethod": SimpleNamespace(get_moe_method_target=_moe_target)}
        moe |= dict.fromkeys(("UnquantizedFusedMoEMethod", "UnquantizedLinearMethod", "QuarkKVCacheMethod"), object)
        at, given_quark = f"{self.at}quark/quark.py", known | quark | moe | {"fnmatch": fnmatch}
        self.quark = lift(wheel, at, [f"QuarkConfig.{m}" for m in methods], given_quark)
        skipped = lift(wheel, f"{self.at}utils/quant_utils.py", ["is_layer_skipped"], given)
        wanted = ["ModelOptQuantConfigBase.is_layer_excluded", "ModelOptQuantConfigBase.apply_vllm_mapper"]
        self.modelopt = lift(wheel, f"{self.at}modelopt.py", wanted, skipped | {"fnmatch": fnmatch.fnmatch})
        self.fp8 = lift(wheel, f"{self.at}fp8.py", ["Fp8Config.apply_vllm_mapper"], given)["Fp8Config"]
        mapper = lift(wheel, "vllm/model_executor/models/utils.py", ["WeightsMapper"], given | {"replace": replace})
        self.mapper = mapper["WeightsMapper"]
        never = type("Never", (), {})
        known |= {"Fp8Config": self.fp8, "QuarkConfig": self.quark["QuarkConfig"], "ModelOptMxFp8Config": self.mxfp8()}
        known |= dict.fromkeys(("DeepseekV4FP8Config", "DeepseekV41FP8Config", "OnlineLinearBase"), never)
        known |= {"should_ignore_layer": quark["should_ignore_layer"], "is_layer_skipped": skipped["is_layer_skipped"]}
        self.check, self.ignored = known[names[0]], quark["should_ignore_layer"]
        known |= {"kMxfp4Static": MXFP4, "ONLINE_SHARED_EXPERT_QUANTIZERS": {MXFP4: None}}
        known |= {"UnquantizedLinearMethod": type("Unquantized", (), {}), "OnlineLinearBase": OnlineMxfp4}
        self.check.__globals__.update(known | {"logger": SimpleNamespace(warning_once=lambda *_: None)})
        self.prefixes = {
            True: {"model.visual.": "visual.", "lm_head.": "language_model.lm_head."},
            False: {"model.language_model.": "model."},
        }
        self.prefixes[True]["model.language_model."] = "language_model.model."
        self.packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def mxfp8(self) -> type:
        return next(v for k, v in self.modelopt.items() if k.startswith("ModelOptQuantConfig") and isinstance(v, type))

    def config(self, raw: Json, prefixes: Mapping[str, str], target: str) -> Any:
        kind, mapper = raw.get("quant_method"), self.mapper(orig_to_new_prefix=dict(prefixes))
        inner = raw.get("quantization", raw)
        known = {"quark": self.quark["QuarkConfig"], "fp8": self.fp8}
        known |= {"modelopt": self.mxfp8()} if inner.get("quant_algo") == "MXFP8" else {}
        made = known.get(str(kind), SimpleNamespace)()
        vars(made).update(quant_config=copy.deepcopy(raw), packed_modules_mapping=self.packed, store_dtype=None)
        vars(made).update(online_quantization_config=Online() if target else None)
        ignored = raw.get("ignored_layers") or raw.get("modules_to_not_convert") or []
        vars(made).update(ignored_layers=ignored, ignored_layers_match_mode="exact")
        vars(made).update(weight_block_size=raw.get("weight_block_size"))
        vars(made).update(exclude_modules=inner.get("exclude_modules") or inner.get("ignore") or [])
        if kind in known:
            made.apply_vllm_mapper(mapper.get_rename_mapper())
        return made

    def answer(self, top: Json, raw: Json, options: Json) -> Answer:
        nested, target = "text_config" in top, options["vllm_online_target"]
        prefix = "language_model.model" if nested else "model"
        count = (top.get("text_config") or top)["num_hidden_layers"]
        made = self.config(raw, self.prefixes[nested], target) if raw else None
        each = [self.one(made, f"{prefix}.layers.{n}.mlp") for n in range(count)]
        found = "stops" if "stops" in each or len(set(each)) > 1 else each[0]
        return found, self.one(self.config(raw, {}, target) if raw else None, "mtp.layers.0.mlp")

    def one(self, made: Any, block: str) -> str:
        try:
            fused, _ = self.check(made, f"{block}.experts", f"{block}.shared_expert")
            if isinstance(made, self.quark["QuarkConfig"]) and not fused:
                module = f"{block}.shared_expert.gate_up_proj"
                if not self.ignored(module, made.quant_config["exclude"], self.packed):
                    made._find_matched_config(module, object)
        except (ValueError, TypeError, AttributeError):
            return "stops"
        return "fused" if fused else "no"


class Linear: ...


class Routed: ...


MXFP4 = "mxfp4"  # a key of static weights; of dynamic inputs MXFP4 + " inputs"


class OnlineMxfp4(Linear):
    activation_quant_key = MXFP4 + " inputs"


class Online:
    """`--quantization-config.targets '{"*shared_expert*": "mxfp4"}'`; how a target becomes a method is not lifted."""

    def resolve_quant_method_cls(self, layer_type: type, prefix: str) -> Any:
        return (None, None, None, SimpleNamespace(weight=MXFP4), OnlineMxfp4) if "shared_expert" in prefix else None


def _moe_target(config: Any, layer_type: type, prefix: str) -> tuple[str, str | None, type]:
    """Stands in for QuarkMoEMethod.get_moe_method_target: weight key and inputs' key by the spec of the block."""
    spec = config._find_matched_config(prefix, layer_type)
    keys = (f"{t['dtype']} {t['qscheme']} {t.get('group_size')}" if t else None for t in spec_of(spec))
    weight, inputs = (
        (MXFP4 + end if key == "fp4 per_group 32" else key) for key, end in zip(keys, ("", " inputs"), strict=True)
    )
    return str(weight), inputs, Routed


def spec_of(spec: Json) -> tuple[Json, Json]:
    return spec.get("weight") or {}, spec.get("input_tensors") or {}
