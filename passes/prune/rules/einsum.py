"""The rule of einsum: a letter is one dimension wherever it occurs, and what the output leaves out is summed over."""

from __future__ import annotations

from torch import fx

from ..analysis import Analysis, shape_of
from ..axes import Axes, Vector


def einsum(analysis: Analysis, node: fx.Node) -> Axes:
    """Any number of operands, an ellipsis too. A letter that comes twice in one operand takes a diagonal: it stays."""
    inputs, output = _terms(node)
    operands: list[Axes] = [analysis.axes(n) for n in node.args[1]]  # type: ignore[union-attr]
    found: dict[str, Vector] = {}
    for position, (term, axes) in enumerate(zip(inputs, operands)):
        for dim, (letter, vector) in enumerate(zip(_letters(term, len(axes)), axes)):
            _meet(analysis, node, found, letter, vector)
            if letter not in _letters(output, len(shape_of(node))):
                analysis.contract(node, "tensors", dim, position)
            if term.count(letter) > 1:
                analysis.pin(vector, node, "einsum takes a diagonal of it")
    analysis.costs(node, *found.values())
    return tuple(found[x] for x in _letters(output, len(shape_of(node))))


def _meet(analysis: Analysis, node: fx.Node, found: dict[str, Vector], letter: str, vector: Vector) -> None:
    """Unify a dimension with those of the same letter; a size of 1 is broadcast."""
    known = found.get(letter)
    if known is None or len(known) == 1:
        found[letter] = vector
    elif len(vector) == len(known):
        analysis.same(known, vector, node)


def _terms(node: fx.Node) -> tuple[list[str], str]:
    """Terms of the operands and of the output, which may be implicit: letters that occur once, in order."""
    equation = str(node.args[0]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    return left.split(","), right


def _letters(term: str, rank: int) -> list[str]:
    """One name for each dimension; those of an ellipsis are numbered from its end, as broadcasting aligns them."""
    head, dots, tail = term.partition("...")
    count = rank - len(head) - len(tail) if dots else 0
    return [*head, *(f"...{i}" for i in range(count, 0, -1)), *tail]


EINSUM_RULES = {"aten.einsum": einsum}
