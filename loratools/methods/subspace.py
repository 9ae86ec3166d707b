"""The methods that work in the subspaces of the adapters, each family in a file of its own."""

from __future__ import annotations

# ruff: noqa: I001 - the methods are listed in the order in which they are registered here
from loratools.methods.spectral import iso, iso_cts, tsv
from loratools.methods.compress import ctm
from loratools.methods.calibration import pico, svc
from loratools.methods.geometric import model_stock, slerp

__all__ = ["ctm", "iso", "iso_cts", "model_stock", "pico", "slerp", "svc", "tsv"]
