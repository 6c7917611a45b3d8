"""The axis algebra: which positions of which tensor dimensions must be removed together.

Every position of a dimension is an *atom*, an integer. A dimension is a vector of atoms, so that concatenation,
slicing, flipping, rolling and gathering by constant indices are plain numpy indexing. Atom 0, `FIXED`, is never
removed.

A product of dimensions (768 = 12 heads x 64) is a vector of *product atoms*: the position (i, j) is the conjunction of
atom i of the outer and atom j of the inner dimension, and is kept if and only if both are. FIXED is neutral in it, so
flattening [C, 7, 7] simply repeats each channel 49 times. Every atom resolves to its *literals*, the independent leaf
atoms whose conjunction it is; pruning chooses among literals only.

`unify(v, w)` says that two dimensions are indexed together. It is a union-find on literals, with substitution where
one side is a product, common refinement where both are, and a pin (never remove, for a stated reason) where nothing
less would be sound. All of it is vectorized: the work is linear in the number of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from torch import fx

from ...frontend.program import source_of

FIXED = 0
_ROOM = 1 << 18  # atoms that there is memory for to begin with: what is not touched costs nothing
_BEGIN = 1 << 14  # atoms that are numbered to begin with
Vector = np.ndarray  # one atom per position of a dimension, int64
Axes = tuple[Vector, ...]  # one vector per dimension of a tensor


@dataclass(frozen=True)
class Reason:
    """Why something is never removed, and the node that says so."""

    text: str
    node: fx.Node | None = None

    @property
    def source(self) -> str | None:
        """The user's source line, or None."""
        return source_of(self.node) if self.node is not None else None

    def __str__(self) -> str:
        return self.text + (f" (at {self.source})" if self.source else "")


