"""Where the modules of a known architecture land in a base, whether it fuses weights as the original code does or not.

A base's tensor names resolve through the same lookup as an adapter's modules, so that all that is left is which rows of
which tensor are which rows of a module. Those are counted in the base's own shapes, never in the architecture's: a
small model of a family has its names and proportions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from loratools.adapter import flat_shape, require_shape
from loratools.architectures.base import architecture as named
from loratools.architectures.base import architectures
from loratools.architectures.detect import detect
from loratools.canonical import BIASES, candidates, exchanged, part_rows, pick_rows, stem
from loratools.deltas.base import Span
from loratools.errors import Mismatch, ShapeMismatch, Unsupported
from loratools.targets import Target, Term

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.adapter import Adapter, Module
    from loratools.architectures.base import Architecture, Place
    from loratools.models import BaseModel

__all__ = ["Home", "Layout", "family", "find_layout", "land"]

_IN_BLOCK = re.compile(r"\.\d+\.")
# Parts of a checkpoint that no family speaks of: the autoencoder, averages kept for training.
_NOT_ADAPTED = ("first_stage_model.", "model_ema.", "vae.")


@dataclass(frozen=True, slots=True)
class Home:
    """A tensor of the base, the bias beside it if there is one, and what it holds."""

    weight: str
    bias: str | None
    place: Place

    @property
    def transposed(self) -> bool:
        """Whether it is stored (in, out)."""
        return self.place.native and self.place.weight.transposed


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of a module's update, and the rows of a tensor where they land."""

    home: Home
    delta: tuple[int, int]
    rows: tuple[int, int]

    def continues(self, before: _Run) -> bool:
        """Whether it goes on where another one ends, on both sides."""
        same = self.home is before.home
        return same and self.delta[0] == before.delta[1] and self.rows[0] == before.rows[1]


class Layout:
    """A base's tensors by the canonical names of the modules they hold.

    Args:
        base: whose names.
        architecture: that reads them.
    """

    def __init__(self, base: BaseModel, architecture: Architecture) -> None:
        self.base = base
        self.architecture = architecture
        self.specs = base.source.specs
        self.twice: dict[str, str] = {}  # another tensor that holds the same module, by canonical name

    @cached_property
    def homes(self) -> dict[str, Home]:
        """By canonical name."""
        prefixes = ("", *(f"{component.name}." for component in self.architecture.components))
        for prefix in prefixes:  # a component's own folder lacks the component's name
            if found := self._homes(prefix):
                return found
        return {}

    def _homes(self, prefix: str) -> dict[str, Home]:
        found: dict[str, Home] = {}
        for tensor in self.specs:
            home = self._home(tensor, prefix + tensor.replace("/", ".", 1))
            if home is not None:
                for name in home.place.names:
                    if found.setdefault(name, home) is not home:
                        self.twice[name] = tensor
        return found

    def _home(self, tensor: str, name: str) -> Home | None:
        owner, _, last = name.rpartition(".")
        if last == "weight":
            place = self.architecture.lookup(owner)
        elif last == "bias" or last.endswith("_bias"):
            return None
        else:  # a parameter of another name, or one that is no module's
            place = self.architecture.lookup(name)
        if place is None or (place.native and not place.whole):
            return None
        named = "weight" if last == "weight" else last
        if place.native and (place.weight.tensor or last) != named:
            return None
        bias = tensor.removesuffix("weight") + "bias" if tensor.endswith("weight") else ""
        return Home(tensor, bias if bias in self.specs else None, place)

    @cached_property
    def family(self) -> str | None:
        """The architecture that the base itself speaks of."""
        return family(self.base)

    def tensor(self, name: str) -> str | None:
        """The tensor that is exactly what another name calls a module's weight or bias; None where there is none."""
        owner, _, last = name.rpartition(".")
        place = self.architecture.lookup(stem(owner))
        home = None if place is None else self.homes.get(place.names[0])
        if (
            place is None
            or home is None
            or not place.same(home.place)
            or place.weight.swapped
            or home.transposed
        ):
            return None
        return home.weight if last == "weight" else home.bias

    def fits(self, modules: Mapping[str, Module]) -> int:
        """How many of some modules, by the names their file has, land here with the shapes they have."""
        count = 0
        for name, module in modules.items():
            place = self.architecture.lookup(stem(name))
            if place is not None:
                try:
                    count += bool(land(name, module, place, self))
                except (Mismatch, Unsupported):
                    continue
        return count


