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
            methods = [m for m in node.body if f"{node.name}.{_name(m)}" in wanted]
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


class Fp8(SimpleNamespace):
    """Stands in for Fp8Config, of which the gate asks nothing."""

    weight_block_size = None

    @classmethod
    def from_config(cls, config: Json) -> Fp8:
        return cls()


def _name(node: ast.stmt) -> str:
    """The name of a method or of a class attribute."""
    target = getattr(node, "target", None)
    return getattr(node, "name", None) or getattr(target, "id", "")


class Sglang:
    """SGLang's chain: sizes, Quark's and ModelOpt's gates, the draft's own quantisation, what raises while building."""

    rule, pattern = "sglang-0.5.23", "sglang-*.whl"
    at = "sglang/srt/layers/quantization/"

    def __init__(self, wheel: Source):
        quiet = SimpleNamespace(
            **dict.fromkeys(("debug", "info", "info_once", "warning", "warning_once"), lambda *_: None)
        )
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
        names += ["_ONLINE_SHARED_EXPERT_MXFP4_MODEL_TYPES", "_MXFP4_TARGET_SPEC", "_parse_nvfp4_excludes"]
        names += [f"QuarkConfig.{m}" for m in ("__init__", "get_name", "from_config", "_create_online_mxfp4_config")]
        names += ["_detect_nvfp4_source", "_fp8_per_tensor_spec", "_fp8_is_dynamic_from_config_groups"]
        names += ["_mixed_precision_layer_map", "_build_mixed_precision_layer_quant_config"]
        names += ["_build_excluded_fp8_config"]
        given = known | {"Fp8Config": Fp8, "Nvfp4SourceConfig": SimpleNamespace}
        self.quark = lift(wheel, f"{self.at}quark/quark.py", names, given)
        keys = lift(wheel, f"{self.at}base_config.py", ["QuantizationConfig.get_from_keys"], stand_ins)
        wanted = [f"ModelOptFp4Config.{m}" for m in ("can_fuse_shared_expert", "from_config", "common_group_size")]
        self.modelopt = lift(
            wheel, f"{self.at}modelopt_quant.py", [*wanted, "ModelOptFp8Config.from_config"], stand_ins
        )
        for name in ("ModelOptFp4Config", "ModelOptFp8Config"):
            self.modelopt[name].get_from_keys = staticmethod(keys["QuantizationConfig"].get_from_keys)
            self.modelopt[name].__init__ = _kept
        methods = {name: SimpleNamespace(override_quantization_method=lambda *_: None) for name in METHODS}
        asked = stand_ins | {"QUANTIZATION_METHODS": methods, "is_hip": lambda: False}
        asked |= {"get_platform": lambda: SimpleNamespace(is_sm100=True)}
        asked["is_qwen3_5_mtp_draft"] = lambda _: True
        names = ["unwrap_modelopt_quantization_config", "REQUANTIZATION_METHODS", "ModelConfig._verify_quantization"]
        names.append("ModelConfig._parse_modelopt_quant_config")
        self.model = lift(wheel, "sglang/srt/configs/model_config.py", names, asked)["ModelConfig"]
        backend = SimpleNamespace(is_deepep=lambda: False, is_deepep_v2=lambda: False, is_mori=lambda: False)
        asked = stand_ins | {"get_moe_a2a_backend": lambda: backend}
        self.gate = lift(wheel, "sglang/srt/models/qwen2_moe.py", ["can_fuse_shared_expert"], asked)
        names = ["_mtp_quant_config"]
        self.draft = lift(wheel, "sglang/srt/models/qwen3_5_mtp.py", names, stand_ins)["_mtp_quant_config"]
        source = wheel.read("sglang/srt/models/qwen3_5.py").decode()
        packed = re.search(r"packed_modules_mapping = (\{.*?\n    \})", source, re.S)
        self.packed = ast.literal_eval(packed[1]) if packed else {}

    def config(self, top: Json, raw: Json, word: str, draft: bool) -> Any:
        """The object that SGLang makes of a quantization_config and of --quantization."""
        about = SimpleNamespace(**{"hf_config": None} | top)
        kept = {"hf_config": about, "packed_modules_mapping": self.packed}
        beside, found = "quantization" in raw, copy.deepcopy(raw) or None
        if found and found.get("quant_method") in (None, "modelopt"):
            parsed = self.model._parse_modelopt_quant_config(None, found if beside else {"quantization": found})
            found = parsed if beside else found | (parsed or {})
        asked = SimpleNamespace(quantization=word or None, is_draft_model=draft, is_draft_quantization_explicit=False)
        vars(asked).update(
            hf_config=None, _parse_quant_hf_config=lambda: found, _find_quant_modelslim_config=lambda: None
        )
        self.model._verify_quantization(asked)
        method, quark = asked.quantization, self.quark["QuarkConfig"]
        if method is None:
            return None
        if method == "quark_mxfp4":
            # get_quant_config: hf_quant_config.json beside an unquantised config.json is read where it says FP4
            inner = raw["quantization"] | {"quant_method": "modelopt"} if beside else found or {}
            if not inner or beside and "FP4" not in str(inner.get("quant_algo")).upper():
                return quark(online_scheme=method, hf_config=about)
            return quark.from_config(inner | kept | {"requantization_method": method})
        if method == "quark":
            if not found:
                raise ValueError("QuarkConfig() without arguments")
            return quark(quant_config=found | kept, hf_config=about, is_prequantized=True)
        if method in ("modelopt_fp4", "modelopt", "modelopt_fp8") and raw.get("quant_method") != "fp8" and raw:
            name = "ModelOptFp4Config" if method == "modelopt_fp4" else "ModelOptFp8Config"
            made = self.modelopt[name].from_config(raw if beside else found)
        else:
            inner = raw.get("quantization", raw)
            made = SimpleNamespace(quantized_layers=inner.get("quantized_layers") or {})
            made.is_checkpoint_nvfp4_serialized = False
        made.get_name = lambda: method
        return made

    def answer(self, top: Json, raw: Json, options: Json) -> Answer:
        self.moe.enforce_shared_experts_fusion = options["enforce_shared_experts_fusion"]
        prefix = "model.language_model" if "text_config" in top else "model"
        text = SimpleNamespace(**(top.get("text_config") or top))
        blocks, found = [f"{prefix}.layers.{n}.mlp" for n in range(text.num_hidden_layers)], []
        others = f"{prefix}.layers.0.linear_attn.out_proj", "mtp.layers.0.self_attn.o_proj"
        for draft, at, other in zip((False, True), (blocks, ["mtp.layers.0.mlp"]), others, strict=True):
            try:
                made = self.config(top, raw, options["quantization"], draft)
                found.append(self.one(text, self.draft(made) if draft else made, at, other))
            except (ValueError, TypeError, AttributeError, NotImplementedError):  # the last but one: null
                found.append("stops")
        return found[0], found[1]

    def one(self, text: Any, made: Any, blocks: list[str], other: str) -> str:
        try:
            fused = self.gate["can_fuse_shared_expert"](text, made)
            if made is not None and made.get_name() == "quark":
                for block in blocks:
                    bodies = [] if fused else [f"{block}.shared_expert.gate_up_proj"]
                    for module in (f"{block}.experts", *bodies, other):
                        if not self.quark["should_ignore_layer"](module, made.exclude_layers, self.packed):
                            spec = made._find_matched_config(module, None)
                            made._get_block_fp8_config(spec, self.packed)
                            made._is_mx_fp4(spec.get("weight"), spec.get("input_tensors"))  # get_moe_scheme
        except (ValueError, TypeError, AttributeError):
            return "stops"
        return "fused" if fused else "no"


