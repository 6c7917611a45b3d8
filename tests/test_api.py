"""`fxpress.compile` and its parts, from Python."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxpress
from fxpress.errors import DataError, OptionError, OutputError, PipelineError, WeightsError
from fxpress.recipe import load_recipe, parse_drop, resolve_passes


def names(passes):
    return [p.name for p in passes]


# -- what to run --------------------------------------------------------------------------------------------------


def test_prune_joins_a_recipe_after_cleanup():
    assert names(resolve_passes(prune=0.5))[:3] == ["cleanup", "prune", "canonicalize"]
    same = [resolve_passes(prune=p)[1] for p in (0.5, "macs=0.5", {"macs": 0.5})]
    assert same[0] == same[1] == same[2]
    assert resolve_passes(prune="params=0.6,importance=l1")[1].importance == "l1"


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('summary = "mine"\npipeline = "cleanup,quantize{ranges=minmax}"\n')
    assert names(resolve_passes(str(path))) == ["cleanup", "quantize"]
    assert load_recipe(str(path)).name == "mine"


@pytest.mark.parametrize("text", ["pipelin = 'cleanup'", "pipeline = 3", "pipeline = 'cleanup'\nextra = 'x'", "pipeline ="])
def test_a_recipe_file_that_cannot_be(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        load_recipe(str(path))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"recipe": "int9"}, OptionError),
        ({"recipe": "float", "pipeline": "cleanup"}, OptionError),
        ({"pipeline": "cleanup", "prune": 0.5}, OptionError),
        ({"pipeline": "clenup"}, PipelineError),
        ({"prune": ""}, OptionError),
        ({"prune": True}, OptionError),
        ({"prune": "macs=0.5}"}, OptionError),
        ({"prune": "flops=0.5"}, OptionError),
        ({"prune": {"macs": "half"}}, OptionError),
    ],
)
def test_requests_that_contradict_or_say_nothing(options, error):
    with pytest.raises(error) as caught:
        resolve_passes(**options)
    assert caught.value.hint


def test_the_allowed_drop():
    assert parse_drop("1%") == pytest.approx(0.01) == parse_drop(0.01) == parse_drop("0.01")
    for bad in ("one", "-1%", -0.1, "inf", "nan"):
        with pytest.raises(OptionError):
            parse_drop(bad)


# -- compile ------------------------------------------------------------------------------------------------------


def test_a_program_compiles_like_its_module(tiny_module, tiny_data):
    program = fxpress.capture(tiny_module, (tiny_data[:2],))
    by_program = fxpress.compile(program, calibration=[tiny_data])
    by_module = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data])
    assert by_program.onnx.SerializeToString() == by_module.onnx.SerializeToString()
    assert by_program.report["model"]["name"] == "TinyNet"


def test_the_user_s_module_and_program_are_not_changed(tiny_module, tiny_data):
    before = {k: v.clone() for k, v in tiny_module.state_dict().items()}
    program = fxpress.capture(tiny_module, (tiny_data[:2],))
    text = program.text()
    fxpress.compile(program, calibration=[tiny_data], prune=0.7)
    assert program.text() == text
    assert all(torch.equal(v, before[k]) for k, v in tiny_module.state_dict().items())


def test_the_result_depends_on_the_seed_not_on_the_run(tiny_module, tiny_data):
    one, two = (
        fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data], prune=0.6, seed=3) for _ in range(2)
    )
    assert one.onnx.SerializeToString() == two.onnx.SerializeToString()


def test_the_float_recipe_keeps_the_values(tiny_module, tiny_data):
    artifact = fxpress.compile(tiny_module, (tiny_data[:2],), recipe="float")
    report = artifact.report
    assert artifact.kept
    assert report["sqnr_db"] > 90
    assert report["layers"] == []
    assert report["parity"]["layer_max_steps"] is None
    assert report["coverage"]["integer_macs"] == 0
    assert {i["reason"] for i in report["coverage"]["float_islands"]} == {"the pipeline does not quantize"}


def test_evaluate_sees_pytorch_and_onnx_runtime_alike(tiny_module, tiny_data):
    seen = []

    def metric(run):
        outputs = run(tiny_data), run((tiny_data,)), run(x=tiny_data), run(tiny_data.numpy())
        assert [type(o) for o in outputs] == [torch.Tensor] * 3 + [type(tiny_data.numpy())]
        assert all((torch.as_tensor(o) == outputs[0]).all() for o in outputs)
        seen.append(outputs[0])
        return float(len(seen))

    report = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data], evaluate=metric).report
    assert torch.equal(seen[0], tiny_module(tiny_data))
    assert not torch.equal(seen[1], seen[0])
    assert (report["float"]["metric"], report["compiled"]["metric"]) == (1.0, 2.0)
    assert report["metric"] == {"name": "metric", "count": 4 * 64}


def test_a_missed_promise_keeps_and_marks_the_artifact(tiny_module, tiny_data, tmp_path):
    scores = iter([0.9, 0.7])
    artifact = fxpress.compile(
        tiny_module, (tiny_data[:2],), calibration=[tiny_data], evaluate=lambda run: next(scores), max_drop="1%",
        output=tmp_path / "out",
    )  # fmt: skip
    assert not artifact.kept
    assert "MISSED max-drop" in repr(artifact)
    assert fxpress.load(tmp_path / "out").manifest.kept is False


def test_a_pruned_and_retrained_program_is_compared_with_the_original(tiny_module, tiny_data):
    reference = fxpress.capture(tiny_module, (tiny_data[:2],))
    plan = fxpress.plan_pruning(reference, macs=0.6)
    artifact = fxpress.compile(plan.apply(reference), calibration=[tiny_data], reference=reference, plan=plan)
    assert artifact.report["float"]["parameters"] == reference.parameter_count
    assert artifact.report["compiled"]["macs"] < 0.65 * artifact.report["float"]["macs"]
    assert artifact.report["pruning"]["groups"] == len(plan.groups)


class TwoInputs(nn.Module):
    """Takes two inputs, gives a dict of two outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, a, b):
        hidden = torch.relu(self.left(a) + self.right(b))
        return {"sum": hidden.sum(1), "hidden": hidden}


