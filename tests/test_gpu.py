"""On a GPU: the same function in `exact`, the same bits where bits are promised. Collected only where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import test_grouped
import test_mxfp4
import torch
from fixture_models import FIXTURES
from peers.transformers_model import load_transformers
from test_model import ids_of
from test_prefetch import cut, poison
from tolerances import BF16_GROUPED, FLOAT64_REORDERED

import qwen35_moe as q
from qwen35_moe.cli import main as cli
from qwen35_moe.model.mtp import draft_head, with_hidden
from qwen35_moe.numerics import arithmetics as arithmetic
from qwen35_moe.numerics.metrics import rel_l2
from qwen35_moe.numerics.taps import FunctionHandler
from qwen35_moe.oracle.dumps.writers import DUMPED
from qwen35_moe.oracle.judge.where import Where
from qwen35_moe.oracle.truth import write_truth
from qwen35_moe.quant import mxfp4
from qwen35_moe.run.generate import generate
from qwen35_moe.run.gpu.graphs import DecodeGraph, PrefillGraph, can_capture, compiling
from qwen35_moe.run.gpu.grouped_experts import ResidentExperts
from qwen35_moe.run.origin import origin_of
from qwen35_moe.run.prompt import embed_prompt
from qwen35_moe.trace.file import Trace
from qwen35_moe.trace.recorder import record

# The compiler's first import meets torch's own deprecated functions.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")]
GPU = "cuda"
BF16 = "transformers-bf16"

Built = Callable[[str], Path]


def assert_same_taps(gpu: Trace, cpu: Trace) -> None:
    assert list(gpu) == list(cpu)
    for key, x in cpu.items():
        if x.is_floating_point():
            assert rel_l2(gpu[key].cpu(), x) <= FLOAT64_REORDERED, key
        else:
            assert torch.equal(gpu[key].cpu(), x), key


@pytest.mark.parametrize("experts", [False, True], ids=["grouped", "loop"])
@pytest.mark.parametrize("name", ["tiny", "tiny-odd", "tiny-flat", "tiny-fp8"])
def test_exact_is_the_same_function_at_every_tap(built: Built, name: str, experts: bool) -> None:
    """`experts=True` watches single experts, which takes the loop."""
    on_cpu, on_gpu = (q.load(built(name), device=device, text_only=True) for device in ("cpu", GPU))
    for shape in ((1, 1), (2, 70)):
        ids = ids_of(shape[1], shape[0], on_cpu.config.vocab_size)
        assert_same_taps(q.trace(on_gpu, ids.to(GPU), experts=experts), q.trace(on_cpu, ids, experts=experts))


@pytest.mark.parametrize("mode", ["decoded", "packed", "stream"])
@pytest.mark.parametrize("name", ["tiny-mxfp4", "tiny-fp8-experts", "tiny-mixed"])
def test_every_mode(built: Built, name: str, mode: str) -> None:
    cpu, gpu = q.load(built(name), text_only=True), q.load(built(name), device=GPU, mode=mode, text_only=True)
    for length in (1, 3, 70):
        ids = ids_of(length)
        assert rel_l2(gpu(ids.to(GPU)).cpu(), cpu(ids)) <= FLOAT64_REORDERED


@pytest.mark.parametrize(
    "recipe",
    ["tiny", "tiny-per-expert", "tiny-mxfp4", "tiny-moe-mxfp4", "tiny-fp8-experts", "tiny-gpt-oss", "tiny-mixed"],
)
def test_streamed_has_the_bits_of_resident(built: Built, recipe: str) -> None:
    """Long and short in turn, so that what is read ahead is now of use, now not."""
    resident, streamed = (
        q.load(built(recipe), BF16, device=GPU, mode=mode, text_only=True) for mode in ("decoded", "stream")
    )
    for length in (70, 1, 300, 2, 1, 300):
        ids = ids_of(length).to(GPU)
        assert torch.equal(streamed(ids), resident(ids))


@pytest.mark.parametrize(("change", "says"), [(cut, "the file ends"), (poison, "1 such scales")])
def test_a_file_that_breaks_while_it_is_streamed(
    built: Built, tmp_path: Path, change: Callable[[Path, int], None], says: str
) -> None:
    path, ids = built("tiny-mxfp4"), ids_of(70).to(GPU)
    shutil.copytree(path, tmp_path / "broken")
    model = q.load(tmp_path / "broken", BF16, device=GPU, mode="stream", text_only=True)
    expected = model(ids)
    stored = origin_of(model).checkpoint.stored("layers.3.mlp.experts.2.down_proj.weight_scale")

    def strike(site: q.taps.Site, x: torch.Tensor) -> None:
        if site.key == "layers.0.mlp_output":  # so early that layer 3 is not asked for yet
            change(stored.file, stored.end - 1)

    with q.taps.attach(FunctionHandler(strike, sees_experts=False)), pytest.raises(q.Qwen35Error, match=says):
        model(ids)
    with pytest.raises(q.Qwen35Error, match="written to"):
        model(ids)
    assert torch.equal(q.load(path, BF16, device=GPU, mode="stream", text_only=True)(ids), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 65), (1, 333)])
def test_bf16_has_the_bits_of_grouped_mm_on_the_same_gpu(built: Built, shape: tuple[int, int]) -> None:
    """At once and one expert after the other."""
    model = q.load(built("tiny"), f"{BF16}/grouped_mm", "unfused", device=GPU, text_only=True)
    ids = ids_of(shape[1], shape[0]).to(GPU)
    with torch.no_grad():
        peer = load_transformers(built("tiny"), torch.bfloat16, experts="grouped_mm").to(GPU)
        theirs = peer(input_ids=ids, use_cache=False).logits
    assert torch.equal(model(ids), theirs)
    assert torch.equal(q.trace(model, ids, experts=True)["next_token_logits"], theirs)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 65), (1, 333)])
@pytest.mark.parametrize("name", ["tiny", "tiny-odd"])
def test_bf16_has_the_bits_of_transformers_on_the_same_gpu(built: Built, name: str, shape: tuple[int, int]) -> None:
    model = q.load(built(name), arithmetic=BF16, shared_expert="unfused", device=GPU, text_only=True)
    ids = ids_of(shape[1], shape[0], model.config.vocab_size).to(GPU)
    with torch.no_grad():
        theirs = load_transformers(built(name), torch.bfloat16).to(GPU)(input_ids=ids, use_cache=False).logits
    assert torch.equal(q.trace(model, ids, experts=True)["next_token_logits"], theirs)
    # Rows of 16 bytes or not: all experts at once are the loop again.
    assert torch.equal(model(ids), theirs)


def test_tower_and_draft_head_are_the_same_functions_at_every_tap(expected: dict[str, torch.Tensor]) -> None:
    """An image through the tower, the prompt through the model, its hidden states through the draft head."""
    inputs = [expected[f"image/{name}"] for name in ("input_ids", "pixel_values", "image_grid_thw")]
    traces = []
    for device in ("cpu", GPU):
        model = q.load(FIXTURES / "bf16-hub", device=device)
        assert model.mtp is not None
        with record() as recorder:
            prompt = embed_prompt(
                model, *(x.to(device) if x.is_floating_point() else x.long().to(device) for x in inputs)
            )
            _, hidden = with_hidden(model, **prompt)
            positions = prompt["position_ids"]
            draft_head(model, model.mtp, None, hidden, position_ids=positions, next_embeds=prompt["inputs_embeds"])
        traces.append(recorder.trace)
    assert {"visual", "mtp", "layers"} <= {key.split(".")[0] for key in traces[0]}
    assert_same_taps(traces[1], traces[0])


GREEDY = json.loads((FIXTURES.parent / "greedy" / "llamacpp.json").read_text())


def test_greedy_text_is_that_of_the_cpu(expected: dict[str, torch.Tensor]) -> None:
    """100 tokens after each prompt, which are llama.cpp's, too; after an image, those of the CPU; with drafts."""
    cpu, gpu = (q.load(FIXTURES / "bf16-hub", device=device) for device in ("cpu", GPU))
    for case in GREEDY:
        prompt = expected["ids"][case["row"], : case["prompt_tokens"]].long()
        assert [step.id for step in generate(gpu, prompt, 100)] == case["continuation"]
        assert [step.id for step in generate(gpu, prompt, 12, drafts=3)] == case["continuation"][:12]
    names = ("pixel_values", "image_grid_thw")
    image = embed_prompt(cpu, expected["image/input_ids"].long(), *(expected[f"image/{name}"] for name in names))
    assert [step.id for step in generate(gpu, image, 30)] == [step.id for step in generate(cpu, image, 30)]


