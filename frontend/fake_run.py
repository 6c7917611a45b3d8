"""Running a graph on fake tensors, to know what each node gives: its shape, its dtype, and whose memory it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

_ATEN = torch.ops.aten
_RECURRENT = (_ATEN.gru.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input, _ATEN.lstm.input)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@contextmanager
def recurrent_at_once() -> Iterator[None]:
    """Let fake tensors go through recurrent layers in one step. torch has no kernel of these for them, and runs every
    time step, which takes minutes for a long sequence."""
    known = {op: dict(op.py_kernels) for op in _RECURRENT}
    try:
        for op in _RECURRENT:
            op.py_kernels[_COMPOSITE] = _recurrent
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernels in known.items():
            op.py_kernels.clear()
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


class FakeRun(fx.Interpreter):
    """An interpreter under a fake mode. Parameters and buffers are taken at their own, fixed sizes."""

    def __init__(self, module: fx.GraphModule, mode: Any, **options: Any) -> None:
        super().__init__(module, **options)
        self.mode = mode

    def run_nodes(self, values: list[Any]) -> None:
        """Run on the values of the placeholders."""
        # Python kernels keep symbolic sizes symbolic; some C++ ones (batch_norm) would freeze the batch.
        with self.mode, torch.no_grad(), enable_python_dispatcher(), recurrent_at_once():
            self.run(*values, enable_io_processing=False)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value


def _recurrent(x: torch.Tensor, states: torch.Tensor | list[torch.Tensor], *options: Any) -> tuple[torch.Tensor, ...]:
    """What a recurrent layer gives for x [T, N, I] or [N, T, I]: all outputs, and the last states (of an LSTM two)."""
    *_, bidirectional, batch_first = options
    last = [states] if isinstance(states, torch.Tensor) else states
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    outputs = x.new_empty((steps, batch, last[0].shape[2] * (2 if bidirectional else 1)))
    return (outputs.transpose(0, 1) if batch_first else outputs, *map(torch.empty_like, last))
