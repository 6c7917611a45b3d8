"""Programs of one pipeline with other options and other layers in float, made one after the other.

The float program is calibrated once for each range rule: what was observed of a tensor holds wherever that tensor is
quantized. A tensor that no earlier trial observed (another form of a layer in float) means calibrating again, so a
trial is always what the pipeline itself would make.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import torch
from torch import fx

from ....errors import OptionError, QuantizationError
from ....frontend.batch_dim import batch_name, count_examples, some_examples
from ....frontend.cost import MACS, cost_table, op_name
from ....frontend.program import Program, layer_name
from ...base import Change, Context, Pass
from ...manager import PassManager
from ...pipeline import parse_pipeline, print_pipeline
from ..accuracy.correct_bias import CorrectBias
from ..accuracy.equalize import Equalize
from ..accuracy.float_twin import FLOAT_TWIN
from ..annotate import annotation, named_nodes
from ..observe import Sites, sites_of
from ..passes import Annotate, Calibrate, Fold, Observe, Quantize
from ..ranges.choose import choose_ranges, mean_sqnr, program_outputs
from ..ranges.observers import Candidates
from ..spec import USE_INT16
from .fallback import Instead, Setting
from .points import Switchboard, mark_origins, origin_of
from .sensitivity import Sensitivity, measure_sensitivity

_QUANTIZING = (Annotate, Observe, Calibrate, Fold, Quantize)
_MOST_SAMPLES, _LEAST_SAMPLES = 8, 2
_WORK = 1e11  # multiplications that measuring the sensitivity may take, the least number of samples aside


def flat_steps(passes: Iterable[Pass]) -> list[Pass]:
    """Passes with `quantize` written as the four that it is short for."""
    return [s for p in passes for s in (p.steps() if isinstance(p, Quantize) else (p,))]


def with_options(passes: Iterable[Pass], options: Mapping[str, Any]) -> list[Pass]:
    """The passes with options of quantization replaced, each where a pass has it. Another range rule than `percentile`
    has no use for its option."""
    if options.get("ranges", "percentile") != "percentile":
        options = {"percentile": None, **options}
    return [_replaced(p, options) if isinstance(p, _QUANTIZING) else p for p in passes]


def _replaced(item: Pass, options: Mapping[str, Any]) -> Pass:
    names = {f.name for f in dataclasses.fields(item)}  # type: ignore[arg-type]
    return dataclasses.replace(item, **{k: v for k, v in options.items() if k in names})  # type: ignore[type-var]


def option_of(passes: Iterable[Pass], name: str, default: Any = None) -> Any:
    """The value of a quantization option in a pipeline."""
    found = (getattr(p, name) for p in passes if isinstance(p, _QUANTIZING) and hasattr(p, name))
    return next(found, default)


def quantizes(item: Pass) -> bool:
    """Is this pass a part of quantization, without meaning where nothing is quantized?"""
    return isinstance(item, _QUANTIZING) or ".quantize." in type(item).__module__


@dataclass
class Trials:
    """Trials of `floating`, the program just before quantization, under `context` (target and calibration data)."""

    floating: Program
    context: Context
    _observed: dict[str, _Observed] = field(default_factory=dict)
    _prepared: dict[str, Program] = field(default_factory=dict)
    _settled: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.floating = self.floating.copy()
        mark_origins(self.floating)
        self.macs = {row.node.name: row.macs for row in cost_table(self.floating) if row.macs}

    def passes(self, setting: Setting) -> list[Pass]:
        """The pipeline that makes a setting without a search; where all stays in float, nothing quantizes."""
        passes = parse_pipeline(setting.options)
        if not setting.kept:
            return passes
        if setting.instead == "float" and not self._bits(setting):
            return [p for p in passes if not quantizes(p)]
        return _naming(passes, setting, self.globs(setting.kept))

    def make(self, setting: Setting) -> tuple[Program, int, int]:
        """The program of a setting, and the MACs of one example that it computes in float and in 16 bits."""
        counted = _Counted(self.macs)
        program = self._run(flat_steps(self.passes(setting)), counted)
        return program, *self._count(counted.bits)

    def other_macs(self, setting: Setting) -> tuple[int, int]:
        """The MACs of one example that a setting computes in float and in 16 bits, without making its program."""
        return self._count(self._bits(setting))

    def _count(self, bits: Mapping[str, int]) -> tuple[int, int]:
        wide = sum(macs for operation, macs in self.macs.items() if bits.get(operation) == 16)
        return sum(macs for operation, macs in self.macs.items() if operation not in bits), wide

    @property
    def has_int16(self) -> bool:
        """Has the target activations of 16 bits?"""
        return self.context.target is not None and self.context.target.activation16 is not None

    def with_int16(self, options: str) -> str:
        """The pipeline with activations of 16 bits wherever the target has them."""
        return print_pipeline(with_options(parse_pipeline(options), {"use_int16": ("*",)}))

    def with_eight_bits(self, setting: Setting) -> str:
        """The pipeline of a setting, all that it computes on integers with the target's own formats."""
        return print_pipeline(with_options(self.passes(setting), {"use_int16": ()}))

    def added(self, setting: Setting, options: str, instead: Instead) -> list[str]:
        """Names of what a setting leaves in float, or gives 16 bits, and the pipeline `options` does not."""
        passes = self.passes(setting)
        if not any(map(quantizes, passes)):
            return self.globs(setting.kept) if setting.instead == instead else []
        before = option_of(parse_pipeline(options), _OPTION[instead], ())
        return [name for name in option_of(passes, _OPTION[instead], ()) if name not in before]

    def widened(self, options: str) -> frozenset[str]:
        """The operations that can have 16 bits in place of 8."""
        return frozenset(o for o, bits in self._bits(Setting(self.with_int16(options))).items() if bits == 16)

    def sensitivities(self, options: str) -> list[Sensitivity]:
        """Each point of the program that `options` make, on a few calibration samples; the worst first."""
        observed, weights = self._chosen(options)
        assert self.context.target is not None
        board = Switchboard(observed, self.context.target, weights)
        work = sum(self.macs.values()) * len(board.points) / 2  # half of the network lies behind the middle point
        samples = min(_MOST_SAMPLES, max(_LEAST_SAMPLES, int(_WORK / max(work, 1))))
        return measure_sensitivity(board, self.samples(samples), self.macs)

    def _chosen(self, options: str) -> tuple[Program, str]:
        """The program as it is before folding, its range rule chosen, and the rule for weights."""
        steps = flat_steps(parse_pipeline(options))
        cut = next(i for i, s in enumerate(steps) if isinstance(s, Fold))
        observed, weights = self._run(steps[:cut], _Counted(self.macs)), option_of(steps, "weights", "minmax")
        assert self.context.target is not None
        choose_ranges(observed, self.context.target, weights, self._quiet())
        return observed, weights

    def _run(self, steps: Sequence[Pass], counted: _Counted) -> Program:
        """Run passes on a copy of the float program, `calibrate` from memory where it serves."""
        first = next((i for i, s in enumerate(steps) if isinstance(s, Annotate)), len(steps))
        before = print_pipeline(steps[:first])
        if before not in self._prepared:
            self._prepared[before] = self._managed(steps[:first], self.floating)
        recalled = [
            _Recall(self._observed.setdefault(f"{before} {_rule(steps[:i])}", _Observed()), counted)
            if isinstance(s, Calibrate)
            else s
            for i, s in enumerate(steps)
        ]
        return self._managed(recalled[first:], self._prepared[before])

    def _managed(self, steps: Sequence[Pass], program: Program) -> Program:
        """Run passes; what the whole pipeline is checked for at the end is not checked in every trial."""
        return PassManager(steps, check_numbers=False, share_weights=True).run(program, self._quiet())

    def _quiet(self) -> Context:
        return dataclasses.replace(self.context, results={}, progress=None)

    def simplified(self, setting: Setting) -> Setting:
        """The same program by fewer names: operations without MACs that are in float anyway are not named."""
        whole, fewest = self._bits(setting), setting
        for operation in sorted(o for o in setting.kept if o not in self.macs):
            fewer = dataclasses.replace(setting, kept=fewest.kept - {operation})
            if self._bits(fewer) == whole:
                fewest = fewer
        return fewest

    def settled(self, options: str) -> str:
        """The pipeline with the range rule that `ranges=auto` chooses, so that trials need not choose again."""
        passes = parse_pipeline(options)
        if option_of(passes, "ranges") != "auto":
            return options
        steps = flat_steps(passes)
        key = print_pipeline(steps[: next(i for i, s in enumerate(steps) if isinstance(s, Fold)) + 1])
        if key not in self._settled:
            sites = sites_of(self._chosen(options)[0]).by_key.values()
            self._settled[key] = {o.chosen for s in sites if isinstance(o := s.observer, Candidates)}
        if len(self._settled[key]) != 1:
            return options
        (rule,) = self._settled[key]
        found = {"ranges": rule} if rule == "percentile" else {"ranges": rule, "percentile": None}
        return print_pipeline(with_options(passes, found))

    def remedies(self, options: str) -> Iterator[str]:
        """Settings without more in float: `options`, then the best by the SQNR of the outputs on a few samples of other
        rules for ranges and weights, then with layers equalized, then with biases corrected; only what is better."""
        yield options
        best = self.settled(options)
        score = self._sqnr(best)
        for others in (self._other_rules, self._equalized, _corrected):
            scores = {text: self._sqnr(text) for text in others(best)}
            found = max(scores, key=lambda text: scores[text], default=best)
            if scores.get(found, score) > score:
                best, score = found, scores[found]
                yield best

    def _other_rules(self, options: str) -> list[str]:
        """The range rule that `auto` chooses, with every rule for weights."""
        auto = parse_pipeline(self._chosen_anew(options))
        forms = [print_pipeline(with_options(auto, {"weights": w})) for w in _choices(Fold, "weights")]
        return [f for f in forms if f != options]

    def _equalized(self, options: str) -> list[str]:
        """With layers equalized before, where the pipeline does not do that."""
        passes = parse_pipeline(options)
        known = any(isinstance(p, Equalize) for p in passes)
        return [] if known else [self._chosen_anew(print_pipeline([Equalize(), *passes]))]

    def _chosen_anew(self, options: str) -> str:
        """With the range rule that `auto` chooses for this pipeline."""
        return self.settled(print_pipeline(with_options(parse_pipeline(options), {"ranges": "auto"})))

    def globs(self, operations: Iterable[str]) -> list[str]:
        """Names for `keep_float` that mean exactly these operations: a layer's where it has one, else the node's."""
        wanted = set(operations)
        return sorted({self._glob(n, wanted) for n in self.floating.graph.nodes if n.name in wanted})

    def samples(self, count: int = _MOST_SAMPLES) -> list[tuple[torch.Tensor, ...]]:
        """The first calibration samples as flat batches of one, or the first batch where its size is fixed."""
        assert self.context.calibration is not None
        infos = self.floating.inputs
        found: list[tuple[torch.Tensor, ...]] = []
        for batch in self.context.calibration:
            if batch_name(infos) is None:
                return [batch]
            found += [some_examples(infos, batch, slice(i, i + 1)) for i in range(count_examples(infos, batch))]
            if len(found) >= count:
                break
        return found[:count]

    def _sqnr(self, options: str) -> float:
        program = self.make(Setting(options))[0]
        samples = self.samples()
        expected = (program_outputs(self.floating, s) for s in samples)
        return mean_sqnr(expected, (program_outputs(program, s) for s in samples))

    def _glob(self, node: fx.Node, wanted: set[str]) -> str:
        layer = layer_name(node)
        try:
            meant = {n.name for n in named_nodes(self.floating, [layer], "keep_float")}
        except OptionError:  # a name that reads as another pattern
            meant = set()
        return layer if meant and meant <= wanted else node.name

    def _bits(self, setting: Setting) -> dict[str, int]:
        """The operations that a setting computes on integers, by their names in the float program, and of how many
        bits."""
        steps = _naming(flat_steps(parse_pipeline(setting.options)), setting, sorted(setting.kept))
        program = self.floating.copy()
        try:
            next(s for s in steps if isinstance(s, Annotate)).run(program, self.context)
        except (QuantizationError, OptionError):  # nothing is left, or nothing has other bits
            return {}
        return _bits_of(program, self.macs)