class Atoms:
    """The union-find over all atoms of one analysis, with products and pins."""

    def __init__(self) -> None:
        self.count = 1
        self.reasons: list[Reason] = [Reason("fixed")]
        self._parent = np.zeros(_ROOM, dtype=np.int64)
        self._left = np.zeros(_ROOM, dtype=np.int64)  # of a product atom: the outer conjunct, else 0
        self._right = np.zeros(_ROOM, dtype=np.int64)
        self._pin = np.zeros(_ROOM, dtype=np.int64)  # of a root: index into reasons, 0 when it may be removed
        self._marked = np.zeros(_ROOM, dtype=bool)  # has a pin, is or belongs to a product, or follows another atom
        self._every = np.zeros(0, dtype=np.int64)  # 0, 1, 2 ...: new vectors are pieces of it
        self._runs: dict[int, Vector] = {}  # id -> a vector that `_allocate` gave
        self._products = False
        self._adopted: dict[int, tuple[Vector, Vector]] = {}  # id -> the vector (kept, so that its id is), its like
        self._ranges: dict[int, tuple[Vector, int, int]] = {}  # id -> the vector itself, its least and greatest atom
        self._fixed: dict[int, Vector] = {}

    # -- making vectors -----------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Vector:
        """A dimension about which nothing is known yet. One of size 1 is FIXED: nothing would be left of it."""
        return self.fixed(1) if size == 1 else self._allocate(size)

    def fixed(self, size: int) -> Vector:
        """A dimension that is never pruned: batch, space, kernel."""
        if size not in self._fixed:
            self._fixed[size] = np.zeros(size, dtype=np.int64)
            self._fixed[size].flags.writeable = False
        return self._fixed[size]

    def merge(self, *factors: Vector) -> Vector:
        """The product of dimensions, outer to inner, as one dimension."""
        merged = factors[0]
        for inner in factors[1:]:
            outer = np.repeat(merged, len(inner))
            merged = self._conjunction(outer, np.tile(inner, len(merged)))
        return merged

    def split(self, vector: Vector, outer: int, inner: int) -> tuple[Vector, Vector]:
        """Read a dimension as product(outer, inner) and return the factors.

        Where the positions are free, they become products of fresh literals; where they already have this form, it is
        read off. Anything else ties the positions of each column (or row, whichever leaves more freedom).
        """
        assert len(vector) == outer * inner
        if outer == 1 or inner == 1:
            return (vector, self.fixed(1)) if inner == 1 else (self.fixed(1), vector)
        parts = [self._grid(slot.reshape(outer, inner)) for slot in self.resolve(vector)]
        found = [p for p in parts if p is not None]
        if len(found) < len(parts):
            return self._tie(vector.reshape(outer, inner))
        rows, columns = self.fixed(outer), self.fixed(inner)
        for row, column in found:
            rows, columns = self._conjunction(rows, row), self._conjunction(columns, column)
        return rows, columns

    # -- reading ------------------------------------------------------------------------------------------------

    def find(self, vector: Vector) -> Vector:
        """The root of every atom."""
        first = root = self._parent[vector]
        while True:
            up = self._parent[root]
            if (up == root).all():
                break
            root = up
        if root is not first:
            self._parent[vector] = root
        return root

    def resolve(self, vector: Vector, roots: bool = False) -> Vector:
        """The literals of every position: an array [slots, positions] of leaf roots, filled up with FIXED.

        `roots`: the vector came from `find`.
        """
        if not self._products:
            return (vector if roots else self.find(vector))[None]
        slots, stack = [], [vector]
        while stack:
            column = self.find(stack.pop())
            left = self._left[column]
            if left.any():
                stack += [self._right[column], np.where(left > 0, left, column)]
            else:
                slots.append(column)
        return _distinct(slots)

    def literals(self, vector: Vector) -> Vector:
        """The distinct literals of a vector, FIXED left out."""
        found = np.unique(self.resolve(vector))
        return found[found > 0]

    def pinned(self, literals: Vector) -> Vector:
        """Which of these literals may never be removed."""
        return (self._pin[literals] > 0) | (literals == FIXED)

    def reason(self, literal: int) -> Reason | None:
        """Why a literal is pinned, or None."""
        index = int(self._pin[literal])
        return self.reasons[index] if index else None

    # -- relating -----------------------------------------------------------------------------------------------

    def pin(self, vector: Vector, reason: Reason) -> None:
        """Never remove these positions: pin every literal of them that is not pinned yet."""
        if not movable(vector):
            return
        literals = self.resolve(vector)
        free = literals[(self._pin[literals] == 0) & (literals != FIXED)]
        if len(free):
            self.reasons.append(reason)
            self._pin[free] = len(self.reasons) - 1
            self._marked[free] = True

    def adopt(self, first: Vector, second: Vector) -> bool:
        """Where nothing is known yet of one of them, let it be the other: most unions are this. Nothing is pinned."""
        return first is second or self._adopt(first, second) or self._adopt(second, first)

    def unify(self, first: Vector, second: Vector, reason: Reason) -> None:
        """Position i of both is kept or removed together. `reason` is kept where this pins something."""
        if self.adopt(first, second):
            return
        assert len(first) == len(second)
        first, second = self.find(first), self.find(second)
        differ = first != second
        if not differ.any():
            return
        first, second = first[differ], second[differ]
        self.pin(second[first == FIXED], reason)
        self.pin(first[second == FIXED], reason)
        both = (first != FIXED) & (second != FIXED)
        if self._products:
            whole = bool(both.all() and differ.all())
            self._unify_products(first[both], second[both], reason, whole)
        else:
            self._unite(first[both], second[both])

    # -- inner parts --------------------------------------------------------------------------------------------

    def _adopt(self, known: Vector, new: Vector) -> bool:
        """Where `new` is a run of atoms of which nothing is known yet, let it be `known`."""
        if len(known) != len(new) or not (len(new) and self._is_run(new)):
            return False
        start = int(new[0])
        run = slice(start, start + len(new))
        # FIXED needs a reason, a factor of a product may be one of `known`, and newer atoms may lead to `new`.
        if not self._lies_before(known, start) or np.count_nonzero(self._marked[run]):
            return False
        self._parent[run] = known
        self._marked[run] = True
        self._adopted[id(new)] = new, known
        return True

    def _is_run(self, vector: Vector) -> bool:
        """Consecutive atoms, as all that was allocated as one and pieces of it are."""
        if id(vector) in self._runs:
            return True
        start = int(vector[0])
        return np.array_equal(vector, self._every[start : start + len(vector)])

    def _lies_before(self, known: Vector, start: int) -> bool:
        """Are all atoms older than `start`, and none FIXED? Asked of one vector for many others."""
        if id(known) in self._runs:  # FIXED is in no run
            return int(known[-1]) < start
        if id(known) not in self._ranges:
            self._ranges[id(known)] = known, int(known.min()), int(known.max())
        _, least, greatest = self._ranges[id(known)]
        return least != FIXED and greatest < start

    def original(self, vector: Vector) -> Vector:
        """The vector that this one was let be as a whole, or itself: equal vectors are mostly one."""
        while (found := self._adopted.get(id(vector))) is not None:
            vector = found[1]
        return vector

    def _allocate(self, size: int) -> Vector:
        start, self.count = self.count, self.count + size
        if self.count > len(self._every):
            self._make_room()
        vector = self._every[start : self.count]
        self._runs[id(vector)] = vector
        return vector

    def _make_room(self) -> None:
        """More atoms that are their own roots: twice as many as are in use, within the memory that there is."""
        begun, size = len(self._every), max(_BEGIN, 2 * self.count)
        if self.count <= len(self._parent):
            size = min(size, len(self._parent))
        self._every = np.arange(size)
        if size > len(self._parent):
            more = size - len(self._parent)
            for name in ("_parent", "_left", "_right", "_pin", "_marked"):
                setattr(self, name, np.pad(getattr(self, name), (0, more)))
        self._parent[begun:size] = self._every[begun:]

    def _conjunction(self, first: Vector, second: Vector) -> Vector:
        """Elementwise `first and second`; FIXED is neutral."""
        result = np.where(first == FIXED, second, first)
        new = (first != FIXED) & (second != FIXED) & (first != second)
        size = int(new.sum())
        if size:
            atoms = self._allocate(size)
            self._left[atoms], self._right[atoms] = first[new], second[new]
            self._marked[first[new]] = self._marked[second[new]] = self._marked[atoms] = True
            self._products = True
            result[new] = atoms
        return result

    def _grid(self, matrix: Vector) -> tuple[Vector, Vector] | None:
        """Factors (rows, columns) of a matrix of literals, defining the literals as products if need be."""
        rows, columns = matrix.shape
        if (matrix == matrix[:, :1]).all():
            return matrix[:, 0], self.fixed(columns)
        if (matrix == matrix[:1]).all():
            return self.fixed(rows), matrix[0]
        flat = matrix.ravel()
        if flat[0] > FIXED and (flat[1:] > flat[:-1]).all():  # all different: the usual case, with nothing to sort
            outer, inner = self._allocate(rows), self._allocate(columns)
            self._substitute(flat, self.merge(outer, inner))
            return outer, inner
        _, first_row, row_class = np.unique(matrix, axis=0, return_index=True, return_inverse=True)
        _, first_column, column_class = np.unique(matrix, axis=1, return_index=True, return_inverse=True)
        cells = matrix[np.sort(first_row)][:, np.sort(first_column)]
        if FIXED in cells or len(np.unique(cells)) < cells.size or len(np.unique(matrix)) > cells.size:
            return None
        outer, inner = self._allocate(cells.shape[0]), self._allocate(cells.shape[1])
        self._substitute(cells.ravel(), self.merge(outer, inner))
        # np.unique numbers the classes by value; number them by their first appearance instead.
        return outer[_rank(first_row)[row_class.ravel()]], inner[_rank(first_column)[column_class.ravel()]]

    def _tie(self, matrix: Vector) -> tuple[Vector, Vector]:
        """Make all rows equal (or all columns, where that leaves more freedom)."""
        reason = Reason("a dimension is split at a place where its parts do not line up")
        rows, columns = matrix.shape
        if rows > columns:
            self.unify(np.repeat(matrix[:, 0], columns - 1), matrix[:, 1:].ravel(), reason)
            return matrix[:, 0], self.fixed(columns)
        self.unify(np.tile(matrix[0], rows - 1), matrix[1:].ravel(), reason)
        return self.fixed(rows), matrix[0]

    def _unite(self, first: Vector, second: Vector) -> None:
        """Union of literals, pairwise; pins are inherited."""
        first, second = self.find(first), self.find(second)
        while True:
            differ = first != second
            if not differ.any():
                return
            first, second = first[differ], second[differ]
            low, high = np.minimum(first, second), np.maximum(first, second)
            self._parent[high] = low  # of several writes one wins; the others are made in the next round
            self._marked[high] = True
            pinned = self._pin[high] > 0
            if pinned.any():
                high = high[pinned]
                roots = self.find(high)
                np.maximum.at(self._pin, roots, self._pin[high])
                self._marked[roots] = True
            first, second = self.find(first), self.find(second)

    def _substitute(self, literals: Vector, products: Vector) -> None:
        """Let each (distinct) literal be the product atom beside it."""
        pins = self._pin[literals]
        for index in np.unique(pins[pins > 0]):
            self.pin(products[pins == index], self.reasons[index])
        self._parent[literals] = self.find(products)
        self._marked[literals] = True

    def _unify_products(self, first: Vector, second: Vector, reason: Reason, whole: bool) -> None:
        """Unify where at least one side may hold products."""
        refined = not whole
        while True:
            a, b = _same_height(self.resolve(first), self.resolve(second))
            differ = (a != b).any(axis=0)
            if not differ.any():
                return
            differ = (np.sort(a, axis=0) != np.sort(b, axis=0)).any(axis=0)
            if not refined and differ.all() and (a > 0).sum(0).min() > 1 < (b > 0).sum(0).min():
                refined = True
                self._refine(first, second)
                continue
            first, second, a, b = first[differ], second[differ], a[:, differ], b[:, differ]
            single_a, single_b = (a > 0).sum(0) == 1, (b > 0).sum(0) == 1
            if (single_a & single_b).any():
                pairs = single_a & single_b
                self._unite(a[:, pairs].max(0), b[:, pairs].max(0))
            elif single_a.any():
                self._define(a[:, single_a].max(0), second[single_a], b[:, single_a])
            elif single_b.any():
                self._define(b[:, single_b].max(0), first[single_b], a[:, single_b])
            else:
                break
        self._unify_slots(a, b, reason)

    def _define(self, literals: Vector, products: Vector, slots: Vector) -> None:
        """One round of `literal := product`; a literal within its own product is united with the other factors."""
        inside = (slots == literals).any(axis=0)
        if inside.any():
            own, others = np.tile(literals[inside], len(slots)), slots[:, inside].ravel()
            self._unite(own[others > 0], others[others > 0])
            return
        # One at a time per connected set: substituting may put a literal into another's product.
        chosen, index = np.unique(literals, return_index=True)
        safe = ~np.isin(chosen, slots)
        chosen, index = (chosen[safe], index[safe]) if safe.any() else (chosen[:1], index[:1])
        self._substitute(chosen, products[index])

    def _unify_slots(self, a: Vector, b: Vector, reason: Reason) -> None:
        """Products against products: factor by factor where they have equally many free ones, else pin."""
        a, b = (_compact(np.where(self.pinned(x), FIXED, x)) for x in (a, b))
        same = (a > 0).sum(0) == (b > 0).sum(0)
        pairs = (a[:, same] > 0) & (b[:, same] > 0)
        self._unite(a[:, same][pairs], b[:, same][pairs])
        a, b = a[:, ~same], b[:, ~same]
        only_a = a[~(a[:, None] == b[None]).any(axis=1)]
        only_b = b[~(b[:, None] == a[None]).any(axis=1)]
        self.pin(np.concatenate([only_a, only_b]), reason)

    def _refine(self, first: Vector, second: Vector) -> None:
        """Cut both products at the places where the other one is cut: (6, 2) and (2, 6) both become (2, 3, 2)."""
        for one, other in ((first, second), (second, first)):
            size, wanted = len(one), _cuts(self.resolve(other))
            have = _cuts(self.resolve(one))
            if have is None or wanted is None or len(have) == 0 or len(wanted) == 0:
                continue
            for cut in wanted:
                if cut not in have and all(cut % h == 0 or h % cut == 0 for h in have):
                    self.split(one, size // cut, cut)


def movable(vector: Vector) -> bool:
    """Is any position not FIXED? (`any` takes three times as long on short vectors.)"""
    return bool(np.count_nonzero(vector))


def _cuts(slots: Vector) -> list[int] | None:
    """The inner sizes of a row-major product (12 x 64: [64]), [] for no product, None for something else."""
    size = slots.shape[1]
    counts = [len(np.unique(s)) for s in slots]
    if (slots == FIXED).any() or prod(counts) != size:
        return None
    inner = [prod(counts[i + 1 :]) for i in range(len(counts))]
    for slot, count, step in zip(slots, counts, inner):
        if not np.array_equal(slot, slot[::step][:count][np.arange(size) // step % count]):
            return None
    return inner[:-1]


def _distinct(slots: list[Vector]) -> Vector:
    """Slots as an array, with repeated literals of a position and empty slots taken out."""
    if len(slots) == 1:
        return slots[0][None]
    kept: list[Vector] = []
    for slot in slots:
        for earlier in kept:
            slot = np.where(slot == earlier, FIXED, slot)
        if not kept or slot.any():
            kept.append(slot)
    return np.stack(kept)


def _same_height(a: Vector, b: Vector) -> tuple[Vector, Vector]:
    if len(a) == len(b):
        return a, b
    height = max(len(a), len(b))
    a, b = (np.pad(x, ((0, height - len(x)), (0, 0))) for x in (a, b))
    return a, b


def _compact(slots: Vector) -> Vector:
    """Literals first, FIXED last, order kept."""
    return np.take_along_axis(slots, np.argsort(slots == FIXED, axis=0, kind="stable"), axis=0)


def _rank(first: Vector) -> Vector:
    """For each class, its number in the order of first appearance."""
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank
