"""Experts: modules that pack many of them, checkpoints that keep them apart, and every way from one to the other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from loratools.adapter import require_shape
from loratools.deltas.base import Span
from loratools.errors import Mismatch, ShapeMismatch
from loratools.naming import EXPERT_PARTS, FUSED_EXPERTS, TRANSPOSED_EXPERTS
from loratools.targets import Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.adapter import Module
    from loratools.spelling import BaseNames

__all__ = ["ExpertPlaces"]


class ExpertPlaces:
    """Finds the places of modules that adapt experts.

    Args:
        adapter: what to call the adapter in messages.
        config: its configuration: ``target_parameters`` and ``peft_version`` count here.
        base: the base's names.
    """

    def __init__(self, adapter: str, config: Mapping[str, Any], base: BaseNames) -> None:
        self.adapter = adapter
        self.config = config
        self.base = base

    def parameter(self, name: str, path: str, module: Module) -> Iterator[Target]:
        """A parameter named by ``target_parameters``; a fused expert tensor, or the checkpoint's separate experts."""
        parameter = self._which_parameter(name, path, module)
        if parameter is None:
            return
        experts = module.options.get("experts", 1)
        memory = f"{path}.{parameter}"
        if memory in self.base.disk:
            yield from self._fused(name, memory, module, experts)
            return
        for part, place in EXPERT_PARTS.items():
            if place.fused != parameter or f"{path}.0.{part}.weight" not in self.base.disk:
                continue
            for index in range(experts):
                yield self._separate(name, f"{path}.{index}.{part}.weight", module, place.half, index)

    def _which_parameter(self, name: str, path: str, module: Module) -> str | None:
        """The parameter a wrapper adapts: the innermost wrapper has the one its module defines first."""
        listed = [entry.rpartition(".") for entry in self.config.get("target_parameters") or ()]
        mine: list[str] = [last for owner, _, last in listed if path == owner or path.endswith("." + owner)]
        order = {last: i for i, last in enumerate(FUSED_EXPERTS)}
        mine = sorted(dict.fromkeys(mine), key=lambda last: (order.get(last, len(order)), last))
        if not mine:
            return None
        depth = name.count(".base_layer")
        chosen = mine[len(mine) - 1 - depth] if depth < len(mine) else None
        fitting = [last for last in mine if self._fits(f"{path}.{last}", module)]
        if len(fitting) == 1:
            return fitting[0]
        if (
            chosen is None
            or (fitting and chosen not in fitting)
            or any(last not in order for last in mine if len(mine) > 1)
        ):
            raise Mismatch(f"{self.adapter}: cannot tell which of {', '.join(mine)} {name} adapts")
        return chosen

    def _fits(self, memory: str, module: Module) -> bool:
        if memory not in self.base.disk:
            return False
        shape = self.base.shape(memory)
        return sorted(shape[-2:]) == sorted(module.shape) and (
            len(shape) < 3 or shape[0] == module.options.get("experts", 1)
        )

    def _matrix(self, name: str, memory: str, module: Module) -> Target:
        """A 2-D parameter, which PEFT takes as (out, in)."""
        require_shape(name, module.shape, self.base.shape(memory))
        return Target(self.base.disk[memory])

    def _fused(self, name: str, memory: str, module: Module, experts: int) -> Iterator[Target]:
        shape, disk = self.base.shape(memory), self.base.disk[memory]
        if len(shape) == 2:
            yield self._matrix(name, memory, module)
            return
        if len(shape) != 3 or shape[0] != experts:
            raise ShapeMismatch(name, (experts, *module.shape), shape)
        transposed = self._stored_transposed(name, shape, module)
        for index in range(experts):
            yield Target(disk, index=index, transposed=transposed, delta_index=index)

    def _stored_transposed(
        self, name: str, shape: tuple[int, ...], module: Module, *, fused: bool = True
    ) -> bool:
        """Whether the delta is the transpose of the matrices in ``shape`` (experts, first, last).

        PEFT's orientation has changed over its versions; the shapes tell, unless they are square.
        """
        out, into = module.shape
        if (out, into) != shape[1:] and (into, out) != shape[1:]:
            raise ShapeMismatch(name, (shape[0], *module.shape), shape)
        if out != into:
            return (into, out) == shape[1:]
        version = str(self.config.get("peft_version") or "")
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
        if not numbers:
            raise Mismatch(
                f"{self.adapter}: {name} adapts square experts {list(shape)}, and no peft_version says which way",
                hint="PEFT before 0.19.1 wrote (in, out), later (out, in): set peft_version in adapter_config.json",
            )
        return numbers < (0, 19, 1) or (fused and self._in_first())

    def _in_first(self) -> bool:
        """Whether fused experts of this architecture are stored (in, out)."""
        return self._interleaved() or self.base.model_type in TRANSPOSED_EXPERTS

    def _interleaved(self) -> bool:
        """gpt-oss: gate and up in turns. Where nothing says the architecture, the bias beside the fused tensor does."""
        if self.base.model_type is not None:
            return bool(self.base.model_type == "gpt_oss")
        return any(memory.endswith(".experts.gate_up_proj_bias") for memory in self.base.disk)

    def _halves(self, half: int | None, features: int) -> Span | None:
        if half is None:
            return None
        if self._interleaved():
            return Span(half, features, 2)
        return Span(half * (features // 2), (half + 1) * (features // 2))

    def _separate(self, name: str, memory: str, module: Module, half: int | None, index: int) -> Target:
        """One expert's matrix in a checkpoint that keeps experts apart, from a module that packs them."""
        if memory not in self.base.disk:
            raise Mismatch(
                f"{self.adapter}: {name} adapts {module.options.get('experts', 1)} experts, {memory} is missing"
            )
        shape, disk = self.base.shape(memory), self.base.disk[memory]
        # The shape of the parameter that the module was trained on.
        together = (shape[0] * (1 if half is None else 2), shape[1])
        if self._stored_transposed(name, (module.options.get("experts", 1), *together), module, fused=False):
            return Target(
                disk, transposed=True, delta_index=index, delta_cols=self._halves(half, together[0])
            )
        return Target(disk, delta_index=index, delta_rows=self._halves(half, together[0]))

    def into_fused(self, name: str, expert: re.Match[str], module: Module) -> Iterator[Target]:
        """One expert's module on a checkpoint that packs all experts in one tensor."""
        place = EXPERT_PARTS.get(expert["part"])
        if place is None or (memory := f"{expert['owner']}.{place.fused}") not in self.base.disk:
            return
        shape, index = self.base.shape(memory), int(expert["index"])
        if len(shape) != 3 or index >= shape[0]:
            raise ShapeMismatch(name, module.shape, shape)
        fused = (module.shape[0] * (1 if place.half is None else 2), module.shape[1])
        transposed = fused != shape[1:] or (fused[0] == fused[1] and self._in_first())
        require_shape(name, fused[::-1] if transposed else fused, shape[1:])
        span = self._halves(place.half, fused[0])
        disk = self.base.disk[memory]
        if transposed:
            yield Target(disk, index=index, cols=span, transposed=True)
        else:
            yield Target(disk, index=index, rows=span)
