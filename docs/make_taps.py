"""Write docs/taps.md from the table of taps:  python -m docs.make_taps"""

from __future__ import annotations

import re
from pathlib import Path

from qwen35_moe.numerics import tap_table as tap_names
from qwen35_moe.numerics.tap_table import TAPS

TARGET = Path(__file__).with_name("taps.md")
# Section -> the names that begin it. A name belongs to the first pattern that fits.
SECTIONS = {
    "Vision tower": r"vis_|image_embeds|inputs_embeds",
    "Draft head": r"mtp_",
    "Mixture of experts": r"moe_|mlp_output",
    "Gated DeltaNet": r"gdn_",
    "Full attention": r"attn_(?!output)|rope_",
    "Stream, norms, head": r"",
}
HEAD = """# Taps

*Written by `docs/make_taps.py` from `qwen35_moe/numerics/tap_table.py`; a test keeps the two alike.*

A tap is a name for a value of the model. In a trace it is part of a key: `layers.3.attn_q` is tap `attn_q` of layer 3,
`layers.3.moe_expert_17_down` is `moe_expert_down` of expert 17, `mtp.layers.0.attn_q` belongs to the draft head,
`step.2.…` to the third forward pass. `<norm>.gain` is `1 + w` of that norm. Handlers can
record a value at its tap, round it, replace it by an engine's value, or break it (`qwen35_moe/numerics/taps.py`).

The engines' columns give the path of the module below the layer (below the model, for taps without a layer), and which
of its inputs or outputs it is. `*` means: the engine's tensor holds more than this value, and the readers split it
(`engine_names.py`). vLLM and ATOM use SGLang's names of modules, except where the last column says otherwise. An empty
cell means: no hook sees the value, or, in the vision tower, no reader has a name for it.

"""


def legend() -> str:
    """The letters, from the docstring of the table."""
    doc = tap_names.__doc__ or ""
    return doc[doc.index("Dims are the letters") :].strip()


def page() -> str:
    groups: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name, tap in TAPS.items():
        section = next(section for section, pattern in SECTIONS.items() if re.match(pattern, name))
        engines = [" or ".join(f"`{x}`" for x in text.split(" | ") if x) for text in (tap.sglang, tap.transformers)]
        cells = [f"`{name}`", f"`{tap.dims}`" if tap.dims else "", tap.meaning, *engines, tap.other]
        groups[section].append("| " + " | ".join(cells) + " |")
    text = HEAD + "```\n" + legend() + "\n```\n"
    for section in reversed(SECTIONS):
        text += f"\n## {section}\n\n| tap | dims | meaning | SGLang 0.5.23 | transformers 5.23 | others |\n"
        text += "|---|---|---|---|---|---|\n" + "\n".join(groups[section]) + "\n"
    return text


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"{TARGET.name}: {len(TAPS)} taps")
