"""Modules out of keys: the tensors of each by role, in standard shapes, and what they make together."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.errors import LoratoolsError
from loratools.formats.peft import Problem
from loratools.tensors.views import reshaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from loratools.formats.suffixes import Key
    from loratools.tensors.base import TensorRef

__all__ = ["Group", "Made", "group_keys", "make"]

_WEIGHTS = (
    "diff",
    "diff_bias",
    "value",
    "scale",
    "up_bias",
    "magnitude",
)  # roles that have a dimension at least
_PEFT_MAGNITUDE = ".lora_magnitude_vector"
_WORDS = {
    "lora": "LoRA", "adalora": "AdaLoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full difference", "norm": "norm",
    "set": "replacement", "ia3": "IA3", "glora": "GLoRA", "oft": "OFT", "tlora": "T-LoRA",
}  # fmt: skip


@dataclass(slots=True)
class Group:
    """The tensors of one module.

    Attributes:
        stem: the module's name in the file; where it has several, that of the first key.
        tensors: by role, as stored.
        families: the kinds that its factors belong to.
        suffixes: of each role, as the file spells it.
        twins: tensors of a role that is there already: the key, and the key it repeats.
    """

    stem: str
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    suffixes: dict[str, str] = field(default_factory=dict)
    twins: dict[str, tuple[TensorRef, str]] = field(default_factory=dict)

    def add(self, parts: Key, ref: TensorRef) -> None:
        """Note a tensor under its role."""
        if parts.role in self.tensors:
            self.twins[ref.name] = ref, self.tensors[parts.role].name
            return
        self.tensors[parts.role], self.suffixes[parts.role] = ref, parts.suffix
        if parts.family and parts.family not in self.families:
            self.families.append(parts.family)


@dataclass(frozen=True, slots=True)
class Made:
    """What the tensors of a module make together.

    Attributes:
        kind: as :class:`~loratools.adapter.Module` has it.
        rank: of the delta as stored; None where the kind has none.
        shape: of the delta; for what multiplies a weight, what is known of it.
        tensors: by standard role, in standard shapes.
        options: what else the mathematics needs.
    """

    kind: str
    rank: int | None
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorRef]
    options: Mapping[str, Any] = field(default_factory=dict)


def group_keys(keys: Mapping[str, tuple[Key, TensorRef]], names: Mapping[str, str]) -> dict[str, Group]:
    """The groups by module name; ``names`` has it for each stem of the file."""
    groups: dict[str, Group] = {}
    for parts, ref in keys.values():
        groups.setdefault(names[parts.stem], Group(parts.stem)).add(parts, ref)
    return groups


def make(group: Group) -> Made | Problem:
    """Decide what a group's tensors are, or why they are nothing."""
    families = [f for f in group.families if f != "lora" or "adalora" not in group.families]
    if len(families) > 1:
        one, other = (next(r.name for r in group.tensors.values() if _of(group, r, f)) for f in families[:2])
        words = " and ".join(_WORDS[family] for family in families)
        return Problem("mixed-kinds", f"{one} and {other} make one module of two kinds: {words}")
    family = families[0] if families else "full" if "diff_bias" in group.tensors else ""
    if not family:
        return _unpaired(group)
    weights = (group.tensors[role] for role in _WEIGHTS if role in group.tensors)
    if (flat := next((ref for ref in weights if not ref.shape), None)) is not None:
        return Problem("factor-dimensions", f"{flat.name} is a single number, expected a tensor")
    if (empty := next((ref for ref in group.tensors.values() if 0 in ref.shape), None)) is not None:
        return Problem(
            "empty-factor", f"{empty.name} is empty {list(empty.shape)}: saved without gathering it"
        )
    made = _MAKERS[family](group)
    return made if isinstance(made, Problem) else _with_magnitude(group, made)


def _of(group: Group, ref: TensorRef, family: str) -> bool:
    from loratools.formats.suffixes import SUFFIXES

    role = next(role for role, one in group.tensors.items() if one is ref)
    known = SUFFIXES.get(group.suffixes[role])
    return family == ("lora" if known is None else known.family)


def _list(group: Group) -> str:
    """The factors there are; an alpha is named where there is nothing else."""
    factors = [ref.name for role, ref in group.tensors.items() if role != "alpha"]
    return ", ".join(factors or [ref.name for ref in group.tensors.values()])


def _unpaired(group: Group) -> Problem:
    return Problem("unpaired-factor", f"{_list(group)} without the factor it belongs to")


def _missing(group: Group, *wanted: str) -> Problem | None:
    """A complaint where a role is not there."""
    if set(wanted) <= group.tensors.keys():
        return None
    return _unpaired(group)


def _differ(what: str, *refs: TensorRef) -> Problem:
    told = " and ".join(f"{ref.name} {list(ref.shape)}" for ref in refs)
    return Problem("factors-disagree", f"{told} have different {what}")