_OPTION: dict[Instead, str] = {"float": "keep_float", "int16": "use_int16"}


def _naming(passes: Sequence[Pass], setting: Setting, names: Sequence[str]) -> list[Pass]:
    """The passes of a setting, its operations by `names`."""
    option = _OPTION[setting.instead]
    return with_options(passes, {option: (*option_of(passes, option, ()), *names)})


def _bits_of(program: Program, macs: Mapping[str, int]) -> dict[str, int]:
    """The operations that an annotated program computes on integers: 8, or 16 where it was told so. Of the nodes that
    were written for an operation with `macs`, those count that have MACs."""
    counts = (n for n in program.graph.nodes if op_name(n) in MACS or origin_of(n) not in macs)
    notes = {n: note for n in counts if (note := annotation(n)) is not None}
    wide = {n for n, note in notes.items() if note.row.activation is not None and n.meta.get(USE_INT16)}
    return {**dict.fromkeys(map(origin_of, notes), 8), **dict.fromkeys(map(origin_of, wide), 16)}


def _corrected(options: str) -> list[str]:
    """With biases corrected behind, where the pipeline does not do that."""
    passes = parse_pipeline(options)
    return [] if any(isinstance(p, CorrectBias) for p in passes) else [print_pipeline([*passes, CorrectBias()])]


