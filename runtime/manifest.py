"""`manifest.json`: what a bundle needs to know about itself. Free of torch.

Checksums of all files, versions, preprocessing, description of inputs and outputs, labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..frontend.preprocess import Preprocess
from ..frontend.tensor_info import TensorInfo

FILE = "manifest.json"
MODEL = "model.onnx"
FLOAT_MODEL = "float.onnx"
SCHEMA = 1
_DAMAGED = "compile again, or copy the folder anew"


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass
class Manifest:
    """The content of `manifest.json`. `kept` says whether every promise of the compilation was kept."""

    model: str
    target: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] = ()
    kept: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Record the checksums of all files in `folder` and write `manifest.json` there."""
        names = sorted(p.name for p in folder.iterdir() if p.name != FILE)
        self.files = {name: record(folder / name) for name in names}
        values = {"schema": SCHEMA, **dataclasses.asdict(self)}
        values["preprocess"] = self.preprocess.to_json() if self.preprocess else None
        (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read `folder/manifest.json`. Raises ArtifactError: no artifact, or not readable by this version."""
        path = folder / FILE
        if not path.is_file():
            raise ArtifactError(
                f"{folder} is no fxpress artifact: it has no {FILE}", hint="give the folder of `compile -o`"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}", hint=_DAMAGED) from error
        if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
            raise ArtifactError(f"{path} is not of schema {SCHEMA}", hint="read it with the fxpress that wrote it")
        return _parsed(values, path)

    def verify(self, folder: Path, name: str) -> bytes:
        """The bytes of one file, after comparing them with the checksum. Raises ArtifactError."""
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise ArtifactError(f"{folder / name} cannot be read: {error.strerror}", hint=_DAMAGED) from error
        self._compare(folder / name, hashlib.sha256(content).hexdigest())
        return content

    def check(self, folder: Path, name: str) -> None:
        """As `verify`, for a file too large to be read at once."""
        try:
            found = record(folder / name)
        except OSError as error:
            raise ArtifactError(f"{folder / name} cannot be read: {error.strerror}", hint=_DAMAGED) from error
        self._compare(folder / name, found.sha256)

    def _compare(self, path: Path, sha256: str) -> None:
        known = self.files.get(path.name)
        if known is None or sha256 != known.sha256:
            raise ArtifactError(f"{path} is not what was compiled: its checksum differs", hint=_DAMAGED)


def _parsed(values: dict[str, Any], path: Path) -> Manifest:
    try:
        values["inputs"], values["outputs"] = (
            tuple(TensorInfo(i["name"], i["dtype"], tuple(i["dims"])) for i in values[k]) for k in ("inputs", "outputs")
        )
        values["files"] = {k: FileRecord(**v) for k, v in values["files"].items()}
        values["labels"] = tuple(values["labels"])
        if values["preprocess"] is not None:
            values["preprocess"] = Preprocess.from_json(values["preprocess"])
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} lacks or has too much: {error}", hint=_DAMAGED) from error


def record(path: Path) -> FileRecord:
    """Size and checksum of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(path.stat().st_size, digest.hexdigest())


def artifact_files(folder: Path) -> set[str]:
    """The names of what fxpress wrote into an artifact's folder."""
    try:
        written = json.loads((folder / FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: what it must have been
        written = (MODEL, FLOAT_MODEL, "report.json", "report.html")
    return {FILE, *written}


def is_artifact(folder: Path) -> bool:
    """Does `folder` look like something that fxpress wrote?"""
    return (folder / FILE).is_file() and (folder / MODEL).is_file()