def land(name: str, module: Module, place: Place, layout: Layout) -> list[Term]:
    """The terms that a module at a place adds to a base; none where the base has no such weight.

    Raises:
        ShapeMismatch: it does not fit.
        Mismatch: the base has some of its weights only, or no bias for what it adds to one.
        Unsupported: the base keeps apart what the module changes as one, and its kind cannot be split.
    """
    homes = [layout.homes.get(one) for one in place.names]
    found = [home for home in homes if home is not None]
    if not found:
        return []
    if len(found) < len(homes):
        missing = place.names[homes.index(None)]
        raise Mismatch(f"{name} changes several weights at once, and {layout.base.name} has no {missing}")
    if second := next((layout.twice[one] for one in place.names if one in layout.twice), None):
        raise Mismatch(
            f"{layout.base.name} has {found[0].weight} and {second}, which are one in {layout.architecture.title}",
            hint="take the one that is not used out of the checkpoint",
        )
    _require_unwidened(name, module, found[0], layout)
    if module.options.get("embedding"):
        require_shape(name, module.shape[::-1], layout.specs[found[0].weight].shape)
        return [Term(name, module, Target(found[0].weight, transposed=True))]
    runs = list(_joined(_runs(name, module, place, found, layout)))
    terms: list[Term] = []
    if len(runs) == 1 or module.is_delta:
        for run in runs:
            terms += _terms(name, module, run, layout, apart=len(runs) > 1)
        return terms
    for home in dict.fromkeys(run.home.weight for run in runs):
        mine = sorted((run for run in runs if run.home.weight == home), key=lambda run: run.rows)
        first, last = mine[0].rows[0], mine[-1].rows[1]
        piece = pick_rows(name, module, [run.delta for run in mine])
        terms += _terms(name, piece, _Run(mine[0].home, (0, last - first), (first, last)), layout)
    return terms


def _require_unwidened(name: str, module: Module, home: Home, layout: Layout) -> None:
    """Refuse an adapter that widens the input of the weight it is for, unless the base has been widened already.

    Raises:
        Unsupported: with both widths.
    """
    shape = layout.specs[home.weight].shape
    native = home.place.weight.native
    entry = 0 in home.place.weight.shape[1:] and not _IN_BLOCK.search(native.removeprefix("input_blocks.0."))
    if (
        (entry or "reshape" in module.tensors)
        and not home.transposed
        and flat_shape(module.shape)[1] > flat_shape(shape)[1]
    ):
        raise Unsupported(
            f"{name} widens the input of {home.weight} from {shape[1]} to {module.shape[1]} channels, as adapters for "
            "control images do; the model itself would have to be changed",
            hint="merge it into the base that has those inputs, or load it beside the model",
        )


def _runs(name: str, module: Module, place: Place, homes: list[Home], layout: Layout) -> Iterator[_Run]:
    """The rows of each part, in the module's order; halves apart where the base has them exchanged."""
    wheres = [_where(part, home, layout) for part, home in zip(place.names, homes, strict=True)]
    _require_rows(name, module, sum(stop - start for start, stop in wheres), homes, layout)
    position = 0
    for home, (start, stop) in zip(homes, wheres, strict=True):
        span = (position, position + stop - start)
        position = span[1]
        if place.weight.swapped and place.native != home.place.native:
            middle = (start + stop) // 2
            for delta, rows in zip(exchanged(span), ((start, middle), (middle, stop)), strict=True):
                yield _Run(home, delta, rows)
        else:
            yield _Run(home, span, (start, stop))


