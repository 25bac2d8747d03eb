"""`import benchmarks.torchvision_ops` before timm or vit-pytorch: they then load beside any build of torchvision.

The torchvision of most package indexes is the CUDA build; beside a CPU build of torch its compiled half does not load,
and it then fails to describe two of its operators, which no peer uses. Naming them is all it takes. Nothing happens
where torchvision loads as it is.
"""

import torch

_OPERATORS = ("nms", "qnms")
_kept = []  # a library's operators go when it does


def allow() -> None:
    """Make `import torchvision` work; once a process."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


allow()
