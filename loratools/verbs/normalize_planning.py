"""What there is to do for ``normalize``: each module that is to be made plain, in which type, and what forbids it."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.adapter import flat_shape, require_own_rank
from loratools.binding import bind
from loratools.errors import Mismatch, OverBudget, Unsupported
from loratools.formats.peft import PREFIX
from loratools.planning import RUNTIME_BYTES
from loratools.tensors.base import TensorRef
from loratools.verbs.saving import widest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratools.adapter import Adapter, Module
    from loratools.models import BaseModel
    from loratools.targets import Target

__all__ = [
    "HALVES", "Work", "approximates", "choose_type", "find_work", "keeps_factors", "mend_names", "require_memory",
    "require_plain",
]  # fmt: skip

HALVES = {"F16", "BF16"}  # types in which only a power of two can be folded without rounding
_FLAT = {"adalora", "loha", "lokr"}  # kinds whose factors may hold a convolution as a matrix


@dataclass(frozen=True, slots=True)
class Work:
    """One module to be made plain.

    Attributes:
        name: of it.
        module: as read.
        base: its weight, where what it started from has to be taken out.
        transposed: whether that is stored (in, out).
    """

    name: str
    module: Module
    base: TensorRef | None = None
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes it reads, for progress."""
        read = sum(ref.spec.nbytes for ref in self.module.tensors.values())
        return read + (0 if self.base is None else self.base.spec.nbytes)


def mend_names(adapter: Adapter) -> tuple[dict[str, str], Adapter]:
    """The adapter without what training wrappers put into its names (torch.compile, DistributedDataParallel)."""
    mended = {name: _mend(name) for name in adapter.modules}
    renamed = {name: better for name, better in mended.items() if better != name}
    if len(set(mended.values())) < len(mended):
        twice = Counter(mended.values()).most_common(1)[0][0]
        raise Mismatch(f"{adapter.name}: two modules would both be called {twice}", hint="remove one of them")
    modules = {mended[name]: module for name, module in adapter.modules.items()}
    extras = {_mend(k): replace(e, target=_mend(e.target)) for k, e in adapter.extras.items()}
    return renamed, replace(adapter, modules=modules, extras=extras)


def _mend(name: str) -> str:
    """A name without the marks of wrappers.

    >>> _mend("module.model.layers.0._orig_mod.q_proj")
    'model.layers.0.q_proj'
    >>> _mend("module.base_model.model.layers.0.q_proj")
    'layers.0.q_proj'
    """
    lead = re.match(r"(?:base_model\.model\.)*", name)
    start = "" if lead is None else lead[0]
    rest = re.sub(r"(?:^|(?<=\.))_orig_mod\.", "", name[len(start) :])
    return start + re.sub(rf"^(?:module\.(?:{re.escape(PREFIX)})*)+", "", rest.removeprefix(PREFIX))


def require_plain(adapter: Adapter, rank: int | None) -> list[str]:
    """Refuse what has no plain form; what keeps some of its own is a warning."""
    for name, module in adapter.modules.items():
        require_own_rank(adapter.name, name, module)
        if module.kind == "ia3":
            raise Unsupported(
                f"{adapter.name}: {name} is IA3, which multiplies its weight and is no sum",
                hint="merge it into the base, and extract a LoRA from the two",
            )
    doras = [name for name, module in adapter.modules.items() if module.kind == "dora"]
    if doras and rank is not None:
        raise Unsupported(
            f"{adapter.name}: {doras[0]} is DoRA, whose effect at another rank depends on its base",
            hint="merge it into the base, and extract a LoRA of that rank from the two",
        )
    warnings = []
    if doras:
        warnings.append(
            f"{len(doras)} modules are DoRA and stay DoRA: they scale their weight, which no low-rank sum does; for "
            "a plain LoRA, merge into the base and extract"
        )
    odd = [key for key, extra in adapter.extras.items() if extra.role == "unclaimed"]
    if odd:
        warnings.append(f"{len(odd)} tensors that no field explains are carried along, such as {odd[0]}")
    return warnings


