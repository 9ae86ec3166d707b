"""An adapter by the names of its architecture: every module under the one name of the weight, or the part, it changes.

A module of a weight that diffusers splits (qkv, gate and up, Flux's ``linear1``) becomes one module for each part: the
same ``down``, some rows of ``up``; no value is read. Combining, comparing and converting work on such adapters, so that
two files of one model match whatever their dialect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import Module, flat_shape
from loratools.architectures.base import architecture as find
from loratools.errors import Mismatch, ShapeMismatch, UnmatchedModules, Unsupported
from loratools.tensors.views import picked, reshaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture, Place
    from loratools.tensors.base import TensorRef

__all__ = [
    "BIASES",
    "HINTS",
    "Canonical",
    "candidates",
    "canonical",
    "exchanged",
    "find_architecture",
    "fits",
    "hints",
    "part_rows",
    "pick_rows",
    "places",
    "split",
    "stem",
]

# Roles whose first dimension is the output features, by kind: some rows of them are the same rows of the update.
_BY_ROW = {
    "lora": ("up",),
    "dora": ("up", "magnitude"),
    "loha": ("first_a", "second_a", "magnitude"),
    "full": ("diff",),
    "norm": ("diff",),
    "set": ("value",),
    "ia3": ("scale",),
}
BIASES = frozenset({"up_bias", "diff_bias"})
# Metadata that name the base model.
HINTS = ("ss_base_model_version", "modelspec.architecture")
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
_TO_MERGE = "merge it into a base that stores them as one, and extract a LoRA from the two"


@dataclass(frozen=True, slots=True)
class Canonical:
    """An adapter under canonical names.

    Attributes:
        adapter: its modules by component and diffusers' path.
        places: where each of them is, by that name.
        origin: the name each came from, in the file.
        unmatched: modules of the file that the architecture does not have; they keep their names.
    """

    adapter: Adapter
    places: Mapping[str, Place]
    origin: Mapping[str, str]
    unmatched: tuple[str, ...]


def find_architecture(adapter: Adapter, name: str | None = None) -> Architecture | None:
    """The architecture named, or the one an adapter's names and shapes speak of; None where they speak of none.

    Raises:
        Unsupported: no architecture has that name.
        Mismatch: the adapter's modules fit several equally well.
    """
    from loratools.architectures.detect import detect

    if name is not None:
        return find(name)
    found = detect(
        {stem(module): adapter.modules[module].shape for module in adapter.modules}, hints(adapter)
    )
    if found.architecture is None and found.candidates:
        raise Mismatch(
            f"{adapter.name} could belong to {' or '.join(found.candidates)}",
            hint="--arch says which, or --base with the model",
        )
    if found.architecture is None:
        return None
    _require_agreement(adapter, found.architecture)
    return find(found.architecture)


def _require_agreement(adapter: Adapter, found: str) -> None:
    """Refuse to choose between what shapes say and what metadata say, where the names fit both.

    Raises:
        Mismatch: both are named.
    """
    from loratools.architectures.base import called

    said = [name for hint in hints(adapter) for name in called(hint)]
    if not said or found in said:
        return
    other = find(said[0])
    if all(other.lookup(stem(name)) is not None for name in adapter.modules):
        raise Mismatch(
            f"{adapter.name}: its metadata say {other.name}, and the shapes of its modules {found}",
            hint="--arch says which",
        )


def candidates(adapter: Adapter) -> tuple[str, ...]:
    """The families an adapter's names and shapes could be of, the likeliest first."""
    from loratools.architectures.detect import detect

    found = detect(
        {stem(module): adapter.modules[module].shape for module in adapter.modules}, hints(adapter)
    )
    return found.candidates or ((found.architecture,) if found.architecture else ())


def hints(adapter: Adapter) -> list[str]:
    """What an adapter's metadata call its base model."""
    said = (adapter.metadata.get(key, "") for key in HINTS)
    return [hint for hint in said if hint]


