"""`Artifact`: what a compilation gives. In memory it is a model and a report; on disk a folder, written in one step.

model.onnx      the compiled model
float.onnx      the float model that the report compares with; only `eval` and `bench` read it, it need not be shipped
                (with float.onnx.data, its weights, above 2 GB)
report.json     the truth: every figure; report.html shows it
manifest.json   checksums, versions, preprocessing, inputs and outputs, labels
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from ..errors import ArtifactError, OutputError
from .atomic import check_writable, replace_folder
from .manifest import FLOAT_MODEL, MODEL, Manifest, artifact_files, is_artifact
from .model_file import ModelFile, external_data
from .report.page import render_page
from .report.words import comparison, far_from_float, percent

REPORT = "report.json"
PAGE = "report.html"


@dataclass
class Artifact:
    """A compiled and judged model.

    `onnx` is the compiled model, `float_onnx` the one it is compared with, `report` the content of report.json.
    `path` is the folder it was written to, if it was.
    """

    onnx: ModelProto
    report: dict[str, Any]
    manifest: Manifest
    float_model: ModelFile | None = field(default=None, repr=False)
    path: Path | None = None

    @property
    def float_onnx(self) -> ModelProto | None:
        """The float model, read from its file at every look."""
        return self.float_model.load() if self.float_model is not None else None

    @property
    def kept(self) -> bool:
        """Was every promise kept (parity, the allowed drop)?"""
        return all(p["kept"] for p in self.report["promises"])

    def save(self, folder: str | Path) -> Path:
        """Write the folder whole or not at all; an older artifact of that name is replaced. Raises OutputError."""
        folder = Path(folder)
        replace_folder(folder, self._write, is_artifact, artifact_files)
        self.path = folder
        return folder

    def _write(self, folder: Path) -> None:
        _write_model(self.onnx, folder / MODEL)
        if self.float_model is not None:
            _save(self.float_model.save, folder / FLOAT_MODEL)
        (folder / REPORT).write_text(json.dumps(self.report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(render_page(self.report), encoding="utf-8")
        self.manifest.write(folder)

    def __repr__(self) -> str:
        head = f"Artifact({self.report['model']['name']} for {self.report['target']})"
        rows = [f"  {r.label:<12} {r.before:>10}  ->  {r.after:>10}   {r.change}" for r in comparison(self.report)]
        coverage = f"  {'coverage':<12} {percent(self.report['coverage']['integer_macs'])} of MACs in integer kernels"
        missed = [f"  MISSED {p['name']}: {p['detail']}" for p in self.report["promises"] if not p["kept"]]
        far = far_from_float(self.report)
        return "\n".join([head, *rows, coverage, *missed, *([f"  NOTE {far}"] if far else [])])


def check_output(folder: str | Path) -> None:
    """Raise OutputError now if an artifact could not be written to `folder` later."""
    check_writable(Path(folder), is_artifact, artifact_files)


def read_report(folder: str | Path) -> dict[str, Any]:
    """The content of report.json, its checksum verified. Raises ArtifactError."""
    folder = Path(folder)
    content = Manifest.read(folder).verify(folder, REPORT)
    return json.loads(content)


def read_models(folder: str | Path) -> tuple[bytes | Path, bytes]:
    """(float, compiled) models of an artifact, checksums verified. Raises ArtifactError.

    A float model above 2 GB is given as its path, since its weights lie beside it.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if not (folder / FLOAT_MODEL).is_file():
        raise ArtifactError(
            f"{folder} has no {FLOAT_MODEL} to compare with",
            hint="compile again, or use `fxpress bench OUT --against FILE`",
        )
    floating = manifest.verify(folder, FLOAT_MODEL)
    if (weights := external_data(folder / FLOAT_MODEL)).name not in manifest.files:
        return floating, manifest.verify(folder, MODEL)
    manifest.check(folder, weights.name)
    return folder / FLOAT_MODEL, manifest.verify(folder, MODEL)


def _write_model(model: ModelProto, path: Path) -> None:
    _save(lambda file: file.write_bytes(model.SerializeToString()), path)


def _save(write: Callable[[Path], object], path: Path) -> None:
    try:
        write(path)
    except ValueError as error:  # protobuf's own limit
        raise OutputError(f"{path.name} is larger than 2 GB, which one ONNX file cannot hold") from error
