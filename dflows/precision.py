"""Which devices are fast in bfloat16, and the precision of a trainer that this suggests."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

__all__ = ["has_bfloat16", "trainer_precision"]


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


def trainer_precision(accelerator: object = "auto") -> Literal["bf16-mixed", "32-true"]:
    """Returns the precision in which a Lightning trainer is fast, and no less exact.

    Under mixed precision networks are trained in bfloat16; losses, and everything without
    gradients, are computed in float32.

    Args:
        accelerator: That of the trainer, such as ``cpu``, ``gpu`` or ``auto``. Of others no fast
            bfloat16 is known.

    Returns:
        ``bf16-mixed`` where the device has fast bfloat16 (:func:`has_bfloat16`), or ``32-true``.

    Example:
        >>> trainer_precision("mps")
        '32-true'
        >>> trainer = pl.Trainer(precision=trainer_precision())  # doctest: +SKIP
    """
    if accelerator in ("auto", "gpu"):
        found = torch.accelerator.current_accelerator(check_available=True)
        accelerator = "cpu" if found is None else found.type
    return "bf16-mixed" if has_bfloat16(str(accelerator)) else "32-true"