def places(adapter: Adapter, architecture: Architecture, *, strict: bool = True) -> dict[str, Place]:
    """Where each module is that the architecture has.

    Raises:
        ShapeMismatch: a module has another shape than its weight, and ``strict`` is set.
    """
    found: dict[str, Place] = {}
    for name, module in adapter.modules.items():
        place = architecture.lookup(stem(name))
        if place is not None:
            if strict:
                _require_fit(adapter.name, name, module, place)
            found[name] = place
    return found


def canonical(adapter: Adapter, architecture: Architecture, *, strict: bool = True) -> Canonical:
    """Rename and split an adapter's modules.

    Args:
        adapter: whose modules.
        architecture: that they belong to.
        strict: whether shapes must be those of the architecture; a small model of its kind has others, in proportion.

    Raises:
        UnmatchedModules: not one of its modules is in the architecture.
        ShapeMismatch: a module does not fit its weight.
        Mismatch: two modules change the same part.
        Unsupported: a module covers several parts and is of a kind that cannot be split.
    """
    found = places(adapter, architecture, strict=strict)
    if adapter.modules and not found:
        raise UnmatchedModules(
            f"{adapter.name}: none of its {len(adapter.modules)} modules is in {architecture.title} "
            f"(for example {next(iter(adapter.modules))})",
            tuple(adapter.modules),
        )
    modules: dict[str, Module] = {}
    located: dict[str, Place] = {}
    origin: dict[str, str] = {}
    for name, module in adapter.modules.items():
        place = found.get(name)
        pieces = {name: module} if place is None else split(name, module, place)
        for full, piece in pieces.items():
            if full in modules:
                raise Mismatch(f"{adapter.name}: {origin[full]} and {name} both change {full}")
            modules[full], origin[full] = piece, name
            if place is not None:
                located[full] = architecture.canonical[full]
    unmatched = tuple(name for name in adapter.modules if name not in found)
    return Canonical(replace(adapter, modules=modules), located, origin, unmatched)


def split(name: str, module: Module, place: Place) -> dict[str, Module]:
    """A module as the modules diffusers has in its place, by canonical name.

    Raises:
        Unsupported: its kind cannot be split exactly without its base.
        ShapeMismatch: its rows are not in proportion to those of its weight.
    """
    swap = place.weight.swapped and place.native
    if len(place.parts) == 1 and not swap:
        return {place.names[0]: module}
    spans = part_rows(name, place, flat_shape(module.shape)[0])
    return {
        full: pick_rows(name, module, exchanged(span) if swap else [span])
        for full, span in zip(place.names, spans, strict=True)
    }


