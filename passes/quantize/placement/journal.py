"""A journal of trials: JSON lines that survive a kill, and from which a search goes on.

The first line says whose journal it is: a fingerprint of model, data and settings. Every further line is one fact, on
the disk (fsync) before the search goes on; a line torn by a kill is dropped when the journal is read again. A journal
with another fingerprint is replaced, and `notes` says so. What cannot be written in the middle of a search is a note,
not an error: the result matters more than the journal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ....errors import OutputError
from ....frontend.program import Program

_MARK = "fxpress search journal"


class Journal:
    """Facts by key, kept in memory and, where there is a `path`, in a file.

    Raises OutputError for a path that cannot be written to, or that holds something else than a journal.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.facts: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.head = {"journal": _MARK, "version": 1, "fingerprint": fingerprint}
        if path is None:
            return
        try:
            known = list(_read(path)) if path.exists() else []
            if known and known[0] != self.head:
                self.notes.append(f"{path.name} is of another model, data, setting or version: begun anew")
                known = []
            self.facts = {fact["key"]: fact for fact in known[1:]}
            _replace(path, [self.head, *self.facts.values()])
        except OSError as error:
            hint = "choose another file with --journal, on a disk with room"
            raise OutputError(f"cannot write the journal {path}: {error.strerror or error}", hint=hint) from error
        if self.facts:
            self.notes.append(f"{path.name}: {len(self.facts)} facts of an earlier run are taken over")

    def expect(self, key: str, fact: dict[str, Any]) -> None:
        """Begin anew where an earlier run found another fact of that key; remember this one."""
        known = self.facts.get(key)
        if known is not None and known != {"key": key, **fact}:
            self.facts = {}
            self.notes = ["the journal's facts are not those of this run (another metric?): begun anew"]
            if self.path is not None:
                _replace(self.path, [self.head])
        self.add(key, fact)

    def find(self, key: str) -> dict[str, Any] | None:
        """The fact of that key, if it is known."""
        return self.facts.get(key)

    def add(self, key: str, fact: dict[str, Any]) -> None:
        """Remember a fact, on the disk too before this returns. Values must be JSON's."""
        self.facts[key] = {"key": key, **fact}
        if self.path is None:
            return
        try:
            _append(self.path, self.facts[key])
        except OSError as error:
            self.notes.append(f"the journal {self.path} ends early: {error.strerror or error}")
            self.path = None


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal. Raises OutputError where the file is none."""
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        fact = _parsed(line)
        if i == 0 and line and (fact is None or fact.get("journal") != _MARK):
            hint = "choose another file for the journal"
            raise OutputError(f"{path} exists and is no journal, so it is left alone", hint=hint)
        if fact is None or (i and "key" not in fact):
            return  # torn by a kill: nothing behind it counts
        yield fact


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _line(fact: dict[str, Any]) -> bytes:
    return json.dumps(fact, allow_nan=False).encode() + b"\n"


def _replace(path: Path, facts: list[dict[str, Any]]) -> None:
    """Write a whole journal in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(b"".join(map(_line, facts)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _append(path: Path, fact: dict[str, Any]) -> None:
    """Add one line in one write."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        content = _line(fact)
        if os.write(descriptor, content) != len(content):
            raise OSError(28, "no space left on device")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(program: Program, data: Iterable[tuple[torch.Tensor, ...]], *facts: object) -> str:
    """A hash of a program (graph and weights), of calibration data and of whatever else decides the outcome."""
    digest = hashlib.sha256(repr(facts).encode())
    for node in program.graph.nodes:
        digest.update(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}\n".encode())
    for name, tensor in sorted(program.state_dict().items()):
        digest.update(name.encode())
        add_tensor(digest, tensor)
    for batch in data:
        for tensor in batch:
            add_tensor(digest, tensor)
    return digest.hexdigest()


def add_tensor(digest: Any, tensor: torch.Tensor) -> None:
    """Take dtype, shape and content of a tensor into a hash."""
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