def test_a_graph_writes_the_same_text(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its steps one by one. A graph that is full is followed by another; whoever watches is called."""
    module = import_module("qwen35_moe.run.generate")
    monkeypatch.setattr(module, "ROOM", 16)
    made = []
    monkeypatch.setattr(module, "DecodeGraph", lambda *args: made.append(DecodeGraph(*args)) or made[-1])
    model = q.load(built("tiny"), arithmetic=BF16, device=GPU, text_only=True)
    for start in range(4):
        prompt = (ids_of(9 + 30 * start, 1)[0] + start) % 256
        by_graph = [step.id for step in generate(model, prompt, 40)]
        assert len(made) > 2 and all(graph.capture for graph in made)
        seen = set[str]()
        with q.taps.attach(lambda site, x, seen=seen: seen.add(site.name)):
            assert [step.id for step in generate(model, prompt, 40)] == by_graph
        assert "next_token_logits" in seen and not made[-1].capture
        made.clear()


def test_what_can_be_captured(built: Built) -> None:
    def loaded(name: str, table: str = BF16, mode: str = "decoded") -> q.Model:
        return q.load(built(name), arithmetic=table, device=GPU, mode=mode, text_only=True)

    assert can_capture(loaded("tiny")) and can_capture(loaded("tiny-mxfp4", mode="packed"))
    assert not can_capture(loaded("tiny", "exact")) and not can_capture(loaded("tiny", "sglang-bf16"))
    assert not can_capture(loaded("tiny", mode="stream")) and not can_capture(loaded("tiny-odd"))


def test_the_oracle_takes_a_gpu_for_an_engine(built: Built, tmp_path: Path) -> None:
    """Its bf16 run agrees with the CPU's truth; with a block too large by a fifth it does not."""
    path, ids = built("tiny"), ids_of(24, 2)
    write_truth(path, ids, tmp_path / "truth", taps=DUMPED)
    model = q.load(path, arithmetic=BF16, shared_expert="unfused", device=GPU, text_only=True)

    def fault(site: q.taps.Site, x: torch.Tensor) -> torch.Tensor | None:
        return x * 1.2 if site.key == "layers.1.mlp_output" else None

    for name, planted in (("clean", ()), ("broken", (FunctionHandler(fault, q.taps.BREAK),))):
        q.trace(model, ids.to(GPU), taps=DUMPED, replay=planted, out=tmp_path / name)
    assert cli.main(["compare", str(tmp_path / "truth"), str(tmp_path / "clean")]) == 0
    assert cli.main(["compare", str(tmp_path / "truth"), str(tmp_path / "broken")]) == 1


def test_the_truth_written_on_a_gpu_is_that_of_the_cpu(built: Built, tmp_path: Path) -> None:
    """`qwen35-moe trace --device`, layer by layer from disk."""
    common = ["trace", str(built("tiny-mxfp4")), "--ids", "3,1,4,1,5,9,2,6", "--no-envelope", "--quiet"]
    for device in ("cpu", GPU):
        assert cli.main([*common, "--device", device, "--out", str(tmp_path / device)]) == 0
    assert_same_taps(Trace.open(tmp_path / GPU), Trace.open(tmp_path / "cpu"))


@pytest.mark.parametrize("name", [BF16, "exact", "sglang-bf16"])
def test_two_runs_and_graphs_have_the_same_bits(built: Built, name: str) -> None:
    model = q.load(built("tiny"), arithmetic=name, shared_expert="unfused", device=GPU, text_only=True)
    ids = ids_of(70).to(GPU)
    first = model(ids)
    assert torch.equal(model(ids), first)
    if name == BF16:  # in other dtypes grouped products are a loop, whose counts the host must know
        assert torch.equal(PrefillGraph(model, ids)(ids), first)


def test_decoding_as_a_graph_has_the_bits_of_its_step(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    model = q.load(built("tiny"), arithmetic=BF16, shared_expert="unfused", device=GPU, text_only=True)
    ids, cache = ids_of(30).to(GPU), q.Cache()
    model(ids[:, :20], cache=cache)
    graph = DecodeGraph(model, cache, capacity=64)
    monkeypatch.setattr("qwen35_moe.run.gpu.graphs.captured", lambda run, changed: run)
    plain = DecodeGraph(model, cache, capacity=64)
    for t in range(20, 30):
        assert torch.equal(graph.step(ids[:, t : t + 1]), plain.step(ids[:, t : t + 1]))


@pytest.mark.parametrize("name", test_grouped.TABLES)
def test_grouped_products_against_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 sums in another order; wider dtypes take the same products."""
    table = arithmetic.get(name)
    dtype = table.weight_dtype("experts")
    T, E, D, F = test_grouped.T, test_grouped.E, test_grouped.D, test_grouped.F
    weights = (test_grouped.drawn(*shape, dtype=dtype).to(GPU) for shape in ((E, 2 * F, D), (E, D, F)))
    experts = ResidentExperts(*weights, quantised=True)
    ids, routing = (x.to(GPU) for x in test_grouped.routed(T))
    routing = routing.to(torch.promote_types(dtype, torch.float32))
    x = test_grouped.drawn(T, D, dtype=dtype).to(GPU)
    with arithmetic.using(table):
        together, calls = experts.combine(x, ids, routing), []
        monkeypatch.setattr(ResidentExperts, "combine_grouped", lambda *args: calls.append(args))
        with q.taps.attach(lambda site, x: None):
            loop = experts.combine(x, ids, routing)
        assert not calls and experts.combine(x, ids, routing) is None
    assert rel_l2(together, loop) <= (FLOAT64_REORDERED if dtype == torch.float64 else BF16_GROUPED)


@pytest.mark.parametrize("table", [BF16, "transformers-bf16/grouped_mm", "sglang-bf16"])
def test_passes_over_memory_have_the_bits_of_plain_torch(
    built: Built, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, which otherwise only large tensors in a graph are, at every tap."""
    model = q.load(built("tiny"), arithmetic=table, shared_expert="unfused", device=GPU, text_only=True)
    for shape in ((1, 70), (2, 128)):
        ids = ids_of(shape[1], shape[0]).to(GPU)
        plain = q.trace(model, ids)
        with monkeypatch.context() as patch, compiling():
            patch.setattr("qwen35_moe.run.gpu.graphs.LARGE", 0)
            compiled = q.trace(model, ids)
        for key, x in plain.items():
            assert torch.equal(compiled[key], x), key


@pytest.mark.parametrize("often", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_mxfp4_decodes_to_the_same_bits(dtype: torch.dtype, often: bool) -> None:
    codes, scales = test_mxfp4.every_byte_pair()
    poisoned = torch.full((256, 512), torch.nan, dtype=dtype, device=GPU)
    result = mxfp4.decode(codes.to(GPU), scales.to(GPU), dtype, poisoned, often).cpu()
    plain = mxfp4.decode_plain(codes, scales, dtype)
    assert torch.equal(test_mxfp4.bits(result), test_mxfp4.bits(plain))


@pytest.mark.parametrize("rule", sorted(mxfp4.SCALE_RULES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mxfp4_encodes_to_the_same_bytes(dtype: torch.dtype, rule: str) -> None:
    x = test_grouped.drawn(64, 256, dtype=dtype) * 2.0 ** torch.arange(-32, 32)[:, None].to(dtype)
    for ours, theirs in zip(mxfp4.encode(x.to(GPU), rule), mxfp4.encode(x, rule), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("mode", ["decoded", "stream"])
@pytest.mark.parametrize("fault", ["shared expert dropped", "nibbles swapped", "experts shifted by one"])
def test_a_bug_is_named_as_on_a_cpu(small: Callable[..., Path], tmp_path: Path, fault: str, mode: str) -> None:
    path, ids = small("tiny-mxfp4"), ids_of(40)
    dump = q.play_engine(path, ids, tmp_path / "engine", fault=fault, layer=1)
    here, there = (q.diagnose(path, dump, tmp_path / device, where=Where(device, mode=mode)) for device in ("cpu", GPU))
    assert here.first is not None and there.first is not None and here.first.key == there.first.key
    assert [(d.layer, d.name) for d in here.diagnoses] == [(d.layer, d.name) for d in there.diagnoses]
    assert there.diagnoses[0].name == fault
