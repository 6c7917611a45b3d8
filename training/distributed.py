"""The processes of one job, as `torchrun` or `accelerate launch` started them.

What they tell one another is plain data, sent as safetensors with JSON: nothing that a process receives can run code.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import distributed

from ..errors import TrainingError, first_line

Tensors = dict[str, torch.Tensor]
_TENSOR = "tensor:"


class TorchProcesses:
    """Processes in torch's default group."""

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """The plain data of every process, in order of rank, in each of them. Raises TrainingError for a lost one."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        own = torch.frombuffer(bytearray(packed(value)), dtype=torch.uint8).to(device)
        try:
            sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.count)]
            distributed.all_gather(sizes, torch.tensor([len(own)], device=device))
            room = torch.zeros(max(map(int, sizes)), dtype=torch.uint8, device=device)
            told = [torch.zeros_like(room) for _ in range(self.count)]
            room[: len(own)] = own
            distributed.all_gather(told, room)
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.count} lost contact with another one: {first_line(error)}",
                hint="look at what the other printed, and start all again",
            ) from error
        return [unpacked(bytes(t[: int(n)].cpu().numpy())) for t, n in zip(told, sizes)]


def started_count() -> int:
    """How many processes `torchrun` or `accelerate launch` started; 1 where neither did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes() -> TorchProcesses | None:
    """The processes that this one was started with, None where it is alone."""
    if started_count() == 1 and not distributed.is_initialized():
        return None
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return TorchProcesses() if distributed.get_world_size() > 1 else None


def packed(value: Any) -> bytes:
    """Plain data as bytes: the tensors as safetensors, everything else as JSON in its header."""
    tensors: Tensors = {}
    text = json.dumps(_without_tensors(value, tensors))
    return save_tensors(tensors, {"value": text})


def unpacked(data: bytes) -> Any:
    """What `packed` packed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return _with_tensors(json.loads(header["__metadata__"]["value"]), load_tensors(data))


def _without_tensors(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"{_TENSOR}{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, tensors) for item in value]
    return value


def _with_tensors(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
