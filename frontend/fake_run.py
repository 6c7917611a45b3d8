"""Running a graph on fake tensors, to know what each node gives: its shape, its dtype, and whose memory it is in."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher


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

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
