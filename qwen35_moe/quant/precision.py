"""The precision of a stored weight: the record that a quantisation config declares and that the bytes show."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Qwen35Error

FLOATS = ("bf16", "f16", "f32", "f64")


def _numbers(what: str, *values: object) -> None:
    """Error: a list or an object of JSON in a number's place."""
    if odd := [x for x in values if isinstance(x, (list, dict))]:
        raise TypeError(f"{what}: a number was expected, found {str(odd[0])[:100]}")


@dataclass(frozen=True)
class Activation:
    """How an engine quantises a module's input before the product: W4A4 and W4A16 are two different functions."""

    dtype: str
    dynamic: bool = True
    group: int | None = None

    def __post_init__(self) -> None:
        _numbers("group_size", self.group)

    def __str__(self) -> str:
        return f"{self.dtype}{f'/{self.group}' if self.group else ''} {'dynamic' if self.dynamic else 'static'}"


@dataclass(frozen=True)
class ModuleSpec:
    """The precision of one module's weight.

    kind: a float ("bf16", "f32", ...), or "mxfp4", "nvfp4", "fp8-block", "fp8-channel", "fp8-tensor", "int4", ...
    block: elements that share a scale, (32,) along a row for MXFP4, (128, 128) for FP8 blocks. scale: its dtype.
    activation: None if inputs are not quantised, or if the source cannot tell (bytes never can).
    """

    kind: str
    block: tuple[int, ...] = ()
    scale: str = ""
    activation: Activation | None = None

    def __post_init__(self) -> None:
        _numbers("size of a block", *self.block)

    @property
    def is_float(self) -> bool:
        return self.kind in FLOATS

    def same_bytes(self, other: ModuleSpec) -> bool:
        """Whether weights of both may lie in one packed tensor. Activations and the scale's dtype do not matter.

        "int" is an integer format whose headers do not tell its width.
        """
        kinds = {self.kind, other.kind}
        alike = len(kinds) == 1 or "int" in kinds and all(kind.startswith("int") for kind in kinds)
        return alike and (self.block == other.block or not self.block or not other.block)

    def __str__(self) -> str:
        block = "x".join(map(str, self.block))
        text = self.kind + (f" (block {block})" if block else "")
        return text + (f", activations {self.activation}" if self.activation else "")


BF16 = ModuleSpec("bf16")
MXFP4 = ModuleSpec("mxfp4", (32,), "e8m0")
NVFP4 = ModuleSpec("nvfp4", (16,), "e4m3")
MXFP8 = ModuleSpec("mxfp8", (32,), "e8m0")
UNSTATED = ModuleSpec("quantised")  # in a format that a configuration does not say


def float_spec(dtype: str) -> ModuleSpec:
    """The spec of an unquantised tensor from its safetensors dtype: "BF16" -> bf16."""
    if dtype.lower() not in FLOATS:
        raise Qwen35Error("not a float dtype", expected=", ".join(FLOATS), found=dtype)
    return ModuleSpec(dtype.lower())
