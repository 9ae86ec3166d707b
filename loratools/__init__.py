"""Inspect, validate, merge and verify LoRA adapters: exact, streamed, without loading the model.

>>> import loratools as lt
>>> {"inspect", "load", "merge", "plan_merge", "run_merge", "validate", "verify"} <= set(dir(lt))
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> where it lives. Loaded on first use (PEP 562), so that importing the package costs nothing.
_PUBLIC = {
    "Adapter": "loratools.adapter",
    "Finding": "loratools.verbs.reports",
    "InspectReport": "loratools.verbs.reports",
    "LoratoolsError": "loratools.errors",
    "MergePlan": "loratools.verbs.merge",
    "MergeReport": "loratools.verbs.reports",
    "Module": "loratools.adapter",
    "ValidationReport": "loratools.verbs.reports",
    "VerificationReport": "loratools.verbs.reports",
    "inspect": "loratools.verbs.inspect",
    "load": "loratools.verbs.load",
    "merge": "loratools.verbs.merge",
    "plan_merge": "loratools.verbs.merge",
    "run_merge": "loratools.verbs.merge",
    "validate": "loratools.verbs.validate",
    "verify": "loratools.verbs.verify",
}

# Spelled out, because type checkers take a name as public only where they can read it.
__all__ = [
    "Adapter", "Finding", "InspectReport", "LoratoolsError", "MergePlan", "MergeReport", "Module",
    "ValidationReport", "VerificationReport", "__version__", "inspect", "load", "merge", "plan_merge", "run_merge",
    "validate", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Module
    from loratools.errors import LoratoolsError
    from loratools.verbs.inspect import inspect
    from loratools.verbs.load import load
    from loratools.verbs.merge import MergePlan, merge, plan_merge, run_merge
    from loratools.verbs.reports import (
        Finding,
        InspectReport,
        MergeReport,
        ValidationReport,
        VerificationReport,
    )
    from loratools.verbs.validate import validate
    from loratools.verbs.verify import verify


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