def without_fitting(options: str) -> str:
    """A pipeline without what is fitted to the float program behind the quantization (learned rounding, corrected
    biases), which takes longer than all else in a trial and would be done anew in every one."""
    return print_pipeline([p for p in parse_pipeline(options) if FLOAT_TWIN not in p.reads])


def _choices(cls: type[Pass], name: str) -> list[str]:
    return [str(v) for v in get_args(get_type_hints(cls)[name])]


# -- calibrating once ---------------------------------------------------------------------------------------------


@dataclass
class _Counted:
    """What the last program computes on integers (see `_bits_of`)."""

    macs: dict[str, int]
    bits: dict[str, int] = field(default_factory=dict)


@dataclass
class _Observed:
    """What the observers of one range rule have seen, by tensor."""

    observers: dict[str, Any] = field(default_factory=dict)
    samples: int = 0


@dataclass(frozen=True, eq=False)
class _Recall(Pass):
    """Calibrate from what earlier trials observed, where they saw every tensor of this one."""

    name = "calibrate"
    writes_weights = False

    observed: _Observed
    counted: _Counted

    def run(self, program: Program, context: Context) -> Change:
        observed, sites, tensors = self.observed, sites_of(program), _tensors(program)
        keys = [k for k, site in sites.by_key.items() if site.observer is not None]
        if observed.samples and all(tensors[k] in observed.observers for k in keys):
            for k in keys:
                sites.by_key[k].observer = copy.deepcopy(observed.observers[tensors[k]])
            sites.samples = observed.samples
        else:
            Calibrate().run(program, context)
            self._remember(observed, sites, tensors, keys)
        self.counted.bits = _bits_of(program, self.counted.macs)
        return Change()

    @staticmethod
    def _remember(observed: _Observed, sites: Sites, tensors: dict[int, str], keys: list[int]) -> None:
        names = [tensors[k] for k in keys]
        for k in keys:
            if names.count(tensors[k]) == 1:
                observed.observers[tensors[k]] = copy.deepcopy(sites.by_key[k].observer)
        observed.samples = sites.samples


def _rule(steps: Sequence[Pass]) -> str:
    """The `observe` whose observers a `calibrate` behind `steps` fills, as text."""
    return next(print_pipeline([s]) for s in reversed(steps) if isinstance(s, Observe))


def _tensors(program: Program) -> dict[int, str]:
    """For each site the tensor that it observes: what it was made from, by what op, of what shape."""
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.fxpress.observe.default]
    return {int(n.args[1]): _identity(n.args[0]) for n in nodes}


def _identity(tensor: Any) -> str:
    assert isinstance(tensor, fx.Node)
    return f"{origin_of(tensor)} {tensor.target} {tuple(tensor.meta['val'].shape)}"
