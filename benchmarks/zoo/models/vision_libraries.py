"""timm and torchvision beside a CPU build of torch, for the members that come from them.

The two are installed apart (``pip install --no-deps --target FOLDER torchvision timm``), because transformers imports
torchvision where it finds it, and torchvision's compiled operators do not load beside a torch of another build. None
of the models here uses those operators; declared without a kernel, they let torchvision be imported.
"""

import os
import sys
from pathlib import Path

import torch

_OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "qroi_align", "ps_roi_align", "_ps_roi_align_backward"),
    *("roi_pool", "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)
FOLDER = Path(os.environ.get("TPPLAN_ZOO_PACKAGES", Path(sys.prefix) / "vision"))

library = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None:  # torchvision's own operators load beside a torch with CUDA, and may not exist twice
    for _name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, _name):
            library.define(f"{_name}(Tensor x) -> Tensor")
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

import timm  # noqa: E402
import torchvision  # noqa: E402

__all__ = ["timm", "torchvision"]