def _flat(ref: TensorRef) -> Problem:
    return Problem(
        "factor-dimensions", f"{ref.name} has shape {list(ref.shape)}, expected 2 dimensions or more"
    )


def _lora(group: Group) -> Made | Problem:
    tensors, options = dict(group.tensors), {}
    if "embedding_down" in tensors and "embedding_up" in tensors:
        tensors["down"], tensors["up"] = tensors.pop("embedding_down"), tensors.pop("embedding_up")
        options["embedding"] = True
    if not {"down", "up"} <= tensors.keys():
        return _unpaired(group)
    if len(tensors["down"].shape) == len(tensors["up"].shape) == 1:  # of rank 1, without saying so
        tensors["down"] = reshaped(tensors["down"], (1, *tensors["down"].shape))
        tensors["up"] = reshaped(tensors["up"], (*tensors["up"].shape, 1))
    down, up = tensors["down"], tensors["up"]
    for ref in (down, up):
        if len(ref.shape) < 2:
            return _flat(ref)
    if any(count != 1 for count in up.shape[2:]):
        return Problem(
            "factors-disagree",
            f"{up.name} {list(up.shape)} has a kernel, which only the lower factor may have",
        )
    middle, kernel = tensors.get("mid"), down.shape[2:]
    if middle is None:
        if up.shape[1] != down.shape[0]:
            return _differ("ranks", down, up)
    else:
        if middle.shape[:2] != (up.shape[1], down.shape[0]):
            return _differ("ranks", down, middle, up)
        kernel = middle.shape[2:]
    shape = (up.shape[0], down.shape[1], *kernel)
    if "up_bias" in tensors and tensors["up_bias"].spec.count != up.shape[0]:
        return Problem("factors-disagree", f"{tensors['up_bias'].name} should have {up.shape[0]} values")
    return Made("adalora" if "singular" in tensors else "lora", down.shape[0], shape, tensors, options)


def _loha(group: Group) -> Made | Problem:
    wanted = ("first_a", "first_b", "second_a", "second_b")
    if missing := _missing(group, *wanted):
        return missing
    shapes: list[tuple[int, ...]] = []
    if len(cores := group.tensors.keys() & {"first_core", "second_core"}) == 1:
        return Problem("unpaired-factor", f"{group.tensors[cores.pop()].name} without the other core")
    for which in ("first", "second"):
        a, b = group.tensors[f"{which}_a"], group.tensors[f"{which}_b"]
        core = group.tensors.get(f"{which}_core")
        if any(len(ref.shape) != 2 for ref in (a, b)):
            return Problem(
                "factors-disagree",
                f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} should have 2 dimensions",
            )
        if core is None:
            if a.shape[1] != b.shape[0]:
                return _differ("ranks", a, b)
            shapes.append((a.shape[0], b.shape[1]))
        else:
            if core.shape[:2] != (a.shape[0], b.shape[0]):
                return _differ("ranks", core, a, b)
            shapes.append((a.shape[1], b.shape[1], *core.shape[2:]))
    if shapes[0] != shapes[1]:
        return _differ("shapes", group.tensors["first_a"], group.tensors["second_a"])
    return Made("loha", group.tensors["first_b"].shape[0], shapes[0], group.tensors)


def _lokr(group: Group) -> Made | Problem:
    sides = []
    for which in ("left", "right"):
        whole = group.tensors.get(which)
        if whole is not None:
            if f"{which}_a" in group.tensors:
                return Problem("factors-disagree", f"{whole.name} and its own factors: one side twice")
            sides.append(whole.shape)
            continue
        if missing := _missing(group, f"{which}_a", f"{which}_b"):
            return missing
        a, b = group.tensors[f"{which}_a"], group.tensors[f"{which}_b"]
        core = group.tensors.get(f"{which}_core")
        if len(a.shape) < 2 or len(b.shape) < 2:
            return Problem(
                "factors-disagree",
                f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} should have 2 dimensions",
            )
        if core is None:
            if a.shape[1] != b.shape[0]:
                return _differ("ranks", a, b)
            sides.append((a.shape[0], *b.shape[1:]))
        else:
            if core.shape[:2] != (a.shape[0], b.shape[0]):
                return _differ("ranks", core, a, b)
            sides.append((a.shape[1], b.shape[1], *core.shape[2:]))
    left, right = sides
    if len(left) < 2 or len(right) < 2:
        return Problem("factors-disagree", f"{_list(group)}: a side has fewer than 2 dimensions")
    rank = next(
        (group.tensors[role].shape[0] for role in ("right_b", "left_b") if role in group.tensors), None
    )
    return Made("lokr", rank, (left[0] * right[0], left[1] * right[1], *right[2:]), group.tensors)


def _full(group: Group) -> Made | Problem:
    stands = group.tensors.get("diff", group.tensors.get("diff_bias"))
    if stands is None:
        return _unpaired(group)
    return Made("full", None, stands.shape, group.tensors)


