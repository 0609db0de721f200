"""Options of commands that take the images of a prompt."""

from __future__ import annotations

import argparse

from ..errors import Qwen35Error
from ..run.prompt import Images, load_images
from ..trace.images import read_images


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
