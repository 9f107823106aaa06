"""In which precision the layers run."""

from __future__ import annotations

import torch

from trimoe.errors import UserError


def compute_dtype(dtype: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """The precision that layers run in, by name or as such. "auto" is bfloat16 on a CUDA device that computes in it, float32 elsewhere: a
    GPU is about ten times slower in float32, most CPUs are slower in bfloat16. (Flags of torch's, such as TF32, stay as the user has them.)"""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.bfloat16 if _has_bfloat16(str(device)) else torch.float32
    found = dtypes.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype {str(dtype)!r} is not one of auto, {', '.join(dtypes)}.")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """As it is given and recorded."""
    return str(dtype).removeprefix("torch.")


def _has_bfloat16(device: str) -> bool:
    """Whether a CUDA device computes in bfloat16 itself. Where there is none, a plan is made for another machine, whose device has it."""
    if device.partition(":")[0] != "cuda":
        return False
    if not torch.cuda.is_available():
        return True
    try:
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    except (RuntimeError, AssertionError, ValueError):
        return False  # no such device, as usable_device says
