"""`qwen35-moe generate`, with and without a tokenizer in the folder, and how prompts come to be."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_models import FIXTURES
from PIL import Image
from text_files import write_processor, write_tokenizer
from torch import Tensor
from transformers.image_utils import load_image

import qwen35_moe as q
from qwen35_moe.cli.main import main
from qwen35_moe.errors import printable
from qwen35_moe.run.generate import Step, generate
from qwen35_moe.run.prompt import embed_prompt, load_images, load_tokenizer, place_images, read_ids, stop_ids

BARE = FIXTURES / "bf16-hub"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's checkpoint with a tokenizer, a chat template and a processor."""
    path = tmp_path_factory.mktemp("checkpoint") / "with-text"
    shutil.copytree(BARE, path)
    write_tokenizer(path)
    write_processor(path)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    yield


@pytest.fixture
def png(expected: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(expected["image/raw_rgb_u8.0"].permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def plain() -> list[int]:
    return [step.id for step in generate(q.load(BARE), [1, 2, 3], 6)]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["generate", *map(str, words)])
    return code, *capsys.readouterr()


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


SIX = ("--max-new-tokens", 6)


def test_ids_need_no_tokenizer(capsys: pytest.CaptureFixture[str], plain: list[int], tmp_path: Path) -> None:
    printed = '{"step": 0, "id": 1}\n{"id": 2}\n{"id": 3}\n'
    texts = ("[1, 2,\n 3]", "1, 2, 3\n", "[[1, 2, 3]]", '{"input_ids": [1, 2, 3]}', printed)
    for name, text in zip("abcde", texts, strict=True):
        (tmp_path / name).write_text(text)
        assert read_ids(str(tmp_path / name), "--ids") == [[1, 2, 3]]
    for ids in ("1,2,3", "1 2 3", "[1, 2, 3]", *(tmp_path / name for name in "abcde")):
        assert call(capsys, BARE, "--ids", ids, *SIX) == (0, ", ".join(map(str, plain)) + "\n", "")


def test_ids_of_a_padded_batch_come_without_the_padding(tmp_path: Path) -> None:
    """As a tokenizer's own JSON has them; and with the mark that Windows puts before UTF-8."""
    path = tmp_path / "ids.json"
    for mask, found in (([[0, 0, 1, 1], [1, 1, 1, 1]], [[5, 6], [1, 2, 3, 4]]), (None, [[0, 0, 5, 6], [1, 2, 3, 4]])):
        text = json.dumps({"input_ids": [[0, 0, 5, 6], [1, 2, 3, 4]], "attention_mask": mask})
        path.write_text(text, encoding="utf-8-sig")
        assert read_ids(str(path), "--ids") == found
    path.write_text('{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}')
    assert read_ids(str(path), "--ids") == [[5, 6]]


@pytest.mark.parametrize("mode", ["decoded", "packed", "stream"])
@pytest.mark.parametrize("draft", [[], ["--draft"], ["--draft", "2"]])
def test_modes_and_drafts_write_the_same(capsys, plain, mode, draft):
    code, out, _ = call(capsys, BARE, "--ids", "1,2,3", *SIX, "--json", "--mode", mode, *draft)
    assert code == 0 and [record["id"] for record in lines(out)] == plain


def test_json_and_table_are_the_same_records(capsys: pytest.CaptureFixture[str], plain: list[int]) -> None:
    records = lines(call(capsys, BARE, "--ids", "1,2,3", *SIX, "--top", 2, "--json")[1])
    assert list(records[0]) == ["type", "step", "id", "log_p", "rank", "top", "drafted"]
    table = call(capsys, BARE, "--ids", "1,2,3", *SIX, "--top", 2)[1].splitlines()
    for record, line in zip(records, table, strict=True):
        others = " ".join(f"{i} {log_p:.4f}" for i, log_p in record["top"])
        assert " ".join(line.split()) == f"{record['step']} {record['id']} log p {record['log_p']:.4f} rank 0 {others}"


def test_forced_tokens_are_scored(capsys: pytest.CaptureFixture[str], plain: list[int]) -> None:
    forced = [plain[0], 17, *plain[2:4]]
    code, out, _ = call(capsys, BARE, "--ids", "1,2,3", "--force", ",".join(map(str, forced)), "--json")
    assert code == 0
    assert [record["id"] for record in lines(out)] == forced
    assert [record["rank"] == 0 for record in lines(out)][:2] == [True, False]


def test_forced_tokens_are_scored_after_a_temperature(capsys: pytest.CaptureFixture[str]) -> None:
    """p^(1/T), normalised; and what chooses tokens is refused."""
    ids = ("--ids", "1,2,3", "--force", "9,4", "--top", "256", "--json")
    (plain, _), (warm, _) = (lines(call(capsys, BARE, *ids, *more)[1]) for more in ((), ("--temperature", "0.5")))
    log_p = torch.tensor([x for _, x in sorted(plain["top"])], dtype=torch.float64)
    expected = (log_p / 0.5).log_softmax(-1)
    assert [x for _, x in sorted(warm["top"])] == pytest.approx(expected.tolist(), abs=1e-9)
    assert warm["log_p"] == pytest.approx(float(expected[9]), abs=1e-6)
    assert call(capsys, BARE, *ids, "--top-k", "3")[0] == 2


def test_a_seed_repeats_a_text(capsys: pytest.CaptureFixture[str], plain: list[int]) -> None:
    command = (BARE, "--ids", "1,2,3", *SIX, "--temperature", 2)
    found = [call(capsys, *command, "--top-k", 50, "--top-p", 0.9, "--seed", seed)[1] for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert call(capsys, *command, "--top-k", 1)[1].startswith(f"{plain[0]}, ")


def test_text_in_and_out(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("hey the", add_special_tokens=False)
    found = [step.id for step in generate(q.load(folder), ids, 12, stop=[1])]
    code, out, _ = call(capsys, folder, "--prompt", "hey the", "--max-new-tokens", 12)
    assert (code, out) == (0, printable(tokenizer.decode(found).rstrip("\N{REPLACEMENT CHARACTER}")) + "\n")
    records = lines(call(capsys, folder, "--prompt", "hey the", "--max-new-tokens", 12, "--json")[1])
    assert [r["id"] for r in records] == found and records[0]["text"] == tokenizer.decode(found[:1])


def test_characters_come_whole(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: Any) -> None:
    ids = load_tokenizer(folder).encode("h\u00e9 \u2192", add_special_tokens=False)  # 2 and 3 bytes, a token each
    assert len(ids) == 7
    steps = [Step(i, 0.0, 0) for i in ids]
    monkeypatch.setattr("qwen35_moe.cli.generate.generate", lambda *_: iter(steps))
    assert call(capsys, folder, "--prompt", "x")[1] == "h\u00e9 \u2192\n"


def test_an_image_from_its_file(capsys, folder, png, expected):
    """The processor's pixels are the fixture's, and the text that follows is the one after the embedded prompt."""
    pixels, grid = load_images(folder, [png])
    assert torch.equal(grid, expected["image/image_grid_thw"].long())
    torch.testing.assert_close(pixels, expected["image/pixel_values"], rtol=0, atol=1e-6)
    model = q.load(folder)
    ids = place_images(model.config, [5, 6, 7], grid)
    assert ids == [250, *[252] * 6, 251, 5, 6, 7]
    prompt = embed_prompt(model, torch.tensor([ids]), pixels, grid)
    found = ", ".join(str(step.id) for step in generate(model, prompt, 6, stop=[1]))
    for given in ("5,6,7", "250,252,251,5,6,7", ",".join(map(str, ids))):
        out = call(capsys, folder, "--ids", given, "--image", png, *SIX, "--json", "--mode", "stream")[1]
        assert ", ".join(str(record["id"]) for record in lines(out)) == found
    drafted = call(capsys, folder, "--ids", "5,6,7", "--image", png, *SIX, "--json", "--draft")[1]
    assert ", ".join(str(record["id"]) for record in lines(drafted)) == found


def test_placeholders_without_an_image_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, BARE, "--ids", "1,250,252,252,251,253", "--max-new-tokens", 1)
    assert (code, err) == (0, "no --image: 3 placeholders of images or videos are taken for text\n")


def test_photographs_are_turned_as_they_say(folder: Path, png: Path, tmp_path: Path) -> None:
    """As transformers' own `load_image` turns them."""
    picture, exif = Image.open(png), Image.Exif()
    exif[0x0112] = 6  # orientation: taken with the camera turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    load_image(str(tmp_path / "turned.png")).save(tmp_path / "upright.png")
    turned, upright = (load_images(folder, [tmp_path / name]) for name in ("turned.png", "upright.png"))
    assert all(torch.equal(a, b) for a, b in zip(turned, upright, strict=True))
    assert turned[1].tolist() == load_images(folder, [png])[1][:, [0, 2, 1]].tolist()


def test_chat_template_with_images(capsys: pytest.CaptureFixture[str], folder: Path, png: Path) -> None:
    text = "<user><|vision_start|><|image_pad|><|vision_end|>hey<a>"
    ids = load_tokenizer(folder).encode(text, add_special_tokens=False)
    assert [i for i in ids if i >= 250] == [250, 252, 251] and ids.index(250) > 0
    chat = call(capsys, folder, "--prompt", "hey", "--chat", "--image", png, *SIX, "--json")
    assert chat[0] == 0 and chat == call(capsys, folder, "--prompt", text, "--image", png, *SIX, "--json")
    assert (
        call(capsys, folder, "--prompt", "hey", "--chat", *SIX)[1]
        == call(capsys, folder, "--prompt", "<user>hey<a>", *SIX)[1]
    )


def test_text_only_says_so(capsys: pytest.CaptureFixture[str], plain: list[int]) -> None:
    code, out, err = call(capsys, BARE, "--ids", "1,2,3", *SIX, "--text-only")
    assert (code, out) == (0, ", ".join(map(str, plain)) + "\n")
    assert "19 tensors of mtp" in err and "21 tensors of visual" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x"], "as ids (--ids)"),
        (["--ids", "1,x"], "not a list of token ids"),
        (["--ids", ""], "not a list of token ids"),
        (["--ids", "[[1], [2]]"], "one prompt at a time"),
        (["--ids", "[[1], 2]"], "not a list of token ids"),
        (["--ids", '{"x": 1}'], "not a list of token ids"),
        (["--ids", '{"input_ids": [1, 2], "attention_mask": [1]}'], "not a list of token ids"),
        (["--ids", '{"input_ids": [1, 2], "attention_mask": 1}'], "not a list of token ids"),
        (["--ids", "1" * 5000], "not a list of token ids"),
        (["--ids", "[1, -2]"], "not a list of token ids"),
        (["--ids", "1,999"], "not in the vocabulary"),
        (["--ids", "1", "--image", "no.png"], "no image processor"),
        (["--ids", "1", "--text-only", "--draft"], "--text-only leaves out"),
        (["--ids", "1", "--top-p", "0"], "Sampling.top_p"),
        (["--ids", "1", "--top", "-1", "--json"], "where: top"),
        (["--ids", "1", "--chat"], "--chat is for text"),
    ],
)
def test_what_cannot_be_done_is_said(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    code, out, err = call(capsys, BARE, *words)
    assert code == 2 and out == "" and said in err


def test_what_cannot_be_read_is_said(capsys, folder, png, tmp_path):
    assert "not a regular file" in call(capsys, folder, "--ids", "1", "--image", tmp_path)[2]
    for data in (b"P6 x", b"BM" + bytes(12) + struct.pack("<IIIHH", 40, 20000, 20000, 1, 24) + bytes(24)):
        (tmp_path / "bad").write_bytes(data)  # where Pillow raises no OSError
        assert "cannot read the image" in call(capsys, folder, "--ids", "1", "--image", tmp_path / "bad")[2]
    assert "placeholders and images disagree" in call(capsys, folder, "--ids", "252,252", "--image", png)[2]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text("{")
    assert "cannot read the tokenizer" in call(capsys, broken, "--prompt", "x")[2]
    write_tokenizer(broken)
    config = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    assert "no chat template" in call(capsys, broken, "--prompt", "x", "--chat")[2]
    for template in ("{{ raise_exception('text only') }}", "{{ '<u>' + messages[0].content }}", "{{ messages"):
        (broken / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert "the chat template fails" in call(capsys, broken, "--prompt", "x", "--chat", "--image", png)[2]


def test_stop_ids(tmp_path: Path) -> None:
    config = q.Config.from_pretrained(BARE)
    assert stop_ids(tmp_path, config) == (1,)
    for value, found in ((7, (7,)), ([7, 8], (7, 8)), (None, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert stop_ids(tmp_path, config) == found
    for text in ("{", '{"eos_token_id": "x"}'):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(q.Qwen35Error, match="generation_config.json"):
            stop_ids(tmp_path, config)