def _norm(group: Group) -> Made | Problem:
    made = _full(group)
    return made if isinstance(made, Problem) else Made("norm", None, made.shape, made.tensors)


def _set(group: Group) -> Made | Problem:
    return Made("set", None, group.tensors["value"].shape, group.tensors)


def _ia3(group: Group) -> Made | Problem:
    if missing := _missing(group, "scale", "on_input"):
        return missing
    if (flag := group.tensors["on_input"]).spec.count != 1:
        return Problem("factor-dimensions", f"{flag.name} has shape {list(flag.shape)}, expected one number")
    return Made("ia3", None, group.tensors["scale"].shape, group.tensors, {"relative": True})


def _glora(group: Group) -> Made | Problem:
    from loratools.deltas.glora import arrangement

    roles = ("a1", "a2", "b1", "b2")
    if missing := _missing(group, *roles):
        return missing
    if flat := next(
        (ref for role, ref in group.tensors.items() if role in (*roles, "bm") and len(ref.shape) < 2), None
    ):
        return _flat(flat)
    try:
        layout, rank = arrangement({role: group.tensors[role].shape for role in roles})
    except LoratoolsError:
        return _differ("ranks", *(group.tensors[role] for role in roles))
    up, down = ("b1", "b2") if layout == "new" else ("b2", "b1")
    core = group.tensors.get("bm")
    kernel = group.tensors[down].shape[2:] if core is None else core.shape[2:]
    shape = (group.tensors[up].shape[0], group.tensors[down].shape[1], *kernel)
    return Made("glora", rank, shape, group.tensors)


def _oft(group: Group) -> Made | Problem:
    if "scaled" in group.tensors:
        return Problem(
            "factors-disagree",
            f"{group.tensors['scaled'].name}: a scaled OFT of OneTrainer, whose divisor this build does not know",
        )
    if "packed" in group.tensors:
        if len(group.tensors["packed"].shape) < 2:
            return _flat(group.tensors["packed"])
        count, packed = group.tensors["packed"].shape[0], prod(group.tensors["packed"].shape[1:])
        size = (1 + int((1 + 8 * packed) ** 0.5)) // 2
        if size * (size - 1) // 2 != packed:
            return Problem(
                "factors-disagree", f"{group.tensors['packed'].name}: {packed} values are no upper triangle"
            )
        return Made("oftv2", None, (count * size,), group.tensors)
    if "blocks" not in group.tensors:
        return Problem("unpaired-factor", f"{_list(group)} without oft_blocks")
    blocks = group.tensors["blocks"]
    if len(blocks.shape) not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        return Problem("factors-disagree", f"{blocks.name} {list(blocks.shape)} should be square blocks")
    kind = "oft" if len(blocks.shape) == 3 else "boft"
    return Made(kind, None, (blocks.shape[-3] * blocks.shape[-1],), group.tensors)


def _tlora(group: Group) -> Made | Problem:
    return Made("tlora", None, (), group.tensors)


_MAKERS: dict[str, Callable[[Group], Made | Problem]] = {
    "lora": _lora,
    "adalora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "norm": _norm,
    "set": _set,
    "ia3": _ia3,
    "glora": _glora,
    "oft": _oft,
    "tlora": _tlora,
}


def _with_magnitude(group: Group, made: Made) -> Made | Problem:
    """The module with its kind and axis, where weights are decomposed."""
    ref = made.tensors.get("magnitude")
    if ref is None:
        return made
    if made.kind not in {"lora", "loha", "lokr"}:
        return Problem(
            "mixed-kinds", f"{ref.name} is a magnitude beside {_WORDS.get(made.kind, made.kind)} tensors"
        )
    kind = "dora" if made.kind == "lora" else made.kind
    wanted = list(_axes(ref.shape, peft=group.suffixes["magnitude"].startswith(_PEFT_MAGNITUDE)))
    fits = [axis for axis in wanted if _fits(ref.spec.count, axis, made.shape)]
    if not fits:
        out, into = made.shape[:2]
        text = f"{ref.name} {list(ref.shape)} should have {out} values by output or {into} by input features"
        return Problem("factors-disagree", text)
    options = {**made.options, "magnitude_axis": 1} if fits[0] == 1 else made.options
    return Made(kind, made.rank, made.shape, made.tensors, options)


def _axes(shape: tuple[int, ...], *, peft: bool) -> Iterator[int]:
    """The axes a magnitude may run along: the one that is not 1. PEFT's runs along the outputs, whatever its shape."""
    long = [axis for axis, count in enumerate(shape) if count != 1]
    if peft or len(shape) < 2 or long in ([], [0]):
        yield 0
    if not peft and len(shape) > 1 and long in ([], [1]):
        yield 1


def _fits(count: int, axis: int, shape: tuple[int, ...]) -> bool:
    if axis == 0:
        return count == shape[0]
    return shape[1] % count == 0 and (count > 1 or shape[1] == 1)  # a kernel may lie flattened in the inputs
