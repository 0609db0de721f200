"""One precision per module: what a quantization_config says a module is, and the entry that says so.

Six dialects (Quark, FP8, MXFP4, compressed-tensors, ModelOpt, GPTQ) become one question, `QuantConfig.spec_of(name)`.
It is the refactor that the reviewers of sglang PR 22948 asked for: no gate has to search strings for "shared_expert".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import Qwen35Error
from ..quant.precision import BF16, FLOATS, MXFP4, NVFP4, Activation, ModuleSpec, float_spec
from .dialects import READERS
from .exclude import ExcludeList, Hit, exclude_list
from .module_names import expand_fused, spellings

__all__ = ["BF16", "FLOATS", "MXFP4", "NVFP4", "Activation", "ModuleSpec", "QuantConfig", "Resolution", "float_spec"]


class Resolution(NamedTuple):
    """A module's spec and the entry of the configuration that decided it."""

    spec: ModuleSpec
    hit: Hit


@dataclass(frozen=True)
class QuantConfig:
    """A quantization_config: an exclude list, ordered patterns for single layers, and a default."""

    method: str
    exclude: ExcludeList
    default: ModuleSpec
    default_from: str
    layers: tuple[tuple[str, ModuleSpec], ...] = ()
    layers_from: str = "layer_quant_config"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    num_hidden_layers: int | None = None

    @classmethod
    def from_dict(cls, raw: Any, num_hidden_layers: int | None = None) -> QuantConfig:
        """From a config.json's quantization_config (or ModelOpt's hf_quant_config.json); None is an unquantised model.

        `num_hidden_layers` lets `mtp.layers.0` be found under the name `model.layers.<num_hidden_layers>`.
        An engine's loaded object (SGLang's QuarkConfig, say) will do as well, see `as_raw`.
        Error: a quant_method that is not known, named together with the ones that are.
        """
        raw = as_raw(raw)
        if not raw:
            return cls("none", exclude_list((), "quark"), BF16, "no quantization_config", (), "", {})
        method = method_of(raw)
        try:
            return cls(method=method, raw=raw, num_hidden_layers=num_hidden_layers, **READERS[method](raw))
        except Qwen35Error:
            raise
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            where, expected = "quantization_config", f"what {method} writes"
            raise Qwen35Error("cannot be read", where=where, expected=expected, found=error) from error

    def read_as(self, semantics: str) -> QuantConfig:
        """The same configuration under another reader's exclude semantics, by name (exclude.SEMANTICS)."""
        return replace(self, exclude=exclude_list(self.exclude.entries, semantics, self.exclude.list))

    def spec_of(self, module_name: str) -> Resolution:
        """The module's precision and the deciding entry: exclude list first, then layer patterns, then the default.

        The name may have any prefix, or be fused (`gate_up_proj`), or name all experts of a layer (`….mlp.experts`).
        Error: parts of a fused module with different precisions.
        """
        names = spellings(module_name, self.num_hidden_layers)
        if hit := self.exclude.hit(names):
            return Resolution(BF16, hit)
        if (parts := expand_fused(module_name)) and self.layers:
            found = [self.spec_of(part) for part in parts]
            if any(f.spec != found[0].spec for f in found):
                raise Qwen35Error(
                    "the parts of a fused module have different precisions",
                    where=module_name,
                    found="; ".join(f"{p}: {f.spec} from {f.hit}" for p, f in zip(parts, found, strict=True)),
                )
            return found[0]
        for pattern, spec in self.layers:
            for name in names:
                for test in self.exclude.semantics.layer_tests:
                    if test(pattern, name):
                        return Resolution(spec, Hit(self.layers_from, None, pattern, "layer pattern", name))
        return Resolution(self.default, Hit(self.default_from, None, "", "default"))


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a config.json: at the top, or in text_config."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, Mapping) else {})
    return next((raw for place in places if (raw := place.get("quantization_config")) not in (None, {})), None)


def method_of(raw: Mapping[str, Any]) -> str:
    """The quant_method of a quantization_config. Error: one that is not known."""
    method = raw.get("quant_method") or ("modelopt" if "quantization" in raw or "quant_algo" in raw else None)
    method = getattr(method, "value", method)  # transformers' configs hold an enum
    if not isinstance(method, str) or method not in READERS:
        raise Qwen35Error(
            "unknown quantisation method",
            where="quantization_config.quant_method",
            expected=", ".join(sorted(READERS)),
            found=repr(method),
            do="add a reader to qwen35_moe/quant/dialects.py; nothing is assumed about formats that are not known",
        )
    return method


def as_raw(quant_config: Any) -> Mapping[str, Any]:
    """The dictionary behind a quantization_config: itself; an object's `to_dict()`; or of an engine's object the
    dictionary that it keeps (`quant_config`) or its attributes, with `exclude_layers` as the exclude list."""
    raw = quant_config.to_dict() if hasattr(quant_config, "to_dict") else quant_config
    if raw is not None and not isinstance(raw, Mapping):
        if not hasattr(raw, "__dict__"):
            raise Qwen35Error(
                "quantization_config must be an object", expected="{...} or null", found=type(raw).__name__
            )
        name, kept = getattr(raw, "get_name", None), getattr(raw, "quant_config", None)
        excluded = getattr(raw, "exclude_layers", None)
        raw = dict(kept) if isinstance(kept, Mapping) else dict(vars(raw))
        raw |= {"quant_method": name()} if callable(name) else {}
        raw |= {} if excluded is None else {"exclude_layers": excluded}
    if raw and "exclude_layers" in raw:
        raw = {"quant_method": "quark", **raw, "exclude": raw["exclude_layers"]}
    return raw if not raw or raw.get("quant_method") or "exclude" not in raw else {**raw, "quant_method": "quark"}
