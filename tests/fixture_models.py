"""The fixtures' checkpoints as modules, read without the package's loader, whose own tests are elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen35_moe.model.config import Config
from qwen35_moe.model.mtp import MTP
from qwen35_moe.model.text import Model
from qwen35_moe.model.vision.tower import VisionConfig, VisionTower
from qwen35_moe.quant import mxfp4

FIXTURES = Path(__file__).parent / "data" / "fixtures"


def read(name: str, dtype: torch.dtype) -> tuple[Model, MTP, VisionTower]:
    """Main model, draft head and vision tower of a fixture, decoded to `dtype` (float64: arithmetic exact)."""
    folder = FIXTURES / name
    raw_config = json.loads((folder / "config.json").read_text())
    config = Config.from_dict(raw_config)
    raw: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        raw |= load_file(path)
    scales = {k.removesuffix("_scale"): raw.pop(k) for k in list(raw) if k.endswith(".weight_scale")}
    values = {k: mxfp4.decode(v, scales[k], dtype) if k in scales else v.to(dtype) for k, v in raw.items()}
    for mlp in {k.split(".experts.")[0] for k in values if ".experts.0." in k}:
        stacks = {
            part: torch.stack([values.pop(f"{mlp}.experts.{e}.{part}_proj.weight") for e in range(config.num_experts)])
            for part in ("gate", "up", "down")
        }
        values[f"{mlp}.experts.gate_up_proj"] = torch.cat((stacks["gate"], stacks["up"]), 1)
        values[f"{mlp}.experts.down_proj"] = stacks["down"]
    model, mtp = Model(config, "exact" if dtype == torch.float64 else "float32"), MTP(config)
    tower = VisionTower(VisionConfig.from_dict(raw_config["vision_config"], config.hidden_size))
    parts: list[tuple[str, nn.Module]] = [("mtp.", mtp), ("model.visual.", tower), ("model.language_model.", model)]
    for prefix, module in parts:
        part = {k: values.pop(k) for k in list(values) if k.startswith(prefix)}
        if module is model:
            part |= {f"{prefix}{k}": values.pop(k) for k in list(values)}  # lm_head.weight, at the top level
        module.load_state_dict({k.removeprefix(prefix): v for k, v in part.items()}, assign=True)
    return model, mtp, tower
