"""What readers find in an engine's files: tensors as they were written, and the tokens of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import Qwen35Error
from .engine_names import TapRule, place

AGAIN = "dump again, or delete the file to go on without it"


@dataclass
class Piece:
    """One tensor as an engine wrote it. `path` is its name below the layer; `key` is set where the tap is known."""

    raw: str
    load: Callable[[], Tensor]
    step: int = 0
    rank: int = 0
    layer: int | None = None
    path: str = ""
    part: str = ""
    dims: str = ""
    parallel: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    rows: Tensor | None = None  # indices of the step's tokens, where the tensor does not hold all of them
    key: str = ""
    chosen: Tensor | None = None  # [rows, K] of log p: the tokens that the columns are of

    @classmethod
    def named(cls, raw: str, load: Callable[[], Tensor], layer: int | None = None, **fields: Any) -> Piece:
        """A piece under an engine's name: part, layer and path are taken from it."""
        part, found, path = place(raw)
        return cls(raw, load, layer=layer if found is None else found, path=path, part=part, **fields)


def plain_values(x: Any, where: str, as_bytes: bool = False) -> Tensor:
    """A tensor of a stranger's file as plain values: no gradient, no float8. as_bytes: values of one byte are uint8, as
    parameters are compared. Error: what has no values here."""
    if not isinstance(x, Tensor):
        raise Qwen35Error("not a tensor", where=where, found=type(x).__name__)
    kinds = {"sparse": x.layout != torch.strided, "quantised": x.is_quantized, "complex": x.is_complex(),
             "on the meta device": x.is_meta}  # fmt: skip
    if odd := [kind for kind, found in kinds.items() if found]:
        raise Qwen35Error("a tensor without plain values", where=where, found=odd[0], do="dump plain values of it")
    x = x.detach()
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch can hold and hardly compute with
        return x.to(torch.int64)
    if as_bytes and x.element_size() == 1:
        return x.view(torch.uint8)
    return x.to(torch.float32) if x.is_floating_point() and x.element_size() == 1 else x


def whole_numbers(x: Any, where: str) -> Tensor:
    """Ids or positions as int64. Error: fractions, NaN or infinity, which a cast would make other numbers of."""
    x = plain_values(x, where)
    if x.is_floating_point() and not bool((x.eq(x.round()) & (x.abs() < 2**62)).all()):
        raise Qwen35Error("not whole numbers", where=where, found=x.dtype, do="dump ids and positions as integers")
    return x.to(torch.int64)


@contextmanager
def fence(what: str, where: object, do: str = AGAIN) -> Iterator[None]:
    """Whatever is raised inside becomes an error about this file: files of strangers may raise anything."""
    try:
        yield
    except Qwen35Error:
        raise
    except Exception as error:
        raise Qwen35Error(what, where=where, found=f"{type(error).__name__}: {error}"[:200], do=do) from error


def fenced(load: Callable[[], Tensor], where: str, as_bytes: bool = False) -> Tensor:
    """A piece's values; an error costs its own tap."""
    with fence("tensor cannot be read", where):
        x = plain_values(load(), where, as_bytes)
    return x


def once(x: Tensor, load: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `load` that returns x, which is mapped already, and from its second call on opens the file: x is let go, since
    pages that were read count as this process's memory while they are mapped."""
    return partial(_once, [x], load)


def _once(first: list[Tensor], load: Callable[[], Tensor]) -> Tensor:
    """A function of its own, so that a dump can be sent to another process."""
    return first.pop() if first else load()


def itself(x: Tensor) -> Tensor:
    """`partial(itself, x)` is the `load` of a tensor that is in memory already."""
    return x


@dataclass
class StepTokens:
    """The tokens of one step, flat in the order of the rows. `batch` is (B, T) for padded batches, with `mask`."""

    ids: Tensor | None = None
    positions: Tensor | None = None
    seq_lens: list[int] | None = None  # tokens of each sequence up to and including this step, cached ones too
    requests: list[Any] | None = None
    batch: tuple[int, int] | None = None
    mask: Tensor | None = None
    rotary: Tensor | None = None  # positions that the rotary embedding took, where they were dumped beside `positions`

    @property
    def count(self) -> int | None:
        return None if self.ids is None else self.ids.numel()


def readable(tokens: StepTokens, where: str, problems: list[Qwen35Error]) -> StepTokens:
    """The tokens without the fields that are not one whole number a token; each of these is a problem."""

    def row(name: str, x: Tensor | None) -> Tensor | None:
        try:
            x = None if x is None else whole_numbers(x, where)
            if x is None or x.dim() == 1 and tokens.count in (None, len(x)):
                return x
            raise Qwen35Error("tokens cannot be used", where=where, expected="whole numbers, one a token",
                              found=f"{name} {list(x.shape)}", do="dump again")  # fmt: skip
        except Qwen35Error as error:
            problems.append(error)
            return None

    ids, mask = row("ids", tokens.ids), row("mask", tokens.mask)
    positions, rotary = row("positions", tokens.positions), row("rotary", tokens.rotary)
    return replace(tokens, ids=ids, positions=positions, rotary=rotary, mask=None if mask is None else mask.bool())


@dataclass
class Source:
    """Where one tap of one step comes from: its pieces by rank, and the rule that reads them."""

    pieces: list[Piece]
    rule: TapRule
    preference: int
