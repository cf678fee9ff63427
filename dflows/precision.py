"""What a device computes in bfloat16, and the precision of a trainer that this suggests."""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["has_bfloat16"]


def has_bfloat16(device_type: str) -> bool:
    """Says whether a device multiplies matrices in bfloat16 faster than in float32.

    Such are CUDA GPUs with bfloat16 of their own, and processors with tiles of it (Intel's AMX).
    Vector instructions alone (`avx512_bf16`) are slower than float32, and what emulates them more.

    Args:
        device_type: The type of the device, ``cpu`` or ``cuda`` say.

    Example:
        >>> has_bfloat16("meta")
        False
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # An older PyTorch does not say what the processor has.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device_type == "cpu" and bool(capabilities.get("amx_bf16"))
