"""The GPUs of this machine, as torch sees them."""

from __future__ import annotations


def local_gpu_names() -> list[str]:
    """Device names of the visible CUDA GPUs; empty where there are none."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
