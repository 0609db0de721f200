"""The examples of README's "In your own pytest" run as they stand, with the plugin; its reports say what was found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qwen35_moe import testing as qt
from qwen35_moe.pytest_plugin import FORMS, Report

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"^```py\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)

# The kernels of an engine, as the examples call them.
ENGINE = """
import wrong_kernels as kernels
from qwen35_moe.gate.decide import can_fuse_shared_expert
from qwen35_moe.quant.mxfp4 import encode

def fused_moe(x, ids, weights, w13_codes, w13_scales, w2_codes, w2_scales):
    return kernels.moe(dict(locals()))

def delta_rule(q, k, v, g, beta, state):
    return kernels.gdn(dict(locals()))

def quantise_mxfp4(x):
    return encode(x, "round-up", absmax_floor=1e-10)

class Routed(dict):
    pass

def route(x, router, top_k):
    case = Routed(x=x, router=router)
    case.top_k = top_k
    return kernels.router(case)

def can_fuse(config):
    return bool(can_fuse_shared_expert(config, rule="sglang-0.5.23"))
"""


def test_examples_of_the_readme(pytester, monkeypatch):
    assert len(EXAMPLES) == 5 and all(len(example.splitlines()) <= 12 for example in EXAMPLES)
    pytester.makepyfile(my_engine=ENGINE, **{f"test_example_{n}": example for n, example in enumerate(EXAMPLES)})
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which each process writes a report of its own
    monkeypatch.syspath_prepend(pytester.path)
    options = ["-p", "qwen35_moe.pytest_plugin", "-p", "no:cacheprovider", "--qwen35-report", "checks.json"]
    done = pytester.runpytest_inprocess(*options)
    assert done.ret == 0
    checks = json.loads((pytester.path / "checks.json").read_text())["checks"]
    assert {check["output"] for check in checks} == {
        "mlp_output", "gdn_core_out", "gdn_state", "mxfp4", "moe_topk_ids", "moe_topk_weights", "can_fuse",
    }  # fmt: skip
    assert all(check["ok"] for check in checks)
    assert any(check["test"].endswith("[gdn-tiny-150-state]") for check in checks), "cases name their tests"


@pytest.mark.parametrize("ending", ["html", "json", "sarif"])
def test_reports(tmp_path, ending):
    report = Report(tmp_path / f"report.{ending}")
    report.test = "tests/test_kernel.py::test_<norm>"
    case = qt.rms_norm_case()
    for factor in (1.0, 2.0):
        report(qt.check_legal(factor * case.truth["input_layernorm"].float(), case)[0])
    text = FORMS[f".{ending}"](report.found)
    assert "x the legal error (limit 3)" in text
    if ending == "html":
        assert "1 of 2 checks failed" in text and "test_&lt;norm&gt;" in text and "prefers-color-scheme:dark" in text
    elif ending == "json":
        assert [check["ok"] for check in json.loads(text)["checks"]] == [True, False]
    else:
        (run,) = json.loads(text)["runs"]
        (result,) = run["results"]
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert (result["ruleId"], place) == ("input_layernorm", "tests/test_kernel.py")
