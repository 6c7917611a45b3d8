"""Targets whose runtime is not ONNX Runtime: what can be verified of a compiled model for them here.

In OpenVINO it is compiled, compared layer by layer, and timed, where the package is installed. For the others, and
without the package, the file's form is checked against the target's table, and the report says that nothing was run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import onnx
import torch

from ..backends.coverage import Coverage
from ..backends.structure import check_structure, stored_coverage
from ..frontend.program import Program
from ..passes.quantize.reasons import stated_reasons
from ..passes.quantize.spec import Target
from .openvino import is_installed, judge_in_openvino
from .processor import saturates
from .report.build import Promise


@dataclass(frozen=True)
class Elsewhere:
    """What was found: coverage as the target sees it, promises kept or broken, notes for people."""

    coverage: Coverage
    promises: list[Promise] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge_elsewhere(
    program: Program,
    float_model: onnx.ModelProto,
    model: onnx.ModelProto,
    inputs: tuple[torch.Tensor, ...],
    target: Target,
    threads: int = 1,
) -> Elsewhere | None:
    """Verify a quantized program for a target whose runtime is not ONNX Runtime; None where it is."""
    if target.runtime == "onnxruntime":
        return None
    faults = check_structure(model, target)
    detail = "; ".join(faults[:3]) or f"the file has the form that {target.name} asks for"
    form = Promise("structure", not faults, detail)
    found = Elsewhere(stored_coverage(model, stated_reasons(program)), [form])
    missing = _why_not_in_openvino(target) if target.runtime == "openvino" else ""
    if target.runtime == "openvino" and not missing:
        return _in_openvino(found, program, float_model, model, inputs, threads)
    note = f"not run on {target.name} here{missing}: form and numbers are checked, speed is not"
    return replace(found, promises=[replace(form, detail=f"{detail}; {note}")], notes=[note])


def _why_not_in_openvino(target: Target) -> str:
    """Why a model is not run there, "" where it is. Without VNNI, OpenVINO's products saturate as ONNX Runtime's do."""
    if not is_installed():
        return " (install fxpress[openvino] to verify it there)"
    if target.may_saturate and saturates():
        return " (this processor has no VNNI, without which OpenVINO's 8-bit products saturate)"
    return ""


def _in_openvino(
    found: Elsewhere,
    program: Program,
    float_model: onnx.ModelProto,
    model: onnx.ModelProto,
    inputs: tuple[torch.Tensor, ...],
    threads: int,
) -> Elsewhere:
    there = judge_in_openvino(program, float_model, model, inputs, threads)
    kernels = Counter(f"{k.kind} {k.precision}" for k in there.kernels)
    coverage = replace(found.coverage, integer_macs=there.integer_macs, kernels=dict(sorted(kernels.items())))
    promise = Promise("openvino", there.kept, str(there))
    return Elsewhere(coverage, [*found.promises, promise], [str(there)])
