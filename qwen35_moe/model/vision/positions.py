"""Images and videos in the prompt: where their tokens stand, and which embeddings go there.

A checkpoint's chat template writes `<vision_start> <image_pad> * n <vision_end>` for an image, and for a video, frame
by frame, `<x.x seconds> <vision_start> <video_pad> * n <vision_end>`. A grid `(t, h, w)` counts patches; a placeholder
stands for a block of m x m patches (m = `spatial_merge_size`), so n = t * h/m * w/m.
"""

from __future__ import annotations

from collections import deque
from itertools import groupby

import torch
from torch import Tensor

from ...errors import Qwen35Error
from ...numerics.taps import tap

TEXT, IMAGE, VIDEO = range(3)
KIND = {IMAGE: "image", VIDEO: "video"}


def token_types(input_ids: Tensor, image_token_id: int, video_token_id: int) -> Tensor:
    """0 for text, 1 for an image's placeholder, 2 for a video's; transformers' `mm_token_type_ids`."""
    return (input_ids == image_token_id) * IMAGE + (input_ids == video_token_id) * VIDEO


def check_grids(grid_thw: Tensor, spatial_merge_size: int, kind: str) -> list[tuple[int, int, int]]:
    """The grids as tuples (t, h, w), or an error for one that cannot be cut into merge blocks."""
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
        expected, found = "integers [count, 3]: (t, h, w)", f"{grid_thw.dtype} {list(grid_thw.shape)}"
        raise Qwen35Error("grids of the wrong form", where=f"{kind}_grid_thw", expected=expected, found=found)
    grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
    for i, (t, h, w) in enumerate(grids):
        if min(t, h, w) < 1 or h % spatial_merge_size or w % spatial_merge_size:
            what, do = "a grid that cannot be cut into merge blocks", "grids count patches, not pixels and not tokens"
            where, expected = f"{kind}_grid_thw[{i}]", f"t >= 1, h and w positive multiples of {spatial_merge_size}"
            raise Qwen35Error(what, where=where, expected=expected, found=(t, h, w), do=do)
    return grids


def rope_positions(
    token_types_BT: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    spatial_merge_size: int = 2,
) -> Tensor:
    """M-RoPE positions (time, height, width) of a batch: int64 [3, B, T].

    With `p` the next free position of a sequence (0 at its start):

        text     n tokens                     (p+i, p+i, p+i)                     p += n
        image    grid (t, h, w)               (p+time, p+row, p+column)           p += max(h, w) / m
        video    t frames, each an image      as t images of grid (1, h, w)

    rows and columns counted in merge blocks, `token_types_BT` as `token_types` gives them. Grids are used up in the
    order of the placeholders, sequence by sequence. Padding (`attention_mask` 0, on either side or within) is left out
    of the count and stands at position 0. Source: transformers 5.23 `get_rope_index`, which equals this on every layout
    it accepts; this accepts adjacent images too, where a run of placeholders covers several grids.
    """
    if token_types_BT.ndim != 2:
        raise Qwen35Error("token types of the wrong rank", expected="[batch, tokens]", found=list(token_types_BT.shape))
    if attention_mask is not None and attention_mask.shape != token_types_BT.shape:
        what, shape = "attention mask of the wrong shape", list(attention_mask.shape)
        raise Qwen35Error(what, expected=list(token_types_BT.shape), found=shape)
    grids: dict[int, deque[tuple[int, int, int]]] = {IMAGE: deque(), VIDEO: deque()}
    if image_grid_thw is not None:
        grids[IMAGE].extend(check_grids(image_grid_thw, spatial_merge_size, "image"))
    if video_grid_thw is not None:
        for t, h, w in check_grids(video_grid_thw, spatial_merge_size, "video"):
            grids[VIDEO].extend([(1, h, w)] * t)

    positions_3BT = torch.zeros(3, *token_types_BT.shape, dtype=torch.int64, device=token_types_BT.device)
    for b, types_T in enumerate(token_types_BT):
        kept_T = torch.ones_like(types_T, dtype=torch.bool) if attention_mask is None else attention_mask[b].bool()
        rows = _one_sequence(types_T[kept_T].tolist(), grids, spatial_merge_size, sequence=b)
        positions_3BT[:, b, kept_T] = rows.to(positions_3BT.device)
    for kind, left in grids.items():
        if left:
            found, do = f"{len(left)} left over: {list(left)}", "a video counts once for each of its frames"
            raise Qwen35Error(f"more {KIND[kind]} grids than placeholders", found=found, do=do)
    return positions_3BT


def _one_sequence(types: list[int], grids: dict[int, deque[tuple[int, int, int]]], m: int, sequence: int) -> Tensor:
    """Positions [3, len(types)] of one unpadded sequence; takes what it needs from the front of `grids`."""
    runs, p, at = [torch.zeros(3, 0, dtype=torch.int64)], 0, 0
    for kind, run in groupby(types):
        count = len(list(run))
        if kind == TEXT:
            runs.append(p + torch.arange(count).expand(3, -1))
            p += count
        while kind != TEXT and count:  # one grid, unless images follow each other without any text between
            t, h, w = grids[kind].popleft() if grids[kind] else (0, 0, 0)
            tokens = t * (h // m) * (w // m)
            if not 0 < tokens <= count:
                what, do = f"{KIND[kind]} placeholders and grids disagree", f"t * h/{m} * w/{m} placeholders"
                where, found = f"sequence {sequence}, token {at}", f"{count} placeholders in a row"
                expected = f"{tokens} placeholders for grid {(t, h, w)}" if t else "a grid for each run"
                do = f"a grid (t, h, w) stands for {do}"
                raise Qwen35Error(what, where=where, expected=expected, found=found, do=do)
            runs.append(p + torch.cartesian_prod(torch.arange(t), torch.arange(h // m), torch.arange(w // m)).T)
            p, at, count = p + max(h, w) // m, at + tokens, count - tokens
        at += count
    return torch.cat(runs, dim=1)


def embed_images(
    embeds_BTD: Tensor, token_types_BT: Tensor, image_embeds: Tensor | None = None, video_embeds: Tensor | None = None
) -> Tensor:
    """Put rows of `image_embeds` [n, D] where the image placeholders are, in order, and those of videos likewise.

    Order: sequence by sequence, from left to right. The result is a new tensor, of the wider of the dtypes.
    """
    out_BTD = embeds_BTD
    for kind, rows in ((IMAGE, image_embeds), (VIDEO, video_embeds)):
        places_BT = token_types_BT == kind
        wanted, given = int(places_BT.sum()), 0 if rows is None else rows.shape[0]
        if wanted != given:
            what, found = f"{KIND[kind]} placeholders and {KIND[kind]} embeddings disagree", f"{given} rows"
            do = "check that the prompt and the grids come from the same call of the processor"
            raise Qwen35Error(what, expected=f"{wanted} rows, one for each placeholder", found=found, do=do)
        if rows is None:
            continue
        if rows.shape[1:] != embeds_BTD.shape[2:]:
            what = f"{KIND[kind]} embeddings of the wrong width"
            raise Qwen35Error(what, expected=embeds_BTD.shape[2], found=list(rows.shape[1:]))
        out_BTD = out_BTD.to(torch.promote_types(out_BTD.dtype, rows.dtype), copy=True)
        out_BTD[places_BT] = rows.to(out_BTD)
    return tap("inputs_embeds", out_BTD)
