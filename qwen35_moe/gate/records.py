"""The records of the fusion gate: what was asked, what was decided, and what decided it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from ..errors import MOST_LAYERS, Qwen35Error
from ..quant.precision import ModuleSpec
from .declared import QuantConfig, as_dict, quantization_of
from .exclude import Hit
from .names import shared_word

SpecLookup = Callable[[str], ModuleSpec | None]
Stored = SpecLookup | Mapping[str, ModuleSpec] | None
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Options:
    """What an engine's decision depends on besides the checkpoint. Defaults: one MI355X (gfx950) with Aiter."""

    disable_shared_experts_fusion: bool = False
    enforce_shared_experts_fusion: bool = False  # SGLang >= 0.5.2x: convert a BF16 shared expert to MXFP4 on load
    a2a_backend: str = "none"
    moe_ep_size: int = 1
    hip: bool = True
    aiter: bool = True
    gfx95: bool = True
    cuda_opt_in: bool = False  # SGLang's enable_cuda_shared_expert_fusion of a model class
    cutedsl_ar_fusion: bool = False
    quantization: str = ""  # --quantization of SGLang and vLLM: what is converted while loading
    vllm_opt_in: bool = False  # VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS
    vllm_online_target: str = ""  # --quantization-config.targets '{"*shared_expert*": "mxfp4"}'
    atom_fuse_shared_expert: bool = True  # ATOM_FUSE_SHARED_EXPERT
    dp_size: int = 1
    dp_attention: bool = False
    eplb: bool = False
    moe_ep_flatten_tp_across_dp: bool = False

    @classmethod
    def from_kwargs(cls, given: Mapping[str, Any]) -> Options:
        """Checked keyword arguments: unknown names and wrong types are errors that name the alternatives."""
        known = {f.name: f.default for f in fields(cls)}
        for name, value in given.items():
            if name not in known:
                do = "".join(f"did you mean {near}?" for near in get_close_matches(name, known, 1))
                raise Qwen35Error("unknown option of the gate", expected=", ".join(known), found=name, do=do)
            if type(value) is not (kind := type(known[name])):
                what = "bad value of a gate option"
                raise Qwen35Error(what, where=name, expected=kind.__name__, found=repr(value))
        options = cls(**given)
        if options.a2a_backend not in A2A_BACKENDS:
            raise Qwen35Error("unknown all-to-all backend", expected=", ".join(A2A_BACKENDS), found=options.a2a_backend)
        return options


# SGLang 0.5.23 layers/moe/utils.py: the choices of --moe-a2a-backend.
A2A_BACKENDS = (
    *("none", "deepep", "deepep_v2", "mooncake", "nixl", "mori", "ascend_fuseep", "ascend_tp"),
    *("flashinfer", "megamoe", "flashinfer_megamoe", "pplx", "customized"),
)


@dataclass(frozen=True)
class Evidence:
    """One fact behind a decision. kind: "entry" (quotes it), "fact", "warning", "format" (the engine reads none)."""

    text: str
    kind: str = "fact"
    entry: str = ""
    index: int | None = None
    list: str = ""

    @classmethod
    def of(cls, hit: Hit, text: str = "", kind: str = "entry") -> Evidence:
        return cls(f"{text}: {hit}" if text else str(hit), kind, hit.entry, hit.index, hit.list)

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.kind == "warning" else self.text


@dataclass(frozen=True)
class Decision:
    """Whether the shared expert becomes slot E of the routed experts. True in a condition if it does.

    online: fused, but only because the engine converts the BF16 shared expert to MXFP4 while loading.
    layer: "layers.7", "mtp.layers.0", or "model" for the answer about all layers of the target model.
    """

    fused: bool
    rule: str
    reason: str
    evidence: tuple[Evidence, ...] = ()
    layer: str = "model"
    online: bool = False
    starts: bool = True  # False: the engine raises while it starts

    def __bool__(self) -> bool:
        return self.fused

    @property
    def draft(self) -> bool:
        """Whether this is about a layer of the MTP draft. The target's answer does not depend on it."""
        return self.layer.startswith("mtp.")

    @property
    def word(self) -> str:
        if not self.starts:
            return "undecided: the engine does not start"
        return ("fused, converted to MXFP4 on load" if self.online else "fused") if self.fused else "not fused"

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(e.text for e in self.evidence if e.kind == "warning")

    @property
    def entry(self) -> Evidence | None:
        """The entry of a list that decided, if one did."""
        return next((e for e in self.evidence if e.kind == "entry"), None)

    def __str__(self) -> str:
        head = f"{self.layer}: shared expert {self.word} (rule {self.rule}), because {self.reason}."
        return " ".join([head, *(f"[{e}]" for e in self.evidence)])

    def to_dict(self) -> dict[str, Any]:
        evidence = [{k: v for k, v in vars(e).items() if v not in ("", None)} for e in self.evidence]
        plain = {k: v for k, v in vars(self).items() if k != "evidence"}
        return plain | {"evidence": evidence}


