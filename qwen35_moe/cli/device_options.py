"""Options of commands that load a model: where it computes, and the images of its prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import Qwen35Error
from ..run.origin import usable
from ..run.placement import AUTOMATIC
from ..run.prompt import Images, load_images
from ..trace.images import read_images
from ..untrusted import read_json


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--device-map", metavar="MAP", help="spread the layers over all GPUs and CPU memory, by accelerate: "
        'auto, balanced, balanced_low_0 or sequential, or a JSON file such as {"": "cpu", "layers.3": 0}',
    )  # fmt: skip
    parser.add_argument("--max-memory", metavar="0=20GB,cpu=30GB",
                        help="memory that --device-map may use on each device")  # fmt: skip
    add_ignored_keys(parser)


def add_ignored_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ignore-config-keys", type=lambda text: tuple(text.split(",")), default=(),
                        metavar="KEY,...",
                        help="unknown keys of config.json that you know to be harmless")  # fmt: skip


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """These options as arguments of `load`."""
    if args.device_map is None:
        if args.max_memory is not None:
            raise Qwen35Error("a limit without a device map", where="--max-memory", expected="--device-map as well")
        usable(args.device, f"--device {args.device}")
        return {"device": args.device}
    if args.device != "cpu":
        where, expected = f"--device {args.device}", "--device-map alone"
        raise Qwen35Error("--device-map names all devices", where=where, expected=expected)
    memory, limits = dict[int | str, str](), [] if args.max_memory is None else args.max_memory.split(",")
    if limits and args.device_map not in AUTOMATIC:
        raise Qwen35Error("a map that names devices has no limits", where="--max-memory",
                          expected=" | ".join(AUTOMATIC), found=f"--device-map {args.device_map}")  # fmt: skip
    for part in limits:
        device, _, size = part.strip().partition("=")
        if not size or not (device.isdecimal() or device in ("cpu", "mps")):
            raise Qwen35Error("cannot read a limit", where="--max-memory", expected="0=20GB,cpu=30GB", found=part)
        memory[int(device) if device.isdecimal() else device] = size
    device_map: Any = args.device_map
    if device_map not in AUTOMATIC:
        try:
            device_map = read_json(Path(device_map))
        except Qwen35Error as error:
            expected, found = " | ".join(AUTOMATIC) + ", or a JSON file", error.found or error.what
            where = f"--device-map {device_map}"
            raise Qwen35Error("no device map", where=where, expected=expected, found=found) from error
    return {"device_map": device_map, "max_memory": memory or None}


def add_image_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    p.add_argument("--pixel-values", metavar="FILE", help="safetensors with pixel_values and image_grid_thw (or "
                   "pixel_values_videos and video_grid_thw), as a processor gave them")  # fmt: skip


def given_images(args: argparse.Namespace) -> Images | None:
    """The images that the command line names; None: none. Error: in both ways."""
    if args.image and args.pixel_values is not None:
        where, expected = "--image, --pixel-values", "one of them"
        raise Qwen35Error("images in two ways", where=where, expected=expected, found="both")
    if args.image:
        return Images(*load_images(args.checkpoint, args.image))
    return None if args.pixel_values is None else read_images(args.pixel_values)
