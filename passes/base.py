"""What a pass is: a frozen dataclass whose fields are its options, with a name, a summary and a `run`.

    @fxpress.register_pass
    @dataclass(frozen=True)
    class ReluToHardswish(fxpress.Pass):
        "Replace every ReLU by HardSwish."
        name = "relu-to-hardswish"
        preserves = frozenset({"interface"})

        def run(self, program, context):
            ...
            return fxpress.Change(count)

A pass edits the program it is given (the manager has copied it) and declares what it preserves; that the declaration is
true is checked by the manager, not by the pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch

from ..errors import PipelineError
from ..frontend.program import Program

if TYPE_CHECKING:
    from .prune.budgets.measuring import OpLatencies
    from .quantize.spec import Target

VALUES = "values"
INTERFACE = "interface"


@dataclass
class Change:
    """What a pass did: how many changes, notes for people, and the reasons for what it left alone."""

    count: int = 0
    notes: list[str] = field(default_factory=list)


class Processes(Protocol):
    """Processes that work on one job, each knowing its place. `training.distributed` makes it from torch's."""

    rank: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """The plain data (numbers, texts, tensors, lists, dicts) of every process, in their order, in each of them."""


@dataclass
class Context:
    """What a pass may know beyond the program.

    `calibration` is re-iterable and yields flat tuples of input tensors in the order of `program.inputs`. `results`
    collects what passes hand to the report (a pruning plan, ranges), by pass name. `latencies` is the clock of the
    target's runtime, for pruning to a latency. `judge` gives the user's metric of a program in the target's runtime
    (higher is better; it raises OptionError where there is no finite number), for searches under an allowed drop.
    `wanted` names the results that passes of the pipeline read (`Pass.reads`); what costs memory is kept for them only.
    `training` are labelled data for passes that train (what `fxpress.train` takes).
    `processes` share the calibration, each with a part of the data; None: this one is alone.
    """

    target: Target | None = None
    calibration: Iterable[tuple[torch.Tensor, ...]] | None = None
    evaluate: Callable[[Callable[..., Any]], float] | None = None
    seed: int = 0
    progress: Callable[[str, int, int | None], None] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    latencies: OpLatencies | None = None
    judge: Callable[[Program], float] | None = None
    wanted: frozenset[str] = frozenset()
    training: Any = None
    processes: Processes | None = None


class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; fields are options and must have defaults."""

    name: ClassVar[str] = ""
    preserves: ClassVar[frozenset[str]] = frozenset()
    # The entries of Context.results that it reads, which earlier passes keep only where they are wanted.
    reads: ClassVar[frozenset[str]] = frozenset()
    # Does it write into the program's weights (training, in-place arithmetic), or only put others in their places?
    writes_weights: ClassVar[bool] = True
    # Relative bound on the outputs of a pass that preserves values: max |after - before| / max |before|.
    tolerance: ClassVar[float] = 1e-4

    def run(self, program: Program, context: Context) -> Change:
        """Edit `program` in place and say what was done."""
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


P = TypeVar("P", bound=type[Pass])
_REGISTRY: dict[str, type[Pass]] = {}


def register_pass(cls: P) -> P:
    """Make a pass known by its name, to pipelines and the command line. Use as a decorator, above @dataclass."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PipelineError(f"{cls!r} is not a subclass of fxpress.Pass", hint="write `class MyPass(fxpress.Pass)`")
    if not cls.name:
        raise PipelineError(f"pass {cls.__name__} has no name", hint='give it one: name = "my-pass"')
    _check_declarations(cls)
    known = _REGISTRY.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PipelineError(
            f"two passes are called {cls.name!r}: {known.__module__}.{known.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}",
            hint="rename yours",
        )
    _REGISTRY[cls.name] = cls
    return cls


def _check_declarations(cls: type[Pass]) -> None:
    """Raise PipelineError for a class whose options or promises cannot be read."""
    if "__dataclass_fields__" not in vars(cls):
        raise PipelineError(
            f"pass {cls.name!r} is no dataclass",
            hint="put @dataclass(frozen=True) below @fxpress.register_pass: its fields are the options",
        )
    for option in dataclasses.fields(cls):  # type: ignore[arg-type]
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
            raise PipelineError(f"option {option.name!r} of pass {cls.name!r} has no default", hint="give it one")
    unknown = sorted(set(cls.preserves) - {VALUES, INTERFACE})
    if unknown:
        raise PipelineError(
            f"pass {cls.name!r} preserves {unknown[0]!r}", hint=f"what a pass can promise: {VALUES!r}, {INTERFACE!r}"
        )


def registered_passes() -> dict[str, type[Pass]]:
    """Name -> class of every pass known now: the built-in ones, plug-ins and the user's own."""
    from .builtin import load_builtin

    load_builtin()
    return dict(sorted(_REGISTRY.items()))
