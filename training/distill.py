"""Distillation: a student learns from what a teacher says, beside or instead of labels.

    terms = [SoftLabels(temperature=4), Features((("layer2", "layer2"),))]
    objective = Distillation(student, teacher, terms, labels=0.1)
    fxpress.finetune(student, data, options, objective=objective)

    loss = labels * cross entropy + sum of weight * term

The teacher is a module or a Program with the student's inputs; it runs in evaluation mode, without gradients. The
student is any Program: pruned, fake-quantized, or another architecture. Adapters, where a term needs them, are trained
with the student and are no part of it: they vanish with the objective.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import DataError, OptionError, did_you_mean, explained
from ..frontend.program import Program, layer_name
from ..passes.prune.recovery.partial_run import PartialRun
from ..runtime.feed import example_tensors, leaves
from .distill_terms import Seen, Term
from .engine import move
from .layout import channel_dim
from .objectives import Batch, call, label_loss, scores_tokens

Inputs = tuple[torch.Tensor, ...]


class Distillation(nn.Module):
    """An objective `(program, batch) -> loss` for training `student` after `teacher`.

    `terms` say what is learned from the teacher (distill_terms.py), `labels` is the weight of the cross entropy with
    the batch's labels, `label_smoothing` belongs to it. Adapters are initialised from `seed`.
    Raises OptionError for names that neither knows and for weights that leave nothing to learn.
    """

    tells_classes = True

    def __init__(
        self,
        student: Program,
        teacher: Program | nn.Module,
        terms: Sequence[Term],
        *,
        labels: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_weights(terms, labels, label_smoothing)
        self.terms, self.label_weight, self.label_smoothing = tuple(terms), labels, label_smoothing
        self._seed = seed
        self._asked: tuple[Program, bool] | None = None
        self._student = _ProgramView([s for t in terms for s, _ in t.pairs])
        self._teacher = _Teacher(student, teacher, [t for term in terms for _, t in term.pairs])
        self.adapters = self._make_adapters(student, seed)

    @property
    def reads_labels(self) -> bool:
        """Are the labels of the data looked at?"""
        return bool(self.label_weight)

    def described(self) -> dict[str, Any]:
        """What it teaches, for checkpoints (describe.py)."""
        weights = {"labels": self.label_weight, "label_smoothing": self.label_smoothing}
        return {"terms": self.terms, **weights, "teacher": self._teacher.model}

    def made_for(self, student: Program) -> Distillation:
        """The same for another student, with adapters of its widths."""
        options = {"labels": self.label_weight, "label_smoothing": self.label_smoothing, "seed": self._seed}
        return Distillation(student, self._teacher.model, self.terms, **options)  # type: ignore[arg-type]

    def forward(self, program: Program, batch: Batch) -> torch.Tensor:
        """The loss of one batch."""
        seen, taught = self._student(program, batch.inputs), self._teacher(batch.inputs)
        student, teacher = self._classes_second(program, seen, taught)
        _check_scores(student, teacher)
        losses = [
            term.weight * term(student, teacher, adapters)
            for term, adapters in zip(self.terms, self.adapters)  # type: ignore[arg-type]
        ]
        if self.label_weight:
            losses.append(self.label_weight * label_loss(student.scores, batch, self.label_smoothing))
        return torch.stack(losses).sum()

    def _classes_second(self, program: Program, student: Seen, teacher: Seen) -> tuple[Seen, Seen]:
        """Scores of tokens [N, tokens, classes] as all terms expect them, [N, classes, tokens]. What the student's
        program says is taken to hold for the teacher, too, which may be a module."""
        if student.scores.ndim != 3 or teacher.scores.ndim != 3 or not self._scores_tokens(program):
            return student, teacher
        return tuple(seen._replace(scores=seen.scores.transpose(1, 2)) for seen in (student, teacher))  # type: ignore[return-value]

    def _scores_tokens(self, program: Program) -> bool:
        if self._asked is None or self._asked[0] is not program:
            self._asked = program, scores_tokens(program)
        return self._asked[1]

    def _make_adapters(self, student: Program, seed: int) -> nn.ModuleList:
        """Each term's adapters, for the sizes that one run on the example inputs shows."""
        inputs = example_tensors(student)
        with torch.no_grad():
            seen = self._student(student, inputs)
            what = "the teacher does not run on the student's inputs"
            with explained(OptionError, what, "teacher and student take the same inputs"):
                taught = self._teacher(inputs)
        seen, taught = self._classes_second(student, seen, taught)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.ModuleList(nn.ModuleList(term.adapters(seen, taught)) for term in self.terms)


