"""Pipelines as text: `cleanup,fuse-batchnorm,prune{macs=0.5,importance=l2},quantize{ranges=mse}`.

Grammar:  pipeline = pass ("," pass)* ;  pass = name ["{" [key "=" value ("," key "=" value)*] "}"]
          value = number | word | true | false | none | "quoted text" | "[" value ("," value)* "]"
Law: `parse(print(passes)) == passes` for all passes, and `print(parse(text))` is the shortest text that means the same
(options that have their default value are left out).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from ..errors import OptionError, PipelineError
from .base import Pass, registered_passes

_TOKEN = re.compile(r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<word>[^\s,{}\[\]="]+)|(?P<mark>[,{}\[\]=]))""")
_BARE = re.compile(r"[^\s,{}\[\]=\"]+")
_WORDS = {"true": True, "false": False, "none": None}


def parse_pipeline(text: str) -> list[Pass]:
    """Read a pipeline text. Raises `PipelineError` (syntax, unknown pass) or `OptionError` (options)."""
    return _Parser(text).pipeline()


def print_pipeline(passes: Sequence[Pass]) -> str:
    """Write passes as text that `parse_pipeline` reads back to equal passes."""
    return ",".join(map(print_pass, passes))


def print_pass(item: Pass) -> str:
    """One pass with the options that differ from their defaults."""
    options = []
    for f in dataclasses.fields(item):  # type: ignore[arg-type]
        value = getattr(item, f.name)
        if value != _default(f):
            options.append(f"{f.name}={_print_value(value)}")
    return item.name + (f"{{{','.join(options)}}}" if options else "")


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """Build a pass by name, its options checked against the types of its fields."""
    passes = registered_passes()
    if name not in passes:
        raise PipelineError(f"unknown pass {name!r}", hint=_suggest(name, passes, "known passes"))
    cls = passes[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise OptionError(f"pass {name!r} has no option {key!r}", hint=_suggest(key, fields, "its options"))
        values[key] = _coerce(value, hints[key], f"{name}.{key}")
    return cls(**values)


def _suggest(word: str, known: typing.Iterable[str], title: str) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"{title}: {', '.join(names) or 'none'}"


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _print_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_print_value, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    plain = _BARE.fullmatch(value) and value not in _WORDS and not _is_number(value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check a parsed value against a field's type, widening int to float and lists to tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, arguments, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise OptionError(f"{where} is {value!r}", hint=f"choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(v, arguments[0], where) for v in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None) and value is None:
        return None
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not fits:
        raise OptionError(f"{where} is {value!r}", hint=f"give a value of type {hint.__name__}")
    return value


def _coerce_union(value: Any, arguments: tuple[Any, ...], where: str) -> Any:
    error: OptionError | None = None
    for argument in arguments:
        try:
            return _coerce(value, argument, where)
        except OptionError as e:
            error = error or e
    raise error if error else OptionError(f"{where} is {value!r}")


class _Parser:
    """Recursive descent over the tokens of one pipeline text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                self._fail(position, "unexpected character")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.index = 0

    def pipeline(self) -> list[Pass]:
        if not self.tokens:
            raise PipelineError("the pipeline is empty", hint="for example: cleanup,fuse-batchnorm")
        passes = [self.one_pass()]
        while self.index < len(self.tokens):
            self.expect(",")
            passes.append(self.one_pass())
        return passes

    def one_pass(self) -> Pass:
        name = self.word("a pass name")
        options: dict[str, Any] = {}
        if self.accept("{") and not self.accept("}"):
            while True:
                key = self.word("an option name")
                if key in options:
                    raise OptionError(f"option {key!r} of pass {name!r} is given twice", hint="keep one")
                self.expect("=")
                options[key] = self.value()
                if self.accept("}"):
                    break
                self.expect(",")
        return make_pass(name, options)

    def value(self) -> Any:
        if self.accept("["):
            items: list[Any] = []
            while not self.accept("]"):
                if items:
                    self.expect(",")
                items.append(self.value())
            return items
        kind, token, position = self.next("a value")
        if kind == "text":
            return json.loads(token)
        if kind == "mark":
            self._fail(position, f"expected a value, found {token!r}")
        return _scalar(token)

    def word(self, what: str) -> str:
        kind, token, position = self.next(what)
        if kind != "word":
            self._fail(position, f"expected {what}, found {token!r}")
        return token

    def accept(self, mark: str) -> bool:
        if self.index < len(self.tokens) and self.tokens[self.index][:2] == ("mark", mark):
            self.index += 1
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            _, token, position = self.next(f"{mark!r}")
            self._fail(position, f"expected {mark!r}, found {token!r}")

    def next(self, what: str) -> tuple[str, str, int]:
        if self.index >= len(self.tokens):
            self._fail(len(self.text), f"the text ends where {what} should be")
        self.index += 1
        return self.tokens[self.index - 1]

    def _fail(self, position: int, message: str) -> typing.NoReturn:
        raise PipelineError(
            f"{message}\n  {self.text}\n  {' ' * position}^",
            hint="write name{key=value,...},name,... ; quote values that hold commas or braces",
        )


def _scalar(token: str) -> Any:
    if token in _WORDS:
        return _WORDS[token]
    for kind in (int, float):
        try:
            return kind(token)
        except ValueError:
            continue
    return token
