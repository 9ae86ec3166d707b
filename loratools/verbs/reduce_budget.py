"""Budgets of ``reduce``: which ranks are best for all modules together, and how large the result of them is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.deltas.ranks import global_ranks
from loratools.errors import InputError
from loratools.matrices import module_cost
from loratools.provenance import record
from loratools.verbs.reduce_work import Item, least_rank, of_rank
from loratools.verbs.saving import identify_adapter, lay_out

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter, Module
    from loratools.dtypes import Array, Dtype
    from loratools.verbs.reduce_rules import Rule

__all__ = ["Task", "ranks_together", "reduced_adapter", "written_bytes"]


@dataclass(frozen=True, slots=True)
class Task:
    """A reduction that has not happened yet.

    Attributes:
        adapter: opened.
        rule: how ranks are chosen.
        dtype: of the result's factors.
        out: where the result goes; None for memory.
        inputs: paths that were typed for the adapter.
        to: the format of the result; None for the adapter's own.
    """

    adapter: Adapter
    rule: Rule
    dtype: Dtype
    out: Path | None
    inputs: tuple[Path, ...]
    to: str | None = None

    @property
    def items(self) -> list[Item]:
        """The modules."""
        return [Item(name, module) for name, module in self.adapter.modules.items()]

    @property
    def provenance(self) -> dict[str, Any]:
        """The record of what makes the result."""
        from loratools import __version__

        rule, scope = self.rule, "per_module" if self.rule.per_module else "global"
        parameters = {
            rule.name: True if rule.value is None else rule.value,
            "scope": scope,
            "dtype": self.dtype.name,
        }
        return record("reduce", __version__, parameters, [identify_adapter(self.adapter)])


def ranks_together(task: Task, spectra: Mapping[str, Array]) -> dict[str, int]:
    """One optimum over all modules."""
    modules = task.adapter.modules
    costs = {name: module_cost(module) for name, module in modules.items()}
    least = {name: least_rank(module) for name, module in modules.items()}
    rule, value = task.rule, task.rule.value or 0.0
    if rule.name == "rank":
        return global_ranks(spectra, dict.fromkeys(costs, 1), budget=int(value) * len(modules), minimum=least)
    if rule.name == "energy":
        return global_ranks(spectra, costs, energy=value, minimum=least)
    if rule.name == "error":
        return global_ranks(spectra, costs, error=value, minimum=least)
    if rule.name == "params":
        return _ranks_for_params(task, spectra, costs, least)
    return _ranks_for_size(task, spectra, costs, least)


def _ranks_for_params(
    task: Task, spectra: Mapping[str, Array], costs: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    allowed = int(task.rule.value or 0)
    kept = [extra.tensor for extra in task.adapter.extras.values()]
    kept += [module.tensors["up_bias"] for module in task.adapter.modules.values() if least_rank(module)]
    fixed = sum(ref.spec.count for ref in kept)
    smallest = _smallest(spectra, costs, least)
    if (needed := fixed + _cost(costs, smallest)) > allowed:
        raise InputError(f"{task.adapter.name} cannot be had with {allowed:,} parameters: it needs {needed:,} at least",
                         hint=_besides(task, fixed, "parameters"))  # fmt: skip
    return global_ranks(spectra, costs, budget=allowed - fixed, minimum=least)


def _ranks_for_size(
    task: Task, spectra: Mapping[str, Array], costs: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    """As much as a file of this size holds: between what the longest header leaves room for and the shortest."""
    allowed, width = int(task.rule.value or 0), task.dtype.nbytes(1)
    smallest = _smallest(spectra, costs, least)
    if (needed := _file_bytes(task, smallest)) > allowed:
        fixed = sum(extra.tensor.spec.nbytes for extra in task.adapter.extras.values())
        raise InputError(f"{task.adapter.name} cannot be had in {allowed:,} bytes: it needs {needed:,} at least",
                         hint=_besides(task, fixed, "bytes"))  # fmt: skip
    largest = {name: max(1, len(values)) for name, values in spectra.items()}
    room = [
        (allowed - (_file_bytes(task, ranks) - width * _cost(costs, ranks))) // width
        for ranks in (largest, smallest)
    ]
    best, low, high = smallest, room[0], room[1] + 1
    budget = max(low, _cost(costs, least))
    while budget < high:
        ranks = global_ranks(spectra, costs, budget=budget, minimum=least)
        if any(ranks.values()) and _file_bytes(task, ranks) > allowed:
            high = budget
        else:
            low, best = budget, ranks if any(ranks.values()) else best
        if high - low <= min(costs.values()) // 4:  # no component is to be had for the rest
            break
        budget = (low + high + 1) // 2
    return best


def _smallest(
    spectra: Mapping[str, Array], costs: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    """The cheapest choice that leaves a module at all."""
    if any(least.values()):
        return dict(least)
    alive = [name for name, values in spectra.items() if values.max(initial=0.0) > 0]
    cheapest = min(alive, key=lambda name: costs[name], default=None)
    return {name: int(name == cheapest) for name in costs}


def _cost(costs: Mapping[str, int], ranks: Mapping[str, int]) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def _besides(task: Task, fixed: int, unit: str) -> str | None:
    count = len(task.adapter.extras)
    return f"{fixed:,} {unit} of them are {count} tensors that are no delta" if count else None


# --- the result ---------------------------------------------------------------------------------------------


def reduced_adapter(task: Task, modules: Mapping[str, Module]) -> Adapter:
    """The adapter with these modules.

    Raises:
        InputError: there are none.
    """
    adapter = task.adapter
    if not modules:
        raise InputError(
            f"{adapter.name}: nothing would be left, every delta is zero by this rule",
            hint="--rank keeps modules that are zero"
            if task.rule.name != "noise_floor"
            else "--energy judges otherwise",
        )
    refs = [ref for module in modules.values() for ref in module.tensors.values()]
    refs += [extra.tensor for extra in adapter.extras.values()]
    raw = dict(adapter.config.raw)
    if len(modules) < len(adapter.modules):  # names that were to select all of them would select too many
        raw["target_modules"] = None
    config = replace(adapter.config, peft_type="LORA", raw=raw)
    return replace(
        adapter, modules=dict(modules), config=config, kinds=("lora",), warnings=(), tensors=tuple(refs)
    )


def _file_bytes(task: Task, ranks: Mapping[str, int]) -> int:
    """How large the weight file is at these ranks."""
    modules = {
        i.name: of_rank(replace(i, rank=ranks[i.name]), task.dtype) for i in task.items if ranks[i.name]
    }
    return written_bytes(task, reduced_adapter(task, modules))


def written_bytes(task: Task, adapter: Adapter) -> int:
    """How large the weight file of a result is, header and all."""
    plan, _ = lay_out(adapter, task.out or Path("adapter"), format=task.to, provenance=task.provenance)
    return sum(file.size for file in plan.files)
