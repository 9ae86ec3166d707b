"""Methods of combining adapters, one file a family. :data:`METHODS` has them all by name.

A method of one's own is a function decorated with :func:`method`, in a module that the environment variable
``LORATOOLS_METHODS`` names (several, separated by commas); its options appear on the command line by themselves.
"""

from __future__ import annotations

import importlib
import os

from loratools.methods.base import METHODS, Approximation, Between, Method, Option, Stack, find, method

__all__ = ["METHODS", "Approximation", "Between", "Method", "Option", "Stack", "find", "load", "method"]

# In the order in which they are listed.
_FAMILIES = ("linear", "sparse", "subspace", "legacy")


def load() -> dict[str, Method]:
    """Import every family, and the modules that ``LORATOOLS_METHODS`` names; returns :data:`METHODS`."""
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    for name in os.environ.get("LORATOOLS_METHODS", "").split(","):
        if name.strip():
            importlib.import_module(name.strip())
    return METHODS


load()
