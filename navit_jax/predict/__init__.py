"""A model to call, and the command that calls it; the names below are imported on first use, as --help needs no jax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from navit_jax.predict.cascade import Prediction
    from navit_jax.predict.images import Unreadable
    from navit_jax.predict.model import Model

__all__ = ["Model", "Prediction", "Unreadable"]

_MODULES = {"Model": "model", "Prediction": "cascade", "Unreadable": "images"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
