"""Measured placement: atoms and names, parts and their cost, the search, and a compilation that is never slower."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.onnx.part import Parts, node_of, signature
from fxpress.backends.targets import load_target
from fxpress.compilation import placing
from fxpress.errors import OptionError
from fxpress.frontend.program import Program
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.pipeline import parse_pipeline, print_pipeline
from fxpress.passes.quantize.placement.atoms import find_atoms, integer_groups, names_for
from fxpress.passes.quantize.placement.minimum_cut import Atom, Problem
from fxpress.passes.quantize.placement.regions import regions
from fxpress.passes.quantize.placement.trials import with_options
from fxpress.runtime import atom_costs, placement_trials, tuning
from fxpress.runtime.atom_costs import PartClock, at_one_example, measure_problem
from fxpress.runtime.benchmark import Timing, median_interval
from fxpress.runtime.conversions import conversion_model, conversion_seconds
from fxpress.runtime.latency import LatencyTable
from fxpress.runtime.placement_trials import Placement, Trial, TrialBench, deciding, placed
from fxpress.runtime.session import make_session
from fxpress.runtime.tuning import tune

TARGET = load_target("ort-x86")


class Network(nn.Module):
    """A stem, a residual block with a depthwise convolution, a gate in float, a split and a concatenation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.expand, self.depthwise = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 5, padding=2, groups=32)
        self.project = nn.Conv2d(32, 16, 1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(torch.tanh(self.depthwise(torch.relu(self.expand(x)))))
        a, b = x.chunk(2, 1)
        x = torch.cat([torch.relu(self.left(a)), self.right(b)], 1)
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def vnni(monkeypatch):
    """These tests are about a machine that the target ort-x86 is for."""
    monkeypatch.setattr(placing, "saturates", lambda: False)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    captured = fxpress.capture(Network().eval(), (torch.randn(2, 3, 16, 16),))
    return run_passes(captured, "cleanup,canonicalize,fuse-batchnorm")


def named(program: Program, module: str) -> str:
    """The node that a module's layer is."""
    stacks = {n.name: [v[0] for v in (n.meta.get("nn_module_stack") or {}).values()] for n in program.graph.nodes}
    return next(name for name, paths in stacks.items() if module in paths)


# -- atoms and names -----------------------------------------------------------------------------------------------


def test_an_absorbed_activation_and_the_parts_of_a_split_decide_together(program):
    atoms = find_atoms(program, TARGET)
    index = atoms.atom_of
    groups = [atoms.members[i] for i in atoms.movable]
    assert any(len(g) == 2 and g[0] == named(program, "stem.0") and "relu" in g[1] for g in groups)
    assert any(len(g) == 3 and g[0].startswith("chunk") for g in groups)
    tanh = next(n.name for n in program.graph.nodes if n.name.startswith("tanh"))
    assert index[tanh] not in atoms.movable
    assert len(index) == sum(map(len, atoms.members)), "every node is in one atom"


def test_what_the_user_keeps_in_float_cannot_move(program):
    atoms = find_atoms(program, TARGET, ["stem"])
    assert atoms.atom_of[named(program, "stem.0")] not in atoms.movable


@pytest.mark.parametrize("seed", range(12))
def test_names_say_the_placement(program, seed):
    """Whatever atoms are chosen, the names keep them in float, and nothing else but what has no integer reader or
    operand left."""
    atoms = find_atoms(program, TARGET)
    draw = random.Random(seed)
    floats = {i for i in atoms.movable if draw.random() < 0.4}
    moved = {n for i in floats for n in atoms.members[i]}
    stay = {n for i in atoms.movable - floats for n in atoms.members[i]}
    names = names_for(program, moved, stay)
    integers = {n for g in integer_groups(program, TARGET, names) for n in g}
    assert integers.isdisjoint(moved)
    layers = {n.name for n in program.graph.nodes if "conv" in n.name or "linear" in n.name}
    assert layers & stay <= integers


def test_whole_modules_are_named_as_such(program):
    atoms = find_atoms(program, TARGET)
    moved = set(atoms.members[atoms.atom_of[named(program, "stem.0")]])
    stay = {n for i in atoms.movable for n in atoms.members[i]} - moved
    assert names_for(program, moved, stay) == ("stem",)


def test_regions_hang_together_through_what_cannot_move(program):
    atoms = find_atoms(program, TARGET)
    index = atoms.atom_of
    ends = {index[named(program, m)] for m in ("depthwise", "project")}  # tanh between them
    apart = index[named(program, "left")]
    assert sorted(map(len, regions(atoms, ends | {apart}))) == [1, 2]


# -- parts and costs ------------------------------------------------------------------------------------------------


def test_a_part_is_a_model_that_computes_what_it_did_within(program):
    one = at_one_example(program)
    model = lower(one)
    parts = Parts(model)
    name = named(program, "depthwise")
    part = parts.part([n for n in parts.nodes if node_of(n) == name])
    assert part is not None
    assert [n.op_type for n in part.graph.node] == ["Conv"]
    onnx.checker.check_model(part)
    x = np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)
    (got,) = make_session(part).run(x)
    layer = dict(one.graph_module.named_parameters())
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x), layer["depthwise.weight"], layer["depthwise.bias"], padding=2, groups=32
    )
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


