"""Deciding functions of SGLang and vLLM, lifted out of their wheels by `ast`, and what they ask of a machine stood in.

Nothing is installed: functions, methods and constants are compiled one by one, without their imports.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, Optional, cast

Json = dict[str, Any]
Answer = tuple[str, str]  # of the target and of the draft: "fused", "no" or "stops"
TYPING = {"Any": Any, "Optional": Optional, "Iterable": Iterable, "Mapping": Mapping, "Literal": Literal, "cast": cast}
TYPING |= {"Dict": dict, "List": list, "MappingProxyType": MappingProxyType, "dataclass": dataclass, "field": field}


class WithoutImports(ast.NodeTransformer):
    """Drops imports inside functions, decorators and annotations: the names are stand-ins."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.Pass()

    visit_Import = visit_ImportFrom  # type: ignore[assignment]


def lift(wheel: zipfile.ZipFile, module: str, names: Iterable[str], given: Json) -> Json:
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
    """SGLang's chain: Quark's and ModelOpt's gates, the draft's own quantisation, what raises while building."""

    rule, options = "sglang-0.5.23", {"enforce_shared_experts_fusion": False}
    at = "sglang/srt/layers/quantization/"

    def __init__(self, wheel: zipfile.ZipFile):
        quiet = SimpleNamespace(debug=lambda *_: None, warning_once=lambda *_: None)
        stand_ins: Json = {
            "re": re,
            "fnmatch": fnmatch,
            "logger": quiet,
            "is_hip": lambda: True,
            "is_npu": lambda: False,
        }
        stand_ins["torch"] = SimpleNamespace(nn=SimpleNamespace(Module=SimpleNamespace))
        stand_ins["get_exec"] = lambda: SimpleNamespace(moe=SimpleNamespace(enforce_shared_experts_fusion=False))
        ignoring = ("deep_compare", "should_ignore_layer", "check_equal_or_regex_match", "_is_equal_or_regex_match")
        known = lift(wheel, f"{self.at}quark/utils.py", ignoring, stand_ins)
        methods = (
            "_find_matched_config",
            "_fused_expert_config",
            "_is_draft_layer",
            "shared_expert_excluded_from_quant",
        )
        methods += ("shared_expert_online_mxfp4_supported", "can_fuse_shared_expert", "_get_block_fp8_config")
        names = ["_MOE_SHARED_EXPERT_QUANT_LAYER0_BASES", "_MOE_SHARED_EXPERT_QUANT_DRAFT_BASES"]
        names += ["_SHARED_EXPERT_BODY_PROJ_SUFFIXES", *(f"QuarkConfig.{m}" for m in methods)]
        self.quark = lift(wheel, f"{self.at}quark/quark.py", names, known | {"Fp8Config": SimpleNamespace})
        fp4 = lift(wheel, f"{self.at}modelopt_quant.py", ["ModelOptFp4Config.can_fuse_shared_expert"], stand_ins)
        self.fp4 = fp4["ModelOptFp4Config"]
        self.draft = lift(wheel, "sglang/srt/models/qwen3_5_mtp.py", ["_mtp_quant_config"], stand_ins)[
            "_mtp_quant_config"
        ]
        source = wheel.read("sglang/srt/models/qwen3_5.py").decode()
        packed = re.search(r"packed_modules_mapping = (\{.*?\n    \})", source, re.S)
        self.packed = ast.literal_eval(packed[1]) if packed else {}

    def config(self, top: Json, raw: Json) -> Any:
        made = (self.quark["QuarkConfig"] if raw["quant_method"] == "quark" else self.fp4)()
        excluded = raw.get("exclude") if raw["quant_method"] == "quark" else raw.get("ignore") or []
        vars(made).update(quant_config=raw, exclude_layers=excluded, exclude_modules=excluded, is_prequantized=True)
        vars(made).update(num_hidden_layers=top.get("num_hidden_layers"), num_nextn_predict_layers=0)
        vars(made).update(packed_modules_mapping=self.packed, model_type=top.get("model_type"))
        made.get_name = lambda: {"quark": "quark"}.get(raw["quant_method"], "modelopt_fp4")
        made.is_checkpoint_nvfp4_serialized = True
        return made

    def answer(self, top: Json, raw: Json) -> Answer:
        made, prefix = self.config(top, raw), "model.language_model" if "text_config" in top else "model"
        layers = (top.get("text_config") or top)["num_hidden_layers"]
        target = self.one(made, [f"{prefix}.layers.{n}.mlp" for n in range(layers)])
        try:
            draft = self.draft(made)
        except TypeError:  # exclude: null
            return target, "stops"
        return target, "fused" if draft is None else self.one(draft, ["mtp.layers.0.mlp"])

    def one(self, made: Any, blocks: list[str]) -> str:
        try:
            fused = made.can_fuse_shared_expert()
            if made.get_name() == "quark":
                for block in blocks:
                    for module in (f"{block}.experts", *([] if fused else [f"{block}.shared_expert.gate_up_proj"])):
                        if not self.quark["should_ignore_layer"](module, made.exclude_layers, self.packed):
                            made._get_block_fp8_config(made._find_matched_config(module, None), self.packed)
        except (ValueError, TypeError, AttributeError):
            return "stops"
        return "fused" if fused else "no"