def find_work(adapter: Adapter, model: BaseModel | None, warnings: list[str]) -> tuple[Adapter, list[Work]]:
    """Every module, with its weight where what it started from has to be taken out of that.

    Returns:
        The adapter with the shapes of its weights where it does not know them itself, and what there is to do.

    Raises:
        Unsupported: there is no base and one is needed, or the base keeps the weight in parts.
    """
    started = {name: str(m.options["init"]) for name, m in adapter.modules.items() if "init" in m.options}
    if started and model is None:
        name, init = next(iter(started.items()))
        raise Unsupported(
            f"{adapter.name}: {name} starts from a part of its base ({init}), which the file does not hold",
            hint="give the base: --base BASE",
        )
    flat = [name for name, module in adapter.modules.items() if module.kind in _FLAT]
    if model is None:
        if flat:
            warnings.append(
                f"{flat[0]} and its like are taken for linear layers: their file does not tell convolutions; "
                "give the base (--base) if there are any"
            )
        return adapter, [Work(name, module) for name, module in adapter.modules.items()]
    places = _places(adapter, model, warnings)
    modules = {n: _shaped(m, places.get(n, []), model) for n, m in adapter.modules.items()}
    work = []
    for name, module in modules.items():
        mine = places.get(name, [])
        if name not in started:
            work.append(Work(name, module))
            continue
        if len(mine) != 1 or not _is_whole(mine[0]):
            where = "nowhere" if not mine else "in parts"
            raise Unsupported(
                f"{adapter.name}: {name} starts from a part of its base ({started[name]}), and {model.name} has "
                f"that weight {where}",
                hint="give the base it was trained on, with its weights under the names of training",
            )
        weight = TensorRef(model.source, mine[0].weight)
        work.append(Work(name, module, weight, mine[0].transposed))
    return replace(adapter, modules=modules), work


def _places(adapter: Adapter, model: BaseModel, warnings: list[str]) -> dict[str, list[Target]]:
    """Where in the base each module lands."""
    bound = bind(adapter, model)
    if bound.unmatched:
        warnings.append(
            f"{len(bound.unmatched)} tensors have no place in {model.name}, such as {bound.unmatched[0]}"
        )
    if bound.renamed:
        warnings.append(f"{model.name} has other names ({bound.renamed}); the adapter keeps its own")
    places: dict[str, list[Target]] = {}
    for terms in bound.terms.values():
        for term in terms:
            if term.part == "weight":
                places.setdefault(term.name, []).append(term.target)
    return places


def _is_whole(target: Target) -> bool:
    return target.index is None and target.rows is None and target.cols is None


def _shaped(module: Module, places: Sequence[Target], model: BaseModel) -> Module:
    """A module whose file has a convolution's kernel flattened, with the shape that its weight has."""
    if module.kind not in _FLAT or len(places) != 1 or not _is_whole(places[0]) or places[0].transposed:
        return module
    shape = model.source.specs[places[0].weight].shape
    return replace(module, shape=shape) if flat_shape(shape) == flat_shape(module.shape) else module


def choose_type(adapter: Adapter, rank: int | None, wanted: str | None) -> tuple[str, float]:
    """The type to try, and the scaling every module is to have.

    In 32 bits and more the scaling is 1. In 16 bits only powers of two can be folded without rounding; one scaling
    that all modules share, up to such a power, stays in the alpha then.
    """
    kind = wanted or widest([adapter])
    if kind not in HALVES:
        return kind, 1.0
    scalings = Counter(m.scaling for m in adapter.modules.values() if m.scaling)
    if approximates(adapter, rank):
        return kind, 1.0
    if not scalings or not all(keeps_factors(module) for module in adapter.modules.values()):
        return wanted or "F32", 1.0
    for unit in (1.0, scalings.most_common(1)[0][0]):
        if all(abs(math.frexp(scaling / unit)[0]) == 0.5 for scaling in scalings):
            return kind, unit
    return wanted or "F32", 1.0


def approximates(adapter: Adapter, rank: int | None) -> bool:
    """Whether a rank was asked for that some delta exceeds, so that the result is another one."""
    return rank is not None and any(rank < (module.rank or 0) for module in adapter.modules.values())


def keeps_factors(module: Module) -> bool:
    """Whether its factors stay what they are, but for the scaling."""
    changed = {"init", "up_blocks", "down_blocks"} & module.options.keys()
    return module.kind in {"lora", "dora"} and not changed


def require_memory(work: Sequence[Work], allowed: int | None, jobs: int) -> None:
    """Check the budget: the result, and float64 copies of the largest modules (their weights, where needed)."""
    steps = sorted((_peak(item) for item in work), reverse=True)
    result = sum(4 * item.module.parameters for item in work)
    needed = RUNTIME_BYTES + 2 * result + sum(steps[:jobs])
    if allowed is not None and needed > allowed:
        raise OverBudget(needed, allowed, hint="fewer --jobs need less" if jobs > 1 else "allow more")


def _peak(item: Work) -> int:
    out, into = flat_shape(item.module.shape)
    weight = 0 if item.base is None else 8 * (3 * out * into + 3 * min(out, into) ** 2)
    return 8 * 4 * item.module.parameters + weight