def test_an_integer_part_reads_and_gives_integers(program):
    one = at_one_example(program)
    one_batch = [tuple(x for x in one.example_inputs)]
    quantized = PassManager("quantize{ranges=minmax}", check_numbers=False).run(one, Context(TARGET, one_batch))
    model = lower(quantized)
    parts = Parts(model)
    chosen = [n for n in parts.nodes if n.op_type == "Conv" and n.name.startswith("left")]
    quantize = [n for n in parts.nodes if n.op_type == "QuantizeLinear" and n.input[0] in chosen[0].output]
    part = parts.part([*chosen, *quantize])
    assert part is not None
    kinds = {v.type.tensor_type.elem_type for v in (*part.graph.input, *part.graph.output)}
    assert kinds == {onnx.TensorProto.UINT8}


def test_signatures_tell_what_is_computed_not_by_whom():
    def part_of(module: nn.Module, size: int) -> onnx.ModelProto:
        captured = fxpress.capture(module.eval(), (torch.randn(1, 8, size, size),), dynamic_batch=False)
        return lower(captured)

    first, second = (part_of(nn.Conv2d(8, 8, 3), 8) for _ in range(2))
    assert signature(first) == signature(second)
    others = [part_of(nn.Conv2d(8, 8, 3), 10), part_of(nn.Conv2d(8, 8, 3, padding=1), 8), part_of(nn.Conv2d(8, 8, 1), 8)]
    assert len({signature(m) for m in (first, *others)}) == 4
    sizes = [part_of(nn.UpsamplingNearest2d(scale_factor=f), 8) for f in (2, 2, 4)]
    assert signature(sizes[0]) == signature(sizes[1]) != signature(sizes[2])


def test_conversions_within_a_network_pay_for_layouts_too():
    shape = (1, 32, 28, 28)
    within, alone = (conversion_seconds(conversion_model(shape, w), 0.01) for w in (True, False))
    assert within.quantize > 0 < within.dequantize
    assert within.to_blocks > 0 < within.from_blocks
    assert 0 < within.block <= within.to_blocks
    assert alone.quantize > 0 < alone.dequantize
    assert alone.to_blocks == alone.from_blocks == 0


def problem_of(program: Program, clock: PartClock) -> Problem:
    steps = parse_pipeline("quantize{ranges=minmax}")[0].steps()
    return measure_problem(program, find_atoms(program, TARGET), steps, Context(TARGET), clock)


