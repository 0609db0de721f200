"""Files of strangers: regular, of a bounded size and depth, with every key once; patterns that end; text that cannot
command a terminal; and exit code 1 for a verdict only."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen35_moe import Config, Qwen35Error, read_dump
from qwen35_moe.cli.main import main
from qwen35_moe.errors import printable
from qwen35_moe.gate.patterns import bounded_pattern
from qwen35_moe.untrusted import MAX_DEPTH, check_regular, parse_json, parse_npy, read_bytes, read_json

SLOW = ["(a|a)+b", "(a+)+b", "(a*)*b", "(?:a|aa)+b", "(.*)*x", "(a|ab|b)*c", "([a-z]+)*1", "(x+x+)+y", r"(a)\1+",
        ".*" * 7 + "x", "(?:(?:a+)?b?)+c"]  # fmt: skip
FAST = [r"re:.*mlp\.shared_expert.*", r"model\.layers\.(?:0|[1-9]\d*)\.mlp\.gate$", r"(\d+\.)*x",
        r"^(?!.*shared).*$",
        r"layers\.\d+\.(mlp|x)\..*", r"(?:\w+\.)+weight", r"(a|b)+c", r".*(q|k|v)_proj", "(?i)VISUAL.*"]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(Qwen35Error, match="for ever"):
        bounded_pattern(pattern)


@pytest.mark.parametrize("pattern", FAST)
def test_patterns_of_real_lists_pass_and_end(pattern: str) -> None:
    start = time.process_time()
    bounded_pattern(pattern).fullmatch("a" * 400 + "." + "1" * 400)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pattern", ["*.mlp_output", "(", "[z-a]", "a" * 3000, "(?P<n>a)(?P<n>b)"])
def test_what_is_no_pattern_is_one_error(pattern: str) -> None:
    with pytest.raises(Qwen35Error):
        bounded_pattern(pattern)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 300 + "]" * 300, '{"a": 1, "a": 2}', "{",
                                  "\ud800", '{"a": ' + "1" * 10_000 + "}"])  # fmt: skip
def test_bad_json_is_one_error(text: str) -> None:
    with pytest.raises(Qwen35Error):
        parse_json(text.encode("utf-8", "surrogatepass"), "here")


def test_json_up_to_the_depth_is_read() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "here") is not None


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "config.json"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero"), tmp_path, tmp_path / "absent", Path("a\0b")):
        with pytest.raises(Qwen35Error):
            read_json(path)
    (tmp_path / "long").write_bytes(b"1" * 100)
    assert check_regular(tmp_path / "long") == 100
    with pytest.raises(Qwen35Error, match="too long"):
        read_bytes(tmp_path / "long", 99)


@pytest.mark.parametrize("command", ["gate", "info", "compare", "diagnose", "trace", "generate"])
def test_a_fifo_and_a_device_hang_no_command(command: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", Path("/dev/zero")):
        more = {"compare": [str(path)], "diagnose": [str(path)], "generate": ["--ids", "1"],
                "trace": ["--ids", "1", "--out", str(tmp_path / "t")]}  # fmt: skip
        assert main([command, str(path), *more.get(command, [])]) == 2


def test_repeated_keys_are_an_error_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    assert main(["gate", str(tmp_path), "--config-only"]) == 2
    assert "a key is repeated" in capsys.readouterr().err
    with pytest.raises(Qwen35Error, match="a key is repeated"):
        Config.from_pretrained(tmp_path)


def test_an_array_is_as_long_as_its_header_says() -> None:
    held = io.BytesIO()
    np.save(held, np.arange(6).reshape(2, 3))
    assert parse_npy(held.getvalue(), "here").tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (held.getvalue()[:-1], held.getvalue() + b"x", held.getvalue().replace(b"(2, 3)", b"(2, 9**9)"),
                held.getvalue().replace(b"(2, 3), ", b"(9999,)*"), b"", b"\x93NUMPY" + b"\xff" * 20,
                held.getvalue().replace(b"(2, 3), }  ", b"(99999, 99999999)")):  # fmt: skip
        with pytest.raises(Qwen35Error):
            parse_npy(bad, "here")


def test_an_archive_of_many_arrays_is_listed_once(tmp_path: Path) -> None:
    held = io.BytesIO()
    np.save(held, np.zeros((3, 4), np.float32))
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as file:
        for i in range(1000):
            file.writestr(f"step.{i}.layers.0.mlp_output.npy", held.getvalue())
    start = time.process_time()
    dump = read_dump(tmp_path / "many.npz")
    assert len(dump.sources["layers.0.mlp_output"]) == 1000 and time.process_time() - start < 5


def test_a_torch_file_with_compressed_records_is_not_read_as_noise(tmp_path: Path) -> None:
    torch.save({"next_token_logits": torch.zeros(4, 260)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as a, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with pytest.raises(Qwen35Error, match="compressed"):
        read_dump(tmp_path / "b.pt")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.safetensors", "llamacpp-x.bin", "x.json", "trace.json",
                                  "layer0.pt"])  # fmt: skip
def test_a_fifo_in_a_dump_hangs_nothing(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(Qwen35Error):
            read_dump(path)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[31mb\n\tc\x07\x9b") == "a\\x1b[31mb\n\tc\\x07\\x9b"
    (tmp_path / "config.json").write_text(json.dumps({"\x1b[2Jkey": 1, "text_config": {"\x1b]0;x\x07": 1}}))
    for arguments in (["gate", str(tmp_path)], ["info", str(tmp_path / "a\x1b[31m")], ["gate", str(tmp_path) + "\x1b"]):
        main(arguments)
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err and "\x07" not in said.out + said.err


@pytest.mark.parametrize("page", ["/" + "x" * 300 + ".html", "/proc/nobody/x.html", "/dev/null/x", "a\0b"])
def test_a_bad_output_path_is_no_verdict(page: str, tmp_path: Path) -> None:
    for option in ("--html", "--json"):
        with pytest.raises(SystemExit) as exit_:
            raise SystemExit(main(["compare", str(tmp_path), str(tmp_path), option, page]))
        assert exit_.value.code == 2