def _check_weights(terms: Sequence[Term], labels: float, smoothing: float) -> None:
    if not terms:
        raise OptionError("distillation without terms is plain training", hint="give SoftLabels(), or no Distillation")
    bad = [t for t in terms if not t.weight > 0]
    if bad or labels < 0:
        raise OptionError(f"weights must be positive: {bad or labels}", hint="leave out what has no weight")
    if smoothing and not labels:
        raise OptionError("label_smoothing has no effect without labels", hint="give labels=0.1")


def _check_scores(student: Seen, teacher: Seen) -> None:
    if student.scores.shape != teacher.scores.shape:
        raise DataError(
            f"the student's scores have shape {list(student.scores.shape)}, the teacher's {list(teacher.scores.shape)}",
            hint="the two must tell the same classes apart",
        )


# -- what is seen of a model --------------------------------------------------------------------------------------


class _ProgramView:
    """The first output of a program and the values of some of its nodes, with gradients where they are recorded."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._run: PartialRun | None = None

    def __call__(self, program: Program, inputs: Inputs) -> Seen:
        if not self.names:
            return Seen(pytree.tree_leaves(call(program, inputs))[0].float(), {})
        if self._run is None or self._run.program is not program:
            nodes = [program.output_nodes()[0], *(named_node(program, n) for n in self.names)]
            self._run = PartialRun(program, nodes)
            self._nodes = nodes
            self._channels = {name: channel_dim(node) for name, node in zip(self.names, nodes[1:])}
        values = self._run(inputs)
        first, *others = self._nodes
        features = {n: values[v].float() for n, v in zip(self.names, others)}
        return Seen(values[first].float(), features, self._channels)


def named_node(program: Program, name: str) -> Any:
    """The node of that name, or the last one of the module of that name. Raises OptionError."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and _is_feature(n)]
    exact = [n for n in nodes if n.name == name]
    inside = [n for n in nodes if layer_name(n) == name or layer_name(n).startswith(f"{name}.")]
    found = exact or inside
    if not found:
        known = sorted({layer_name(n) for n in nodes})
        raise OptionError(f"the program has no node or module {name!r}", hint=did_you_mean(name, known, "layers"))
    return found[-1]


def _is_feature(node: Any) -> bool:
    value = node.meta.get("val")
    constant = all(source.op == "get_attr" for source in node.all_input_nodes)
    return isinstance(value, torch.Tensor) and value.ndim >= 2 and value.is_floating_point() and not constant


class _Teacher:
    """A copy of a teacher in evaluation mode, on the device of the inputs. It is no part of what is trained."""

    def __init__(self, student: Program, model: Program | nn.Module, names: Iterable[str]) -> None:
        self._student = student
        self._names = tuple(dict.fromkeys(names))
        self._view = _ProgramView(self._names)
        if not isinstance(model, (Program, nn.Module)):
            raise OptionError(
                f"the teacher is a {type(model).__name__}", hint="give a torch.nn.Module or a Program with its weights"
            )
        if isinstance(model, Program) and len(model.inputs) != len(student.inputs):
            raise OptionError(
                f"the teacher takes {len(model.inputs)} inputs, the student {len(student.inputs)}",
                hint="teacher and student take the same inputs",
            )
        self.model = model.copy().eval() if isinstance(model, Program) else copy.deepcopy(model).eval()
        self._device = torch.device("cpu")
        if isinstance(self.model, nn.Module):
            _check_modules(self.model, self._names)

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Seen:
        self._follow(inputs)
        if isinstance(self.model, Program):
            return self._view(self.model, inputs)
        found: dict[str, torch.Tensor] = {}
        hooks = [self.model.get_submodule(n).register_forward_hook(_keep(found, n)) for n in self._names]
        try:
            args, kwargs = pytree.tree_unflatten(leaves(self._student, inputs), self._student.input_spec)
            result = self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return Seen(pytree.tree_leaves(result)[0].float(), found)

    def _follow(self, inputs: Inputs) -> None:
        device = inputs[0].device
        if device == self._device:
            return
        if isinstance(self.model, Program):
            move(self.model, device)
        else:
            self.model.to(device)
        self._device = device


def _check_modules(model: nn.Module, names: Iterable[str]) -> None:
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise OptionError(f"the teacher has no module {name!r}", hint=did_you_mean(name, known, "modules"))


def _keep(found: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found[name] = pytree.tree_leaves(output)[0].float()

    return hook
