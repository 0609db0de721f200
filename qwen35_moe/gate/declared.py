"""What a quantization_config says of one module, whatever method wrote it, and the entry that says so.

`QuantConfig.spec_of(name)` answers that for every method of `dialects.DIALECT_READERS`. The reviewers of sglang PR
22948 asked for such a question, so that no rule need search strings for "shared_expert".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import Qwen35Error
from ..quant.precision import BF16, UNSTATED, ModuleSpec
from .dialects import ALIASES, DIALECT_READERS, Declared
from .exclude import EntryIndex, ExcludeList, Hit
from .names import Namespace, parts_of, spellings


class Resolution(NamedTuple):
    """A module's spec and the entry of the configuration that decided it."""

    spec: ModuleSpec
    hit: Hit


@dataclass(frozen=True, kw_only=True)
class QuantConfig(Declared):
    """A quantization_config: what it declares, how it was written (`raw`), and under which names it is asked."""

    method: str
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    num_hidden_layers: int | None = None
    shared_word: str = "shared_expert"
    namespace: Namespace | None = None  # None: any spelling of a name counts
    views: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(
        cls, raw: Any, num_hidden_layers: int | None = None, shared_word: str = "shared_expert"
    ) -> QuantConfig:
        """From a config.json's quantization_config (or ModelOpt's hf_quant_config.json); None is an unquantised model.

        `num_hidden_layers` lets `mtp.layers.0` be found under the name `model.layers.<num_hidden_layers>`.
        An engine's loaded object (SGLang's QuarkConfig, say) will do as well, see `as_raw`. A method without a reader
        says nothing of any module: each is `UNSTATED`.
        """
        raw = as_raw(raw)
        if not raw:
            return cls(ExcludeList((), "quark"), BF16, "no quantization_config", layers_from="", method="none")
        method = stated_method(raw)
        if method not in DIALECT_READERS:
            source = f"quant_method {method!r}, which has no reader"
            return cls(ExcludeList((), "quark"), UNSTATED, source, method=method, raw=raw)
        try:
            said = vars(DIALECT_READERS[method](raw))
            return cls(**said, method=method, raw=raw, num_hidden_layers=num_hidden_layers, shared_word=shared_word)
        except Qwen35Error:
            raise
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            where, expected = "quantization_config", f"what {method} writes"
            raise Qwen35Error("cannot be read", where=where, expected=expected, found=error) from error

    def read_as(self, semantics: str, namespace: Namespace | None = None) -> QuantConfig:
        """The same configuration under a reading (`readings.SEMANTICS`), with an engine's names for modules."""

        def made() -> QuantConfig:
            layers, names = self.layers, namespace
            if names is not None:
                names = replace(names, layers=self.num_hidden_layers or 0)
                layers = tuple({names.key(k): s for k, s in layers}.items())
            read = names.entries if names is not None else None
            exclude = ExcludeList(self.exclude.written, semantics, self.exclude.key, read)
            return replace(self, exclude=exclude, layers=layers, namespace=names, views={})

        return self.view((semantics, namespace), made)

    def without_exclusions(self) -> QuantConfig:
        """The same, with nothing excluded."""
        nothing = ExcludeList((), self.exclude.semantics.name, self.exclude.key)
        return self.view("nothing excluded", lambda: replace(self, exclude=nothing, views={}))

    def view(self, key: object, make: Callable[[], Any]) -> Any:
        """`make()`, called once for a key: what was found in this configuration is kept with it."""
        if key not in self.views:
            self.views[key] = make()
        return self.views[key]

    @cached_property
    def layer_index(self) -> EntryIndex:
        return EntryIndex([pattern for pattern, _ in self.layers], [spec for _, spec in self.layers])

    @cached_property
    def key_specs(self) -> dict[str, Any]:
        """Key of layer_quant_config -> the spec as Quark writes it; of keys that are renamed alike, the last."""
        given, names = self.raw.get("layer_quant_config") or {}, self.namespace
        return {names.key(key) if names else key: spec for key, spec in given.items()}

    def quark_specs(self, name: str) -> Iterator[tuple[str, Any]]:
        """(key, spec as Quark writes it) of each key of layer_quant_config that names a module, in their order."""
        found = self.layer_index.naming(name, self.exclude.semantics.layer_tests)
        return ((key := self.layers[i][0], self.key_specs[key]) for i, _ in found)

    def names(self, module: str) -> tuple[str, ...]:
        """The names of a module that entries are compared with."""
        if self.namespace is not None:
            return (self.namespace.module(module),)
        return spellings(module, self.num_hidden_layers, self.shared_word)

    def excluded(self, module: str) -> Hit | None:
        """The entry that excludes a module. Error: only some parts of a merged module are excluded."""
        return self.exclude.hit(self.names(module))

    def spec_of(self, module_name: str) -> Resolution:
        """The module's spec and the deciding entry: exclude list first, then patterns of names, then the default.

        The name may have any prefix, be a merged module's, or name all experts of a layer (`….mlp.experts`).
        Error: parts of a merged module with different specs.
        """
        if hit := self.excluded(module_name):
            return Resolution(BF16, hit)
        if (parts := parts_of(module_name)) and self.layers:
            found = [self.spec_of(part) for part in parts]
            if any(f.spec != found[0].spec for f in found):
                said = "; ".join(f"{p}: {f.spec} from {f.hit}" for p, f in zip(parts, found, strict=True))
                what = "the parts of a fused module have different precisions"
                raise Qwen35Error(what, where=module_name, found=said)
            return found[0]
        tests, names = self.exclude.semantics.layer_tests, self.names(module_name) if self.layers else ()
        if keys := [at for name in names if (at := next(self.layer_index.naming(name, tests), None))]:
            pattern, spec = self.layers[min(keys)[0]]
            return Resolution(spec, Hit(self.layers_from, None, pattern, "layer pattern"))
        return Resolution(self.default, Hit(self.default_from, None, "", "default"))


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a config.json: at the top, or in text_config."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, Mapping) else {})
    return next((raw for place in places if (raw := place.get("quantization_config")) not in (None, {})), None)


