"""``load``: an adapter as data, for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.formats.opening import open_adapter

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from loratools.adapter import Adapter

__all__ = ["load"]


def load(
    ref: str | os.PathLike[str] | Mapping[str, Any],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    blockwise_experts: bool = False,
    enable_lora: Sequence[bool] | None = None,
) -> Adapter:
    """Open an adapter: headers and configuration, no values.

    >>> import numpy as np
    >>> import loratools as lt
    >>> factors = {"fc.lora_A.weight": np.ones((1, 3), "f4"), "fc.lora_B.weight": np.ones((4, 1), "f4")}
    >>> adapter = lt.load(factors, config={"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    >>> adapter.modules["fc"].scaling, adapter.modules["fc"].shape
    (2.0, (4, 3))

    Args:
        ref: a folder, a weight file, or a state dict (where it is PEFT's, with ``config``).
        config: the configuration, where it does not lie beside the weights: a path, or the parsed JSON.
        alpha: the ``lora_alpha``, where no configuration says it.
        allow_pickle: read ``.bin`` and ``.pt`` files.
        blockwise_experts: read the B of fused experts as expert-slowest (unsloth before 2026-09).
        enable_lora: which parts of a fused weight a loralib file has factors for, where no configuration says it.

    Returns:
        Its modules by name, with rank, alpha, scaling and shape, and every tensor that is not part of one.

    Raises:
        NotFound: no such file, or a folder without adapter weights.
        CorruptFile: a file breaks the rules of its format.
        BadConfig: a field of the configuration cannot be, or says another alpha.
        Unsupported: a pickle, without leave to read it.
    """
    return open_adapter(
        ref, config=config, alpha=alpha, allow_pickle=allow_pickle, blockwise_experts=blockwise_experts,
        enable_lora=enable_lora,
    )  # fmt: skip
