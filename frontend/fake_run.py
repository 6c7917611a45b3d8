"""Running a graph on fake tensors, to know what each node gives: its shape, its dtype, and whose memory it is in."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

# Without a kernel for fake tensors these are run step by step, which takes minutes for a long sequence.
_RECURRENT = (torch.ops.aten.gru.input, torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input)


class FakeRun(fx.Interpreter):
    """An interpreter under a fake mode. Parameters and buffers are taken at their own, fixed sizes."""

    def __init__(self, module: fx.GraphModule, mode: Any, **options: Any) -> None:
        super().__init__(module, **options)
        self.mode = mode

    def run_nodes(self, values: list[Any]) -> None:
        """Run on the values of the placeholders."""
        # Python kernels keep symbolic sizes symbolic; some C++ ones (batch_norm) would freeze the batch.
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            self.run(*values, enable_io_processing=False)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _RECURRENT and not kwargs:
            return _recurrent(*args)
        return super().call_function(target, args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value


def _recurrent(x: torch.Tensor, state: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a recurrent layer gives for x [T, N, I] or [N, T, I]: all outputs, and the last states."""
    *_, bidirectional, batch_first = options
    sizes = (*x.shape[:2], state.shape[2] * (2 if bidirectional else 1))
    if not batch_first:
        return x.new_empty(sizes), torch.empty_like(state)
    return x.new_empty((sizes[1], sizes[0], sizes[2])).transpose(0, 1), torch.empty_like(state)
