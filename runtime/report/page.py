"""`report.html` from `report.json`: one self-contained file, no scripts, no network."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .words import (
    GOOD_DB,
    comparison,
    count,
    far_from_float,
    metric_words,
    milliseconds,
    number,
    percent,
    pinned_kinds,
    size,
    speed,
    times,
)

_FULL_SQNR = 50.0


def render_page(report: dict[str, Any]) -> str:
    """The page for a report. Every figure comes from `report`, nothing is computed anew."""
    folder = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    css = Markup((folder / "report.css").read_text(encoding="utf-8"))  # our own file, no user's text in it
    return template.render(
        r=report,
        css=css,
        cards=_cards(report),
        comparison=comparison(report),
        percent=percent,
        number=number,
        count=count,
        size=size,
        bar=_bar,
        pinned_kinds=pinned_kinds,
        far_from_float=far_from_float,
    )


def _cards(report: dict[str, Any]) -> list[dict[str, str]]:
    """The headline: accuracy, speed, size, coverage."""
    before, after = report["float"], report["compiled"]
    how_fast = speed(report["speedup"]).split()
    smaller = before["size_bytes"] / after["size_bytes"]
    sizes = f"{size(before['size_bytes'])} → {size(after['size_bytes'])}"
    integer = report["coverage"]["integer_macs"]
    latencies = f"{milliseconds(before['latency_ms'])} → {milliseconds(after['latency_ms'])}"
    return [
        *_metric_card(report),
        _card(how_fast[0], f"{how_fast[1]} than float", latencies, report["speedup"] >= 1),
        _card(times(smaller), "smaller file", sizes, smaller >= 1),
        _card(percent(integer), "of MACs on integers", "in the runtime's own optimized graph", None),
    ]


def _metric_card(report: dict[str, Any]) -> list[dict[str, str]]:
    if not report["metric"]:
        return []
    before, after = report["float"]["metric"], report["compiled"]["metric"]
    *_, change = metric_words(before, after)
    figure, _, unit = change.partition(" ")
    label = f"points of {report['metric']['name']}" if unit else report["metric"]["name"]
    allowed = 0.01 * max(abs(before), abs(after), 0.0 if not unit else 1.0)
    return [_card(figure, label, f"{before:.4g} → {after:.4g}", after - before >= -allowed)]


def _card(figure: str, label: str, detail: str, good: bool | None) -> dict[str, str]:
    tone = "" if good is None else "good" if good else "bad"
    return {"figure": figure, "label": label, "detail": detail, "tone": tone}


def _bar(decibel: float | None) -> Markup:
    if decibel is None:
        return Markup("–")
    width = min(max(decibel / _FULL_SQNR, 0.0), 1.0) * 100
    tone = " low" if decibel < GOOD_DB else ""
    return Markup('<span class="bar{}"><span style="width:{}%"></span></span>{}').format(
        tone, f"{width:.0f}", f"{decibel:.1f}"
    )
