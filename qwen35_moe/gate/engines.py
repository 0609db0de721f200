"""The table of all engines' rules, each with the version that it was read from.

They are here to be compared and warned about; `strict` is the rule to use. `docs/extending.md` says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..quant.precision import BF16, ModuleSpec
from .atom import atom, atom_first_entry, atom_multimodal
from .common import Rule
from .declared import QuantConfig
from .names import ATOM, ATOM_MULTIMODAL, SGLANG, VLLM, Namespace, fused_name
from .records import Decision, GateModel
from .sglang import plain_draft, sglang_0_5_23, sglang_22948
from .vllm import all_or_none, vllm_0_33


@dataclass(frozen=True)
class RuleInfo:
    """A rule, and how the loader that goes with it reads the exclude list.

    names: the engine's names for modules; None where any spelling counts. by_layer: the answer may differ from layer to
    layer. together: what the engine makes of the answers for all layers. fp8: how it reads lists of the method fp8.
    plain_draft: whether it builds the draft of a model without a quantisation.
    """

    decide: Rule
    semantics: str
    source: str
    names: Namespace | None = None
    by_layer: bool = True
    together: Callable[[list[Decision]], list[Decision]] = list
    fp8: str = "fp8"
    plain_draft: Callable[[GateModel], bool] = lambda _: False

    def sees(self, model: GateModel) -> GateModel:
        """The model as the engine reads its config.json."""
        unseen = model.quant_inside and self.semantics != "vllm"
        return replace(model, quant=QuantConfig.from_dict(None)) if unseen else model

    def takes(self, quant: QuantConfig, module: str) -> ModuleSpec:
        """What the loader takes a projection for. SGLang and vLLM ask by the name of the fused module first."""
        fused = fused_name(module) if self.semantics != "atom" else ""
        return BF16 if fused and quant.exclude.direct(quant.names(fused)) else quant.spec_of(module).spec

    def reading(self, model: GateModel) -> QuantConfig:
        """A model's configuration as the engine's loader takes it."""
        model = self.sees(model)
        how = {"quark": self.semantics, "fp8": self.fp8}.get(model.quant.method)
        return model.quant.read_as(how, self.names, model.nested) if how else model.quant


ENGINE_RULES = {
    "sglang-22948": RuleInfo(sglang_22948, "sglang", "sgl-project/sglang #22948, the seed PR", SGLANG, by_layer=False),
    "sglang-0.5.23": RuleInfo(
        sglang_0_5_23, "sglang", "SGLang 0.5.23", SGLANG, False, plain_draft=lambda m: plain_draft(m) is not None
    ),
    "vllm-0.33": RuleInfo(vllm_0_33, "vllm", "vLLM 0.33", VLLM, together=all_or_none, fp8="vllm-fp8"),
    "atom-ffdf3bb5": RuleInfo(atom, "atom", "ROCm/ATOM ffdf3bb5, with prefixes", ATOM, fp8="atom"),
    "atom-00afbe32": RuleInfo(
        atom_multimodal, "atom", "ROCm/ATOM 00afbe32, with a vision tower", ATOM_MULTIMODAL, fp8="atom"
    ),
    "atom-first-entry": RuleInfo(atom_first_entry, "atom", "ROCm/ATOM, without prefixes", by_layer=False),
}

# An engine's name alone means its newest version.
NEWEST = {"sglang": "sglang-0.5.23", "vllm": "vllm-0.33", "atom": "atom-ffdf3bb5"}
