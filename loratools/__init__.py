"""Inspect, validate, merge, diff, combine, reduce and extract LoRA adapters: exact, without loading the model.

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
    "CombineReport": "loratools.verbs.combine_report",
    "ConvertReport": "loratools.verbs.convert_report",
    "DiffReport": "loratools.verbs.diff_report",
    "ExtractReport": "loratools.verbs.extract_report",
    "Finding": "loratools.verbs.reports",
    "InspectReport": "loratools.verbs.reports",
    "LoratoolsError": "loratools.errors",
    "METHODS": "loratools.methods",
    "MergePlan": "loratools.verbs.merge",
    "MergeReport": "loratools.verbs.reports",
    "MetadataReport": "loratools.verbs.metadata_report",
    "Module": "loratools.adapter",
    "NormalizeReport": "loratools.verbs.normalize_report",
    "ReduceReport": "loratools.verbs.reduce_report",
    "ValidationReport": "loratools.verbs.reports",
    "VerificationReport": "loratools.verbs.reports",
    "combine": "loratools.verbs.combine",
    "convert": "loratools.verbs.convert",
    "diff": "loratools.verbs.diff",
    "edit_metadata": "loratools.verbs.metadata",
    "extract": "loratools.verbs.extract",
    "inspect": "loratools.verbs.inspect",
    "load": "loratools.verbs.load",
    "merge": "loratools.verbs.merge",
    "method": "loratools.methods.base",
    "normalize": "loratools.verbs.normalize",
    "plan_merge": "loratools.verbs.merge",
    "reduce": "loratools.verbs.reduce",
    "run_merge": "loratools.verbs.merge",
    "validate": "loratools.verbs.validate",
    "verify": "loratools.verbs.verify",
}

# Spelled out, because type checkers take a name as public only where they can read it.
__all__ = [
    "METHODS",
    "Adapter",
    "CombineReport",
    "ConvertReport",
    "DiffReport",
    "ExtractReport",
    "Finding",
    "InspectReport",
    "LoratoolsError",
    "MergePlan",
    "MergeReport",
    "MetadataReport",
    "Module",
    "NormalizeReport",
    "ReduceReport",
    "ValidationReport",
    "VerificationReport",
    "__version__",
    "combine",
    "convert",
    "diff",
    "edit_metadata",
    "extract",
    "inspect",
    "load",
    "merge",
    "method",
    "normalize",
    "plan_merge",
    "reduce",
    "run_merge",
    "validate",
    "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Module
    from loratools.errors import LoratoolsError
    from loratools.methods import METHODS
    from loratools.methods.base import method
    from loratools.verbs.combine import combine
    from loratools.verbs.combine_report import CombineReport
    from loratools.verbs.convert import convert
    from loratools.verbs.convert_report import ConvertReport
    from loratools.verbs.diff import diff
    from loratools.verbs.diff_report import DiffReport
    from loratools.verbs.extract import extract
    from loratools.verbs.extract_report import ExtractReport
    from loratools.verbs.inspect import inspect
    from loratools.verbs.load import load
    from loratools.verbs.merge import MergePlan, merge, plan_merge, run_merge
    from loratools.verbs.metadata import edit_metadata
    from loratools.verbs.metadata_report import MetadataReport
    from loratools.verbs.normalize import normalize
    from loratools.verbs.normalize_report import NormalizeReport
    from loratools.verbs.reduce import reduce
    from loratools.verbs.reduce_report import ReduceReport
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
