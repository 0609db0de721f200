"""A tokenizer and an image processor as a checkpoint's folder has them, small enough for the fixtures' 256 ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = {
    "<|endoftext|>": 1,
    "<|vision_start|>": 250,
    "<|vision_end|>": 251,
    "<|image_pad|>": 252,
    "<|video_pad|>": 253,
}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE in the form of Qwen's: NFC, one merge, nothing put in front. No bytes that UTF-8 never has."""
    unused = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - unused)
    free = [i for i in range(256) if i not in SPECIAL.values()]
    vocab = {symbol: free.pop(0) for symbol in alphabet}
    vocab["he"] = free.pop(0)
    vocab |= SPECIAL  # else they would get the next free ids
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r" ?\w+|\W"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token, i in SPECIAL.items()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_processor(folder: Path) -> None:
    """The settings of Qwen3.5's processor, with the fixture's patches of 4 x 4 pixels."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 32},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
