"""mmoe: pretraining of multimodal mixture-of-experts models."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Late, so that `mmoe --help` needs no torch.
    if name == "load":
        from mmoe.checkpoint.load import load

        return load
    raise AttributeError(f"module 'mmoe' has no attribute {name!r}")