def _kept(self: Any, serialized: bool = True, kv: Any = None, group: Any = None, excluded: Any = (), packed: Any = None,
          **_: Any) -> None:  # fmt: skip
    vars(self).update(is_checkpoint_nvfp4_serialized=serialized, exclude_modules=excluded)


METHODS = (
    *("fp8", "mxfp8", "quark", "quark_mxfp4", "modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed", "awq"),
    *("nvfp4_online", "w4afp8", "gptq", "compressed-tensors"),
)


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
        methods += ("get_quant_method_target", "_is_nvfp4", "_is_fp8_w4a8")
        known |= {"RoutedExperts": Routed, "LinearBase": Linear, "Attention": type("Attention", (), {})}
        moe = {"QuarkMoEMethod": SimpleNamespace(get_moe_method_target=_moe_target)}
        moe |= dict.fromkeys(("UnquantizedFusedMoEMethod", "UnquantizedLinearMethod", "QuarkKVCacheMethod"), object)
        moe |= {"QuantKeyMatch": lambda found, activation, weight: found}
        moe |= dict.fromkeys(("kNvfp4Dynamic", "kNvfp4Static", "kFp8DynamicTokenSym", "kFp8StaticTensorSym"))
        moe |= {"kInt4W4A8StaticChannelSym": None}
        at, given_quark = f"{self.at}quark/quark.py", known | quark | moe | {"fnmatch": fnmatch}
        self.quark = lift(wheel, at, [f"QuarkConfig.{m}" for m in methods], given_quark)
        skipped = lift(wheel, f"{self.at}utils/quant_utils.py", ["is_layer_skipped"], given)
        wanted = ["ModelOptQuantConfigBase.is_layer_excluded", "ModelOptQuantConfigBase.apply_vllm_mapper"]
        wanted += ["ModelOptQuantConfigBase.from_config", "LINEAR_ALGOS", "QUANT_ALGOS"]
        self.modelopt = lift(wheel, f"{self.at}modelopt.py", wanted, skipped | {"fnmatch": fnmatch.fnmatch})
        keys = lift(wheel, f"{self.at}base_config.py", ["QuantizationConfig.get_from_keys"], given)
        self.mxfp8().get_from_keys = staticmethod(keys["QuantizationConfig"].get_from_keys)
        self.mxfp8()._from_config = staticmethod(lambda **found: found)
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
        found = self.mxfp8().from_config(raw) if kind == "modelopt" else {}
        known |= {"modelopt": self.mxfp8()} if inner.get("quant_algo") == "MXFP8" else {}
        made = known.get(str(kind), SimpleNamespace)()
        vars(made).update(quant_config=copy.deepcopy(raw), packed_modules_mapping=self.packed, store_dtype=None)
        vars(made).update(online_quantization_config=Online() if target else None)
        ignored = raw.get("ignored_layers") or raw.get("modules_to_not_convert") or []
        vars(made).update(ignored_layers=ignored, ignored_layers_match_mode="exact")
        vars(made).update(weight_block_size=raw.get("weight_block_size"))
        vars(made).update(exclude_modules=found.get("exclude_modules"))
        if kind in known:
            made.apply_vllm_mapper(mapper.get_rename_mapper())
        return made

    def answer(self, top: Json, raw: Json, options: Json) -> Answer:
        nested, target = "text_config" in top, options["vllm_online_target"]
        prefix = "language_model.model" if nested else "model"
        count = (top.get("text_config") or top)["num_hidden_layers"]
        word, method = options["quantization"], raw.get("quant_method", "")
        if word not in ("", method) and method in ("quark", "fp8", "compressed-tensors"):  # _verify_quantization
            return "stops", "stops"
        try:
            made, draft = (self.config(raw, names, target) if raw else None for names in (self.prefixes[nested], {}))
        except ValueError:
            return "stops", "stops"
        if word and not raw:
            made = draft = SimpleNamespace(online_quantization_config=None)  # OnlineQuantizationConfig
        if draft and any(k.startswith("-:") and "mtp" in k for k in raw.get("dynamic", {})):
            draft = None  # qwen3_5_mtp.py: Qwen3_5MultiTokenPredictor.__init__
        each = [self.one(made, f"{prefix}.layers.{n}.mlp", "linear_attn.out_proj") for n in range(count)]
        found = "stops" if "stops" in each or len(set(each)) > 1 else each[0]
        return found, self.one(draft, "mtp.layers.0.mlp", "self_attn.o_proj")

    def one(self, made: Any, block: str, other: str) -> str:
        try:
            fused, _ = self.check(made, f"{block}.experts", f"{block}.shared_expert")
            if isinstance(made, self.quark["QuarkConfig"]):
                made.get_quant_method_target(f"{block}.experts", Routed)
                module = f"{block}.shared_expert.gate_up_proj"
                if not fused and not self.ignored(module, made.quant_config["exclude"], self.packed):
                    spec = made._find_matched_config(module, object)
                    if multi(spec) and not made._is_nvfp4(*spec_of(spec)):  # _get_scheme_cls_from_config
                        raise ValueError("no scheme")
                module = f"{block.removesuffix('mlp')}{other}"
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
    if multi(spec):
        if not (config._is_nvfp4(*spec_of(spec)) or config._is_fp8_w4a8(*spec_of(spec))):
            raise ValueError("Unsupported FusedMoe scheme")
        return "in two steps", None, Routed
    keys = (f"{t['dtype']} {t['qscheme']} {t.get('group_size')}" if t else None for t in spec_of(spec))
    weight, inputs = (
        (MXFP4 + end if key == "fp4 per_group 32" else key) for key, end in zip(keys, ("", " inputs"), strict=True)
    )
    return str(weight), inputs, Routed


def multi(spec: Json) -> bool:
    return any(isinstance(step, list) and len(step) > 1 for step in (spec.get("weight"), spec.get("input_tensors")))


def spec_of(spec: Json) -> tuple[Json, Json]:
    return spec.get("weight") or {}, spec.get("input_tensors") or {}
