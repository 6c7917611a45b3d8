"""Everything a user can get wrong, as one family of exceptions.

An error says what happened, where (the user's source line, when there is one), why, and ends with a `hint:` that can be
followed. Public functions raise nothing else for bad input.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FxpressError(Exception):
    """Base of all errors that a user can cause and mend.

    `message` says what and why, `where` names a source line, file or node, `hint` what to do.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class CaptureError(FxpressError):
    """The model could not be turned into a graph."""


class SourceError(FxpressError):
    """A model name, file or callable could not be resolved."""


class WeightsError(FxpressError):
    """Weights do not fit the model or cannot be read."""


class DataError(FxpressError):
    """Calibration or evaluation data is missing, empty or of the wrong form."""


class OptionError(FxpressError):
    """An option is unknown, has a bad value, or would have no effect."""


class PipelineError(FxpressError):
    """A pipeline text or a pass name cannot be understood."""


class PassError(FxpressError):
    """A pass broke a contract that it declares, or failed."""


class PruningError(FxpressError):
    """A pruning plan cannot be made, applied or read."""


class QuantizationError(FxpressError):
    """A program cannot be quantized as asked."""


class TrainingError(FxpressError):
    """A training cannot start, go on, or be resumed."""


class LoweringError(FxpressError):
    """A program cannot be written as ONNX."""


class VerificationError(FxpressError):
    """PyTorch and the compiled model do not agree."""


class ArtifactError(FxpressError):
    """A folder is no artifact, is damaged, or is called with inputs that it does not take."""


class OutputError(FxpressError):
    """A result cannot be written where it was asked for."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def line_of(error: BaseException) -> str | None:
    """The deepest line outside torch: where code of the user's failed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else None


@contextmanager
def explained(kind: type[FxpressError], what: str, hint: str) -> Iterator[None]:
    """Turn what code of the user's raises into an error of `kind` that says where it failed."""
    try:
        yield
    except FxpressError:
        raise
    except Exception as error:
        message = f"{what}: {type(error).__name__}: {first_line(error)}"
        raise kind(message, where=line_of(error), hint=hint) from error


def did_you_mean(word: str, known: Iterable[str], title: str = "known") -> str:
    """A hint for an unknown name: what is close to it, else the first of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"{title}: {', '.join(names[:12]) or 'none'}{', ...' if len(names) > 12 else ''}"