Fact = Evidence | Hit | str


def _decided(fused: bool, reason: str, facts: tuple[Fact, ...], online: bool = False, starts: bool = True) -> Decision:
    evidence = (Evidence.of(f) if isinstance(f, Hit) else Evidence(f) if isinstance(f, str) else f for f in facts)
    return Decision(fused, "", reason, tuple(evidence), online=online, starts=starts)


def yes(reason: str, *facts: Fact, online: bool = False) -> Decision:
    return _decided(True, reason, facts, online)


def no(reason: str, *facts: Fact) -> Decision:
    return _decided(False, reason, facts)


def stops(reason: str, *facts: Fact) -> Decision:
    """The engine raises while it starts, whatever it would have decided."""
    return _decided(False, reason, facts, starts=False)


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block, by the canonical name of its layer."""

    name: str

    @property
    def draft(self) -> bool:
        return self.name.startswith("mtp.")

    @property
    def experts(self) -> str:
        return f"{self.name}.mlp.experts"

    @property
    def body(self) -> str:
        return f"{self.name}.mlp.shared_expert"

    @property
    def shared(self) -> tuple[str, ...]:
        """The names of the body's projections."""
        return tuple(f"{self.body}.{part}" for part in PROJECTIONS)


@dataclass(frozen=True)
class GateModel:
    """What a rule needs of a config.json. layers, drafts: those with experts, of target and draft. top: all of it.

    stored: what the tensors are. Names are canonical (`layers.3.mlp.experts.17.up_proj`); None means "not known".
    """

    layers: tuple[MoEBlock, ...]
    drafts: tuple[MoEBlock, ...]
    shared_size: int
    routed_size: int
    num_experts: int
    num_hidden_layers: int
    top: Mapping[str, Any]
    quant: QuantConfig
    stored: SpecLookup | None = None

    @property
    def nested(self) -> bool:
        """Whether the text model's settings lie in a text_config: a checkpoint with a vision tower."""
        return "text_config" in self.top

    @property
    def quant_inside(self) -> bool:
        """Whether the quantization_config lies in text_config only, where SGLang and ATOM do not look."""
        text = self.top.get("text_config")
        inside = text.get("quantization_config") if isinstance(text, Mapping) else None
        return bool(inside) and not self.top.get("quantization_config") and self.quant.raw == inside

    @classmethod
    def from_config(cls, config: Any, quant_config: Any = None, stored: Stored = None) -> GateModel:
        """From a config.json's dictionary or a config object. quant_config None: taken from the configuration."""
        lookup = stored.get if isinstance(stored, Mapping) else stored
        if isinstance(config, GateModel):
            return replace(config, stored=lookup) if lookup else config
        plain = partial(as_dict, kept="raw", what="not a configuration", expected="a dictionary or a config object")
        top = plain(config)
        text = plain(top.get("text_config") or top)
        raw = quantization_of({**top, "text_config": text}) if quant_config is None else quant_config
        missing = [k for k in ("num_hidden_layers", "moe_intermediate_size") if not isinstance(text.get(k), int)]
        if missing:
            what = "this does not look like the configuration of a MoE model"
            do = "give the config.json of the checkpoint"
            expected = "num_hidden_layers and moe_intermediate_size, at the top or in text_config"
            raise Qwen35Error(what, expected=expected, found=f"{', '.join(missing)} absent", do=do)
        count, step = text["num_hidden_layers"], text.get("decoder_sparse_step") or 1
        dense = text.get("mlp_only_layers") or []
        drafts = text.get("mtp_num_hidden_layers") or text.get("num_nextn_predict_layers") or 0
        counted = all(type(n) is int and 0 <= n <= MOST_LAYERS for n in (count, step, drafts))
        if not isinstance(dense, list) or not counted:
            where, expected = "config.json", f"a list of layers without experts; numbers of layers up to {MOST_LAYERS}"
            found = f"{dense}, {count} every {step}, {drafts} drafts"[:200]
            raise Qwen35Error("layers cannot be counted", where=where, expected=expected, found=found)
        shared, experts = (text.get(key) or 0 for key in ("shared_expert_intermediate_size", "num_experts"))
        if not all(type(n) is int for n in (shared, experts)):
            where, found = "config.json: shared_expert_intermediate_size, num_experts", f"{shared!r}, {experts!r}"
            raise Qwen35Error("wrong type", where=where, expected="integers", found=found[:200])
        word = shared_word(text.get("model_type"))
        quant = raw if isinstance(raw, QuantConfig) else QuantConfig.from_dict(raw, count, word)
        layers = tuple(MoEBlock(f"layers.{i}") for i in range(count) if (i + 1) % step == 0 and i not in dense)
        mtp = tuple(MoEBlock(f"mtp.layers.{i}") for i in range(drafts))
        return cls(layers, mtp, shared, text["moe_intermediate_size"], experts, count, top, quant, lookup)