def test_several_inputs_and_outputs(tmp_path):
    torch.manual_seed(0)
    a, b = torch.randn(16, 6), torch.randn(16, 4)
    module = TwoInputs()
    fxpress.compile(module, (a[:2],), {"b": b[:2]}, calibration=[{"a": a, "b": b}], output=tmp_path / "out",
                    evaluate=lambda run: float(run({"a": a, "b": b})["sum"].mean()))  # fmt: skip
    run = fxpress.load(tmp_path / "out")
    assert [i.name for i in run.inputs] == ["a", "b"]
    outputs = dict(zip([o.name for o in run.outputs], run(b=b.numpy(), a=a.numpy())))
    expected = module(a, b)
    for name, value in expected.items():
        assert abs(torch.from_numpy(outputs[name]) - value).max() < 0.1 * value.abs().max()


def test_a_data_loader_with_labels_calibrates(tiny_module, tiny_data):
    loader = DataLoader(TensorDataset(tiny_data, torch.arange(64)), batch_size=24)
    a = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=loader)
    b = fxpress.compile(tiny_module, (tiny_data[:2],), calibration=[tiny_data])
    assert a.onnx.SerializeToString() == b.onnx.SerializeToString()  # however the data are batched


def test_a_fixed_batch_compiles(tiny_module, tiny_data, tmp_path):
    program = fxpress.capture(tiny_module, (tiny_data[:4],), dynamic_batch=False)
    artifact = fxpress.compile(program, calibration=tiny_data.split(4), output=tmp_path / "out")
    assert artifact.report["parity"]["batches"] == [4]
    assert fxpress.load(tmp_path / "out")(tiny_data[:4].numpy()).shape == (4, 5)


def test_mistakes_are_found_before_the_work(tiny_module, tiny_data, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("fxpress.api.capture", never)
    (tmp_path / "file").write_text("a file")
    good = {"calibration": [tiny_data]}
    for error, options in [
        (OptionError, {**good, "target": "ort-x87"}),
        (OptionError, {**good, "threads": 0}),
        (OptionError, {**good, "max_drop": "1%"}),
        (OptionError, {**good, "max_drop": "lots", "evaluate": len}),
        (OutputError, {**good, "output": tmp_path / "file" / "below"}),
        (DataError, {}),
    ]:
        with pytest.raises(error) as caught:
            fxpress.compile(tiny_module, (tiny_data[:2],), **options)
        assert caught.value.hint


def test_other_mistakes(tiny_module, tiny_data):
    program = fxpress.capture(tiny_module, (tiny_data[:2],))
    with pytest.raises(OptionError, match="no effect on a Program"):
        fxpress.compile(program, (tiny_data[:2],), calibration=[tiny_data])
    with pytest.raises(OptionError, match="needs example inputs"):
        fxpress.compile(tiny_module, calibration=[tiny_data])
    with pytest.raises(OptionError, match="returned a str"):
        fxpress.compile(program, calibration=[tiny_data], evaluate=lambda run: "good")
    with pytest.raises(OptionError, match="ZeroDivisionError"):
        fxpress.compile(program, calibration=[tiny_data], evaluate=lambda run: 1 / 0)
    broken = nn.Linear(4, 3)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match="weight"):
        fxpress.compile(broken, (torch.randn(2, 4),), recipe="float")


def test_importing_fxpress_loads_neither_torch_nor_onnxruntime():
    check = "import sys, fxpress, fxpress.cli; print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_loaded():
    for name in fxpress.__all__:
        assert getattr(fxpress, name) is not None
    assert set(fxpress.__all__) <= set(dir(fxpress))
    with pytest.raises(AttributeError):
        fxpress.no_such_name  # noqa: B018