def part_rows(name: str, place: Place, rows: int) -> list[tuple[int, int]]:
    """Which of so many rows belong to each part of a place.

    Raises:
        ShapeMismatch: they are not in proportion to those of its weight.
    """
    start = place.parts[0].start
    edges = [(part.start - start, part.stop - start) for part in place.parts]
    if rows != place.rows and any(edge * rows % place.rows for span in edges for edge in span):
        raise ShapeMismatch(name, (rows,), (place.rows,))
    return [(first * rows // place.rows, last * rows // place.rows) for first, last in edges]


def exchanged(span: tuple[int, int]) -> list[tuple[int, int]]:
    """The two halves of some rows, the second one first."""
    first, last = span
    middle = (first + last) // 2
    return [(middle, last), (first, middle)]


def pick_rows(name: str, module: Module, rows: list[tuple[int, int]]) -> Module:
    """Some output features of a module's update, in this order, as a module of the same kind.

    Raises:
        Unsupported: its kind cannot be taken apart exactly.
    """
    if biases := BIASES & module.tensors.keys():
        tensors = {role: picked(ref, rows) if role in biases else ref for role, ref in module.tensors.items()}
        module = replace(module, tensors=tensors)
    if _is_of_input(module):
        return module  # what is done to input features is done alike for every output
    count = sum(stop - start for start, stop in rows)
    shape = (count, *module.shape[1:])
    if not module.changes_weight:
        return replace(module, shape=shape)
    roles = _row_roles(module)
    if module.kind == "lokr" and "magnitude" not in module.tensors and len(rows) == 1:
        options: dict[str, Any] = {**module.options, "rows": _within(module.options.get("rows"), rows[0])}
        return replace(module, shape=shape, options=options)
    if module.kind == "oft" and not module.options.get("constraint") and len(rows) == 1:
        return _pick_blocks(name, module, rows[0], shape)
    if not roles:
        raise Unsupported(
            f"{name} is {module.kind} over several weights that were fused, which cannot be taken apart exactly",
            hint=_TO_MERGE,
        )
    if "magnitude" in module.tensors and module.options.get("magnitude_axis", 0) == 1:
        raise Unsupported(
            f"{name} is a DoRA by input features over several weights that were fused: its norms run over all of them",
            hint=_TO_MERGE,
        )
    return replace(module, tensors=_with_rows(module.tensors, roles, rows), shape=shape)


def _with_rows(
    tensors: Mapping[str, TensorRef], roles: Iterable[str], rows: list[tuple[int, int]]
) -> dict[str, TensorRef]:
    found = dict(tensors)
    for role in roles:
        if role in found:
            ref = found[role]
            flat = (
                (ref.spec.count,) if role in {"magnitude", "scale", "rescale"} else ref.shape
            )  # may have more axes
            found[role] = picked(reshaped(ref, flat), rows)
    return found


def _row_roles(module: Module) -> tuple[str, ...]:
    if module.kind == "loha" and "first_core" in module.tensors:
        return ()
    if module.kind == "glora":
        from loratools.deltas.glora import arrangement

        order, _ = arrangement({role: module.tensors[role].shape for role in ("a1", "a2", "b1", "b2")})
        return ("b2",) if order == "old" else ("b1",)
    return _BY_ROW.get(module.kind, ())


def _is_of_input(module: Module) -> bool:
    """Whether an update changes input features alone, all outputs alike."""
    if module.kind == "ia3":
        return bool(module.options["feedforward"])
    return module.by_feature and module.rotates_input


def _pick_blocks(name: str, module: Module, rows: tuple[int, int], shape: tuple[int, ...]) -> Module:
    """Some blocks of a rotation of output features, which turn nothing but their own rows."""
    size = module.tensors["blocks"].shape[-1]
    if rows[0] % size or rows[1] % size:
        raise Unsupported(
            f"{name} rotates features of several weights that were fused, in blocks of {size} that do not end where "
            "they do",
            hint=_TO_MERGE,
        )
    tensors = _with_rows(module.tensors, ["rescale"], [rows])
    tensors["blocks"] = picked(tensors["blocks"], [(rows[0] // size, rows[1] // size)])
    return replace(module, tensors=tensors, shape=shape)


def _within(outer: tuple[int, int] | None, inner: tuple[int, int]) -> tuple[int, int]:
    shift = outer[0] if outer else 0
    return inner[0] + shift, inner[1] + shift


def _require_fit(adapter: str, name: str, module: Module, place: Place) -> None:
    """Refuse what cannot be taken apart by the rows of its weight; a name alone can be changed at any size."""
    if (len(place.parts) > 1 or place.weight.swapped) and not fits(module, place):
        raise ShapeMismatch(f"{adapter}: {name}", module.shape, place.shape)


def fits(module: Module, place: Place) -> bool:
    """Whether a module has the shape that its architecture gives its weight, as far as its kind can tell."""
    wanted, shape = place.shape, module.shape
    if module.by_feature or module.kind in {"norm", "set"} or not shape:
        return True
    known = 0 not in wanted[1:]
    return flat_shape(shape)[0] == wanted[0] and (not known or flat_shape(shape) == flat_shape(wanted))


def stem(name: str) -> str:
    """A module's name without what wrappers put before it."""
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name.replace(".base_layer", "")