def test_costs_are_measured_once_and_known_from_then_on(program, tmp_path):
    first = PartClock(LatencyTable(tmp_path, "here"), effort=0.002)
    problem = problem_of(program, first)
    again = PartClock(LatencyTable(tmp_path, "here"), effort=0.002)
    assert problem_of(program, again) == problem
    assert first.measured > 10
    assert again.measured == 0
    atoms = find_atoms(program, TARGET)
    conv = atoms.atom_of[named(program, "depthwise")]
    assert problem.atoms[conv].floating > 0 < problem.atoms[conv].integer
    assert all((problem.atoms[i].integer is not None) == (i in atoms.movable) for i in range(len(atoms.members)))


@pytest.mark.parametrize("fault", ["damaged", "another machine", "no folder"])
def test_a_cache_that_says_nothing_is_measured_anew(program, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(atom_costs, "kernel_seconds", lambda *_: 1e-6)
    monkeypatch.setattr(atom_costs, "conversion_seconds", lambda *_: atom_costs.Conversions(1e-6, 1e-6))
    folder = tmp_path / "cache"
    first = PartClock(LatencyTable(folder, "here"))
    problem_of(program, first)
    (file,) = folder.glob("*.json")
    machine = "here"
    if fault == "damaged":
        file.write_text(file.read_text()[:40])
    elif fault == "another machine":
        machine = "there"
    else:
        folder = tmp_path / "file"
        folder.write_text("in the way of the folder")
    again = PartClock(LatencyTable(folder, machine))
    problem_of(program, again)
    assert again.measured == first.measured


# -- the search -----------------------------------------------------------------------------------------------------


@pytest.fixture
def imagined(program, monkeypatch):
    """A machine whose clock is a formula: what kernels take, and what whole models take, which may contradict it."""

    def set_up(told: dict[str, tuple[float, float]], true: dict[str, tuple[float, float]]) -> None:
        def measured(one, atoms, *_):
            costs = [Atom(m[0], *told.get(m[0], (1e-6, 1e-6 if i in atoms.movable else None))) for i, m in enumerate(atoms.members)]
            return Problem((*costs, Atom("outputs")))

        def time_whole(bench: TrialBench, placement: Placement, *_):
            atoms = find_atoms(program, TARGET)
            floats = atoms.floats_of(placement.integers)
            each = [true.get(m[0], (1e-6, 1e-6))[i not in floats] for i, m in enumerate(atoms.members)]
            base = sum(true.get(m[0], (1e-6, 1e-6))[0] for m in atoms.members)
            speed = base / sum(each)
            return Trial(placement, speed, speed, speed, 1.0, 30.0)

        monkeypatch.setattr(tuning, "measure_problem", measured)
        monkeypatch.setattr(TrialBench, "measure", time_whole)
        monkeypatch.setattr(TrialBench, "again", lambda bench, trial: trial)

    return set_up


def search(program: Program, **options):
    samples = (torch.randn(2, 3, 16, 16),)
    return tune(program, parse_pipeline("quantize"), Context(TARGET), samples, **options)


def test_what_is_slow_on_integers_is_left_in_float(program, imagined):
    slow = named(program, "depthwise")
    times = {slow: (1e-6, 50e-6), named(program, "expand"): (9e-6, 2e-6)}
    imagined(times, times)
    found = search(program)
    assert found.best.placement.keep_float == ("depthwise",)
    assert found.best.speed > found.integer.speed
    assert any("moved to float" in note for note in found.notes)


def test_whole_models_overrule_what_kernels_say(program, imagined):
    """Kernels say that float is better everywhere; whole models say that it is for one layer alone."""
    layers = [named(program, m) for m in ("stem.0", "expand", "depthwise", "project", "left", "right", "head")]
    slow = named(program, "depthwise")
    told = dict.fromkeys(layers, (5e-6, 9e-6))
    true = {**dict.fromkeys(layers, (9e-6, 3e-6)), slow: (2e-6, 20e-6)}
    imagined(told, true)
    best = search(program).best
    assert slow not in best.placement.integers
    assert set(layers) - {slow} <= best.placement.integers


def test_a_gain_that_is_noise_changes_nothing(program, imagined):
    times = {named(program, "depthwise"): (10.0e-6, 10.05e-6), named(program, "expand"): (9e-6, 2e-6)}
    imagined(times, times)
    found = search(program)
    assert found.best.placement == found.integer.placement
    assert found.best.placement.keep_float == ()


def test_where_integers_never_pay_the_model_stays_in_float(program, imagined):
    atoms = find_atoms(program, TARGET)
    times = {atoms.members[i][0]: (1e-6, 30e-6) for i in atoms.movable}
    imagined(times, times)
    best = search(program).best
    assert best.placement.integers == frozenset()
    assert best.speed == 1.0


def test_the_users_own_names_are_kept(program, imagined):
    times = {named(program, "depthwise"): (1e-6, 50e-6)}
    imagined(times, times)
    samples = (torch.randn(2, 3, 16, 16),)
    found = tune(program, parse_pipeline("quantize{keep_float=stem}"), Context(TARGET), samples)
    assert found.best.placement.keep_float == ("stem", "depthwise")
    assert found.integer.placement.keep_float == ("stem",)


def test_a_spent_budget_ends_the_search(program, imagined):
    times = {named(program, "depthwise"): (1e-6, 5e-6), named(program, "expand"): (9e-6, 2e-6)}
    imagined(times, times)
    found = search(program, seconds=1e-9)
    assert len(found.trials) == 1
    assert found.best.placement == found.integer.placement


def test_a_placement_is_written_into_the_passes():
    passes = parse_pipeline("annotate{keep_float=a},observe,calibrate,fold")
    result = placed(passes, Placement("", ("b", "c"), ("attention",), frozenset("x")))
    assert deciding(result).keep_float == ("b", "c")
    assert deciding(result).forms == ("attention",)
    assert [type(p) for p in result] == [type(p) for p in passes]


def test_a_real_search_ends_with_a_model_that_runs(program, tmp_path):
    found = search(program, seconds=5.0, trial_seconds=0.05, cache=tmp_path)
    assert found.measured > 10
    assert found.integer.sqnr_db > 15
    assert found.best.speed >= 1.0 or not found.best.placement.integers
    passes = placed(parse_pipeline("quantize"), found.best.placement) if found.best.placement.integers else []
    x = torch.randn(2, 3, 16, 16)
    result = PassManager(passes).run(program, Context(TARGET, [(x,)]))
    assert make_session(lower(result)).run(x.numpy())[0].shape == (2, 10)


# -- compile --------------------------------------------------------------------------------------------------------


def timing(ratio: float) -> Timing:
    return Timing(1.0, 1.0 / ratio, ratio, 99, ratio * 0.99, ratio * 1.01)


@pytest.fixture
def clock(monkeypatch, program, imagined, tmp_path):
    """Whole models take what `speeds` says, in turn; the last one counts from then on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def set_speeds(*speeds: float, slow: float = 50e-6) -> None:
        left = list(speeds)
        times = {named(program, "depthwise"): (1e-6, slow), named(program, "expand"): (40e-6, 2e-6)}
        imagined(times, times)
        monkeypatch.setattr(placing, "_SESSIONS", 1)
        monkeypatch.setattr(placing, "compare_on_example", lambda *_, **__: timing(left.pop(0) if len(left) > 1 else left[0]))

    return set_speeds


def compiled(**options):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    return fxpress.compile(Network().eval(), (x[:2],), calibration=[x], **options).report


def stage(report: dict, name: str) -> dict:
    return next(s for s in report["stages"] if s["pass"] == name)


def promise(report: dict, name: str) -> dict:
    return next(p for p in report["promises"] if p["name"] == name)


def test_a_model_that_is_slower_is_placed_anew(clock):
    clock(0.8, 1.2)
    report = compiled()
    assert "keep_float=[depthwise]" in report["pipeline"] or "keep_float=depthwise" in report["pipeline"]
    assert report["speedup"] == 1.2
    assert promise(report, "not-slower")["kept"]
    notes = " ".join(stage(report, "not-slower")["notes"])
    assert "0.80x" in notes
    assert "moved to float" in notes
    assert report["tuning"]["after"]["speed"] > report["tuning"]["before"]["speed"]


def test_a_model_that_no_placement_helps_stays_in_float(clock):
    clock(0.8, 0.9, 1.0)
    report = compiled()
    assert "quantize" not in report["pipeline"]
    assert promise(report, "not-slower")["kept"]
    assert any("stays in float" in n for n in stage(report, "not-slower")["notes"])
    assert report["coverage"]["integer_macs"] == 0.0
    assert report["layers"] == []


@pytest.mark.parametrize(("mixed", "stays"), [(0.7, False), (0.9, True)])
def test_a_placement_that_is_fast_enough_but_not_good_enough_stays_in_float(clock, mixed, stays):
    """Accuracy on integers is 0.9, with more in float `mixed`: that may be less. The allowance counts as well."""
    clock(0.8, 1.2, 1.0)
    # of float, of integers as asked for, of what is placed anew, and of what is kept
    left = iter([1.0, 0.95, mixed, mixed if stays else 1.0])

    def evaluate(run):
        run(torch.zeros(1, 3, 16, 16))
        return next(left)

    report = compiled(evaluate=evaluate, max_drop=0.12)
    notes = " ".join(stage(report, "not-slower")["notes"])
    assert ("keep_float" in report["pipeline"]) == stays
    assert ("falls further than allowed" in notes) != stays
    assert promise(report, "max-drop")["kept"]
    assert promise(report, "not-slower")["kept"]


def test_the_stated_pipeline_makes_the_model_again(clock):
    clock(0.8, 1.2)
    first = compiled()
    clock(1.2)
    second = compiled(pipeline=first["pipeline"])
    assert second["tuning"] is None
    assert second["pipeline"] == first["pipeline"]
    assert second["compiled"]["size_bytes"] == first["compiled"]["size_bytes"]
    assert second["sqnr_db"] == pytest.approx(first["sqnr_db"], abs=1e-6)


def test_a_fast_model_is_left_alone(clock):
    clock(1.5)
    report = compiled()
    assert report["pipeline"].endswith("quantize")
    assert report["tuning"] is None
    assert not any(s["pass"] == "not-slower" for s in report["stages"])


def test_tune_places_before_it_quantizes(clock):
    clock(1.5)
    report = compiled(tune=True)
    assert "keep_float=" in report["pipeline"]
    assert "depthwise" in report["pipeline"]
    assert sum(s["pass"] == "quantize" for s in report["stages"]) == 1
    assert any("SQNR" in n for n in stage(report, "tune")["notes"])


def test_allow_slower_keeps_the_model_and_promises_nothing(clock):
    clock(0.5)
    report = compiled(allow_slower=True)
    assert report["pipeline"].endswith("quantize")
    assert report["speedup"] == 0.5
    assert not any(p["name"] == "not-slower" for p in report["promises"])


def test_a_dynamic_model_that_is_slower_stays_in_float(clock):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(4, 16)
    clock(0.8, 1.0)
    report = fxpress.compile(module, (x,), recipe="int8-dynamic").report
    assert report["pipeline"] == "cleanup,canonicalize,fuse-batchnorm"
    assert promise(report, "not-slower")["kept"]
    assert "stays in float" in stage(report, "not-slower")["notes"][0]
    clock(0.8)
    kept = fxpress.compile(module, (x,), recipe="int8-dynamic", allow_slower=True).report
    assert kept["pipeline"].endswith("quantize-dynamic")
    assert kept["speedup"] == 0.8


class PostNorm(nn.Module):
    """A LayerNorm with an outlier, whose output is also added: smoothing pays a product for it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight[3] = 60.0
            self.linear.weight[:, 3] /= 60.0

    def forward(self, x):
        y = self.norm(x)
        return y + self.linear(y)


@pytest.mark.parametrize("tune", [False, True])
def test_what_stays_in_float_has_no_products_of_smoothing(clock, tune):
    torch.manual_seed(0)
    module, x = PostNorm().eval(), torch.randn(64, 6, 16)
    clock(1.5)
    smoothed = fxpress.compile(module, (x[:2],), calibration=[x])
    assert any(n.op_type == "Mul" for n in smoothed.onnx.graph.node)
    clock(0.8, 0.9, 1.0)
    artifact = fxpress.compile(module, (x[:2],), calibration=[x], tune=tune)
    assert artifact.report["pipeline"] == "cleanup,canonicalize,fuse-batchnorm"
    assert not any(n.op_type == "Mul" for n in artifact.onnx.graph.node)


@pytest.mark.parametrize(("ratios", "slower"), [((0.97, 1.02, 1.01), False), ((0.97, 1.02, 0.96), True), ((1.02,), False)])
def test_one_unlucky_session_is_no_reason(monkeypatch, ratios, slower):
    """Fresh sessions are asked where the first seems slower."""
    left = list(ratios)
    monkeypatch.setattr(placing, "compare_on_example", lambda *_: timing(left.pop(0)))
    program = fxpress.capture(nn.Linear(4, 4), torch.randn(2, 4))
    assert placing.lower_and_time(program, program, program, 1).slower == slower
    assert not left


@pytest.mark.parametrize(("times", "moves"), [((10e-6, 10.5e-6), False), ((10e-6, 40e-6), True)])
def test_a_placement_must_win_by_more_than_sessions_scatter(program, imagined, monkeypatch, times, moves):
    slow = named(program, "depthwise")
    known = {slow: times, named(program, "expand"): (9e-6, 2e-6)}
    imagined(known, known)
    scatter = lambda bench, trial: dataclasses.replace(trial, low=trial.speed * 0.95, high=trial.speed * 1.05)  # noqa: E731
    monkeypatch.setattr(TrialBench, "again", scatter)
    assert (slow not in search(program).best.placement.integers) == moves


def test_noise_and_trifles_are_no_reason():
    slow = placing.Timed(None, None, None, None, timing(0.9))  # type: ignore[arg-type]
    assert slow.slower
    noisy = dataclasses.replace(slow.timing, high=1.01)
    assert not dataclasses.replace(slow, timing=noisy).slower
    tiny = dataclasses.replace(slow.timing, first_ms=0.010, second_ms=0.012)
    assert not dataclasses.replace(slow, timing=tiny).slower


@pytest.mark.parametrize("options", [{"tune": True}, {"allow_slower": True}])
def test_options_without_effect_are_refused(options):
    with pytest.raises(OptionError, match="no effect"):
        fxpress.compile(nn.Linear(2, 2), (torch.randn(2, 2),), recipe="float", **options)


def test_tune_is_refused_for_what_runs_elsewhere():
    with pytest.raises(OptionError, match="run elsewhere"):
        fxpress.compile(nn.Linear(2, 2), (torch.randn(2, 2),), target="ort-arm", calibration=[torch.randn(2, 2)], tune=True)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        low, high = median_interval(list(draw.exponential(size=51)))
        held += low <= np.log(2) <= high
    assert 0.93 <= held / 400 <= 0.995
    assert median_interval([3.0]) == (3.0, 3.0)


def test_trials_count_no_accuracy_passes():
    bench = TrialBench(None, parse_pipeline("quantize{ranges=mse},correct-bias"), Context(TARGET), ())  # type: ignore[arg-type]
    quick = bench.quick(Placement("", ("a",), (), frozenset("x")))
    assert [p.name for p in quick] == ["quantize"]
    assert quick[0].ranges == "minmax"  # type: ignore[attr-defined]
    assert placement_trials.placed(quick, Placement("", (), (), frozenset()))[0].keep_float == ()  # type: ignore[attr-defined]


def test_trials_leave_the_option_of_another_range_rule_out():
    passes = with_options(parse_pipeline("quantize{ranges=percentile,percentile=99.9}"), {"ranges": "minmax"})
    assert print_pipeline(passes) == "quantize{ranges=minmax}"