def _where(part: str, home: Home, layout: Layout) -> tuple[int, int]:
    """Which output features of a tensor are those of a part, by its canonical name."""
    shape = layout.specs[home.weight].shape
    height = shape[1] if home.transposed else shape[0]
    return part_rows(home.weight, home.place, height)[home.place.names.index(part)]


def _require_rows(name: str, module: Module, height: int, homes: list[Home], layout: Layout) -> None:
    """Refuse a module of another shape than the weights it changes, as far as its file tells.

    Raises:
        ShapeMismatch: with the shape of the weights together.
    """
    stored = layout.specs[homes[0].weight].shape
    wanted = (height, stored[0]) if homes[0].transposed else (height, *stored[1:])
    if not module.changes_weight:  # a bias alone
        fits = all(module.tensors[role].spec.count == height for role in BIASES & module.tensors.keys())
    elif module.by_feature:
        fits = module.fits_features(wanted)
    else:
        fits = flat_shape(module.shape) == flat_shape(wanted)
    if not fits:
        raise ShapeMismatch(name, module.shape, wanted)


def _joined(runs: Iterator[_Run]) -> Iterator[_Run]:
    """Runs that go on where the one before ends as one."""
    before: _Run | None = None
    for run in runs:
        if before is not None and run.continues(before):
            before = _Run(before.home, (before.delta[0], run.delta[1]), (before.rows[0], run.rows[1]))
            continue
        if before is not None:
            yield before
        before = run
    if before is not None:
        yield before


def _terms(name: str, module: Module, run: _Run, layout: Layout, *, apart: bool = False) -> Iterator[Term]:
    """The updates of a weight and of its bias, over one run of rows; ``apart`` where the module has other rows too."""
    shape = layout.specs[run.home.weight].shape
    height = shape[1] if run.home.transposed else shape[0]
    rows = None if run.rows == (0, height) else Span(*run.rows)
    delta_rows = Span(*run.delta) if apart else None
    if module.changes_weight:
        target = Target(run.home.weight, rows=rows, transposed=run.home.transposed, delta_rows=delta_rows)
        if run.home.transposed and rows is not None:
            target = replace(target, rows=None, cols=rows)
        yield Term(name, module, target)
    if not module.changes_bias or (module.kind == "ia3" and run.home.bias is None):
        return
    if run.home.bias is None:
        raise Mismatch(
            f"{name} adds to a bias, and {run.home.weight} has none in the base",
            hint="a merged checkpoint could not hold it; keep the adapter unmerged",
        )
    yield Term(name, module, Target(run.home.bias, rows=rows, delta_rows=delta_rows), "bias")


def find_layout(adapter: Adapter, base: BaseModel, architecture: Architecture | None = None) -> Layout | None:
    """A base in the terms of the architecture that it and an adapter share; None where nothing speaks of one.

    Where the adapter fits several families as well, or none because its model is a small one, the base chooses.
    """
    if architecture is not None:
        return Layout(base, architecture)
    likely = candidates(adapter)
    layouts = [Layout(base, named(name)) for name in likely or architectures()]
    if len(likely) == 1:
        return layouts[0] if layouts[0].homes or family(base) is not None else None
    fits = [layout.fits(adapter.modules) for layout in layouts]
    best = max(fits, default=0)
    if not best:
        return layouts[0] if likely and family(base) is not None else None
    tied = [layout for layout, count in zip(layouts, fits, strict=True) if count == best]
    names = {layout.architecture.name for layout in tied}
    first = (one for one in tied if names <= {one.architecture.name, *one.architecture.instead_of})
    return next(first, tied[0])


def family(base: BaseModel) -> str | None:
    """The architecture a base's own names and shapes speak of; None where they speak of none, or of several."""
    shapes = {
        name.removesuffix(".weight").replace("/", ".", 1): spec.shape
        for name, spec in base.source.specs.items()
        if name.endswith(".weight") and not name.startswith(_NOT_ADAPTED)
    }
    return detect(shapes).architecture