class Vllm:
    """vLLM's chain: mapper, compatibility check layer by layer, all layers or none, what raises while building."""

    rule, options = "vllm-0.33", {"vllm_opt_in": True}
    at = "vllm/model_executor/layers/quantization/"

    def __init__(self, wheel: zipfile.ZipFile):
        names = ("is_shared_expert_quant_fse_compatible", "find_matching_patterns", "is_equal_or_regex_match")
        given: Json = {"re": re, "fnmatch": fnmatch.fnmatch}
        known = lift(wheel, f"{self.at}utils/config_utils.py", names, given)
        quark = lift(wheel, f"{self.at}quark/utils.py", ("should_ignore_layer", "deep_compare"), known)
        methods = ("get_layer_quant_config_from_name", "_find_matched_config", "apply_vllm_mapper")
        self.quark = lift(
            wheel, f"{self.at}quark/quark.py", [f"QuarkConfig.{m}" for m in methods], quark | {"fnmatch": fnmatch}
        )
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
        self.check.__globals__.update(known | {"kMxfp4Static": None, "logger": SimpleNamespace(warning_once=print)})
        self.prefixes = {
            True: {"model.visual.": "visual.", "lm_head.": "language_model.lm_head."},
            False: {"model.language_model.": "model."},
        }
        self.prefixes[True]["model.language_model."] = "language_model.model."
        self.packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def mxfp8(self) -> type:
        return next(v for k, v in self.modelopt.items() if k.startswith("ModelOptQuantConfig") and isinstance(v, type))

    def config(self, raw: Json, prefixes: Mapping[str, str]) -> Any:
        kind, mapper = raw["quant_method"], self.mapper(orig_to_new_prefix=dict(prefixes))
        made = {"quark": self.quark["QuarkConfig"], "fp8": self.fp8, "modelopt": self.mxfp8()}[kind]()
        vars(made).update(quant_config=copy.deepcopy(raw), packed_modules_mapping=self.packed, store_dtype=None)
        vars(made).update(online_quantization_config=None, ignored_layers=raw.get("ignored_layers", []))
        vars(made).update(weight_block_size=raw.get("weight_block_size"), ignored_layers_match_mode="exact")
        vars(made).update(exclude_modules=raw.get("ignore") or [])
        made.apply_vllm_mapper(mapper.get_rename_mapper())
        return made

    def answer(self, top: Json, raw: Json) -> Answer:
        nested = "text_config" in top
        prefix = "language_model.model" if nested else "model"
        count = (top.get("text_config") or top)["num_hidden_layers"]
        made = self.config(raw, self.prefixes[nested])
        each = [self.one(made, f"{prefix}.layers.{n}.mlp") for n in range(count)]
        target = "stops" if "stops" in each or len(set(each)) > 1 else each[0]
        return target, self.one(self.config(raw, {}), "mtp.layers.0.mlp")

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
