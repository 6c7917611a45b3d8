"""How figures are written for people: in the page, in tables of the command line, in one voice. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MISSING = "–"


def count(value: float | None) -> str:
    """1234567 -> "1.23 M"."""
    if value is None:
        return MISSING
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g} {letter}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in powers of ten: 1234567 -> "1.23 MB"."""
    return MISSING if value is None else f"{count(value)}{'' if value >= 1e4 else ' '}B"


def percent(value: float | None, digits: int = 1) -> str:
    """0.9876 -> "98.8 %". What is not all never reads 100."""
    if value is None:
        return MISSING
    text = f"{100 * value:.{digits}f}"
    if value < 1 and float(text) == 100:
        text = f"{100 - 10**-digits:.{digits}f}"
    return f"{text} %"


def number(value: float | None) -> str:
    """Three or four figures: 0.000123 -> "1.23e-04"."""
    return MISSING if value is None else f"{value:.4g}"


def decibel(value: float | None) -> str:
    """31.26 -> "31.3"."""
    return MISSING if value is None else f"{value:.1f}"


def milliseconds(value: float | None) -> str:
    """0.01234 -> "12.3 µs"."""
    if value is None:
        return MISSING
    return f"{value * 1e3:.3g} µs" if value < 0.1 else f"{value:.3g} ms"


def times(value: float | None) -> str:
    """2.5 -> "2.50×"."""
    return MISSING if value is None else f"{value:.2f}×"


def speed(ratio: float | None) -> str:
    """2.5 -> "2.50× faster", 0.8 -> "1.25× slower"."""
    if ratio is None:
        return MISSING
    return f"{times(ratio)} faster" if ratio >= 0.995 else f"{times(1 / ratio)} slower"


GOOD_DB = 15.0  # an SQNR below it is worth a look


def far_from_float(report: dict[str, Any]) -> str | None:
    """What to try where integers alone (nothing was pruned) took the outputs far from the float model's."""
    noise, integers = report["sqnr_db"], report["coverage"]["integer_macs"]
    if noise is None or noise >= GOOD_DB or not integers or report["pruning"]:
        return None
    accurate = "" if "learn-rounding" in report["pipeline"] else "the recipe int8-accurate, or "
    return (
        f"the outputs are far from the float model's (SQNR {decibel(noise)} dB); try {accurate}max_drop with a metric, "
        "which leaves in float what harms most"
    )


@dataclass(frozen=True)
class Row:
    """One line of the comparison of float and compiled."""

    label: str
    before: str
    after: str
    change: str


def comparison(report: dict[str, Any]) -> list[Row]:
    """Float against compiled: metric (if any), latency, size, parameters, MACs."""
    before, after = report["float"], report["compiled"]
    rows = []
    if report["metric"]:
        values = before["metric"], after["metric"]
        rows.append(Row(report["metric"]["name"], *metric_words(*values)))
    rows.append(
        Row(
            "latency",
            milliseconds(before["latency_ms"]),
            milliseconds(after["latency_ms"]),
            speed(report["speedup"]),
        )
    )
    for label, key, form in (
        ("file size", "size_bytes", size),
        ("parameters", "parameters", count),
        ("MACs", "macs", count),
    ):
        share = after[key] / before[key] if before[key] else None
        rows.append(Row(label, form(before[key]), form(after[key]), percent(share)))
    return rows


def metric_words(before: float, after: float) -> tuple[str, str, str]:
    """Two metrics and their difference: shares as percentages and points, others as numbers."""
    if all(0 <= v <= 1 for v in (before, after)):
        return percent(before, 2), percent(after, 2), f"{100 * (after - before):+.2f} points"
    return number(before), number(after), f"{after - before:+.4g}"


@dataclass(frozen=True)
class PinnedKind:
    """Dimensions that cannot be pruned for one reason: how many, their sizes, and the first source line."""

    reason: str
    dimensions: int
    sizes: str
    source: str


def pinned_kinds(pinned: list[dict[str, Any]]) -> list[PinnedKind]:
    """What cannot be pruned (`size`, `reason`, `source`), by reason, largest dimensions first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in pinned:
        kinds.setdefault(row["reason"], []).append(row)
    result = []
    for reason, rows in sorted(kinds.items(), key=lambda item: -max(r["size"] for r in item[1])):
        sizes = sorted({r["size"] for r in rows}, reverse=True)
        text = ", ".join(map(str, sizes[:4])) + (", ..." if len(sizes) > 4 else "")
        result.append(PinnedKind(reason, len(rows), text, rows[0]["source"] or ""))
    return result