def with_hf_quant_config(config: Mapping[str, Any], beside: Any) -> dict[str, Any]:
    """A config.json with the content of hf_quant_config.json as its quantization_config, where it has none.

    ModelOpt writes that file beside config.json, older versions only there (vllm 22073, sglang 13919).
    """
    if quantization_of(config) is not None or not isinstance(beside, Mapping) or not beside:
        return dict(config)
    return {**config, "quantization_config": {"quant_method": "modelopt", **beside}}


def stated_method(raw: Mapping[str, Any]) -> str:
    """The quant_method of a quantization_config, in the one spelling that is used here; "" where none is stated."""
    method = raw.get("quant_method") or ("modelopt" if "quantization" in raw or "quant_algo" in raw else "")
    method = method.value if isinstance(method, Enum) else method  # transformers' configs hold an enum
    if not isinstance(method, str):
        where, expected = "quantization_config.quant_method", "a word"
        raise Qwen35Error("unknown quantisation method", where=where, expected=expected, found=repr(method)[:200])
    return ALIASES.get(method, method)


def method_of(raw: Mapping[str, Any]) -> str:
    """The quant_method of a quantization_config. Error: one that is not in DIALECT_READERS."""
    method = stated_method(raw)
    if method not in DIALECT_READERS:
        where, expected = "quantization_config.quant_method", ", ".join(sorted(DIALECT_READERS))
        do = "add a reader to qwen35_moe/gate/dialects.py; nothing is assumed about formats that are not known"
        raise Qwen35Error("unknown quantisation method", where=where, expected=expected, found=repr(method), do=do)
    return method


def as_raw(quant_config: Any) -> Mapping[str, Any]:
    """A quantization_config as a dictionary; an engine's object for it keeps one as `quant_config`.

    `exclude_layers`, as engines call it, becomes the exclude list; who states a list and no method means Quark's.
    """
    what, expected = "quantization_config must be an object", "{...} or null"
    raw = {} if quant_config is None else dict(as_dict(quant_config, "quant_config", what, expected))
    name, listed = getattr(quant_config, "get_name", None), getattr(quant_config, "exclude_layers", None)
    raw |= {"quant_method": name()} if callable(name) else {}
    raw |= {} if listed is None else {"exclude_layers": listed}
    if "exclude_layers" in raw:
        raw["exclude"] = raw["exclude_layers"]
    return raw | {"quant_method": "quark"} if "exclude" in raw and not raw.get("quant_method") else raw


def as_dict(config: Any, kept: str, what: str, expected: str) -> Mapping[str, Any]:
    """A dictionary itself; of an object its `to_dict()`, the dictionary that it keeps under a name, or its attributes.

    Error: neither a dictionary nor such an object; what, expected: as the error says it.
    """
    if isinstance(config, Mapping):
        return config
    if callable(getattr(config, "to_dict", None)):
        return config.to_dict()
    if not hasattr(config, "__dict__"):
        raise Qwen35Error(what, expected=expected, found=type(config).__name__)
    inner = getattr(config, kept, None)
    return inner if isinstance(inner, Mapping) and inner else vars(config)
