"""Libraries that a test may lack: without one it is skipped, or fails where CI says that none may be missing."""

import importlib
import os

import pytest


def library(name: str, *, variable: str, requirements: str):
    """The module. variable: of the environment; `required`: no skip, a failure. requirements: the file to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = f"{name} is not installed (pip install -r {requirements}): {error}"
        if os.environ.get(variable) == "required":
            pytest.fail(reason)
        pytest.skip(reason)
