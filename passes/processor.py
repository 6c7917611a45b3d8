"""What the processor has instructions for."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Does it compute in bfloat16? PyTorch does without, too, four times as slowly as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
