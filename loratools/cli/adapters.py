"""Adapters as a command line names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.cli.defaults import origin
from loratools.cli.doorway import Misuse
from loratools.cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.adapter import Adapter

__all__ = ["load_adapters", "require_weights"]


def require_weights(weights: Sequence[float], adapters: Sequence[str]) -> None:
    """Refuse a number of weights that leaves open whose they are.

    Raises:
        Misuse: there are some, but not one for each adapter.
    """
    if weights and len(weights) != len(adapters):
        raise Misuse(
            f"-w was given {counted(len(weights), 'time')}{origin('weight')} for "
            f"{counted(len(adapters), 'adapter')}",
            hint="give it once for each adapter, in their order",
        )


def load_adapters(
    names: Sequence[str],
    config: str | None,
    alpha: float | None,
    *,
    allow_pickle: bool,
    blockwise_experts: bool,
    enable_lora: Sequence[bool] | None = None,
) -> list[Adapter]:
    """Open adapters: headers and configuration only.

    Raises:
        Misuse: one configuration, or one alpha, for several adapters.
    """
    if len(names) > 1 and (config is not None or alpha is not None):
        option = "--alpha" if config is None else "--config"
        raise Misuse(
            f"{option} with {len(names)} adapters leaves open whose it is",
            hint="put an adapter_config.json beside each adapter",
        )
    import loratools as lt

    return [
        lt.load(
            name,
            config=config,
            alpha=alpha,
            allow_pickle=allow_pickle,
            blockwise_experts=blockwise_experts,
            enable_lora=enable_lora,
        )
        for name in names
    ]
