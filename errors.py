"""Everything a user can get wrong, as one family of exceptions.

An error says what happened, where (the user's source line, when there is one), why, and ends with a `hint:` that can be
followed. Public functions raise nothing else for bad input.
"""

from __future__ import annotations


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


class LoweringError(FxpressError):
    """A program cannot be written as ONNX."""


class VerificationError(FxpressError):
    """PyTorch and the compiled model do not agree."""


class OutputError(FxpressError):
    """A result cannot be written where it was asked for."""
