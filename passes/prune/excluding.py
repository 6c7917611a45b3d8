"""Names that a user leaves out: globs over the names of parameters, layers and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...errors import OptionError
from .budgets.choices import matches


def as_patterns(exclude: Iterable[str] | str) -> list[str]:
    """One pattern or several."""
    return [exclude] if isinstance(exclude, str) else list(exclude)


def excluded(names: Mapping[str, Iterable[str]], patterns: Iterable[str]) -> set[str]:
    """The keys that a pattern matches, by one of the names that belong to the key.

    Raises OptionError for a pattern that matches none.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {key for key, own in names.items() if any(matches(n, pattern) for n in own)}
        if not matched:
            raise OptionError(
                f"exclude pattern {pattern!r} matches nothing that would be pruned",
                hint=f"names look like {', '.join(list(names)[:3])}",
            )
        found |= matched
    return found
