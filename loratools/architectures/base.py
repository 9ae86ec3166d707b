"""An architecture: every weight once, under its native name, with the modules that diffusers makes of it.

The data are TOML files, one a family::

    name = "flux1"
    title = "FLUX.1"
    hints = ["flux", "flux1dev"]            # as metadata names it; compared without case and punctuation
    instead_of = ["chroma"]                 # chosen before these where both fit, since the names are the same

    [[component]]
    name = "transformer"                    # its folder in a pipeline, and its prefix in diffusers' keys
    kohya = ["lora_unet", "lora_transformer"]   # prefixes of flattened keys; the first is written
    kohya_layout = "native"                 # whose names are flattened when kohya keys are written: native or diffusers
    native = ["diffusion_model", "model.diffusion_model", ""]    # prefixes of native names; the first is written
    comfy = "diffusion_model"               # prefix of ComfyUI's keys; the first native one unless given
    comfy_layout = "native"                 # whose names follow it
    list = "flux"                           # take the weights of data/lists/flux.toml, with these numbers in its braces
    sizes = { h = 3072, double = 19, single = 38 }
    behind = ["", "model.language_model"]   # put the list's native names, and diffusers' names, behind these

    [[component.weight]]
    native = "double_blocks.{i}.img_attn.qkv"
    range = { i = "double" }                # a count, or a list of values; several give all combinations
    shape = ["3*h", "h"]
    parts = [["transformer_blocks.{i}.attn.to_q", "h"], ["transformer_blocks.{i}.attn.to_k", "h"], ...]
    aliases = ["double_blocks.{i}.processor.qkv_lora1"]

``diffusers = "..."`` stands for a single part; without either, diffusers has the native name. Numbers may be sums of
products, ``3*i+j+1``, of literals, sizes and the ranges' names; so may braces. ``swapped = true`` says that diffusers
stores the halves of the rows exchanged. ``tensor = "in_proj_weight"`` names what is not ``weight``; ``""`` is a
parameter that is not a module's. An alias table ``{name = ..., parts = [0, 3]}`` limits an alias to some parts; ``old``
are former names among diffusers' own. A list may hold blocks, ``[[block.resnet]]``, whose weights an entry
``block = "resnet"`` repeats behind its own native and diffusers names, with its own ``sizes``.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "Architecture",
    "Component",
    "Part",
    "Place",
    "Weight",
    "architecture",
    "architectures",
    "called",
    "flat",
    "plain",
]

_DATA = resources.files("loratools.architectures") / "data"
_BRACES = re.compile(r"\{([^{}]+)\}")
_ADAPTER = re.compile(
    r"/(lora|lycoris|lokr|loha|locon)$", re.IGNORECASE
)  # modelspec adds it to a model's name


@dataclass(frozen=True, slots=True)
class Part:
    """A module of diffusers, and the rows of the native weight that are its own."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One weight of the original checkpoint.

    Attributes:
        component: of the pipeline it belongs to.
        native: its module's name in the original code, without a prefix.
        shape: (out, in), (out, in, kernel...), (tokens, width) or (width,); ``in`` is 0 where the family
            has several sizes.
        parts: the modules it is in diffusers, in the order of its rows.
        swapped: diffusers stores the two halves of its rows exchanged.
        tensor: its last name: ``weight``, ``scale`` or ``in_proj_weight``; empty for a parameter that is no
            module's.
        aliases: other names of its module, with the parts each covers.
        old: other names of a part among diffusers' own, with its index.
        transposed: the original checkpoint stores it as (in, out).
    """

    component: str
    native: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    swapped: bool = False
    tensor: str = "weight"
    aliases: tuple[tuple[str, int, int], ...] = ()
    old: tuple[tuple[str, int], ...] = ()
    transposed: bool = False

    @property
    def key(self) -> str:
        """Its tensor's name in the original checkpoint, without a prefix."""
        return f"{self.native}.{self.tensor}" if self.tensor else self.native


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name leads: to parts ``first`` to ``last`` (not included) of a weight."""

    weight: Weight
    first: int
    last: int
    native: bool = True  # named as the original code has it, so that its rows are in that order

    @property
    def whole(self) -> bool:
        """Whether it is all of the weight."""
        return (self.first, self.last) == (0, len(self.weight.parts))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The modules of diffusers it covers."""
        return self.weight.parts[self.first : self.last]

    @property
    def names(self) -> tuple[str, ...]:
        """Their canonical names."""
        return tuple(f"{self.weight.component}.{part.name}" for part in self.parts)

    @property
    def rows(self) -> int:
        """How many rows they have together."""
        return self.parts[-1].stop - self.parts[0].start

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a delta that covers just these parts."""
        return (self.rows, *self.weight.shape[1:])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a delta of this shape belongs here; an empty shape is not known, and 1x1 kernels count as matrices.

        >>> architecture("flux1").lookup("double_blocks.0.img_attn.qkv").fits((9216, 3072, 1, 1))
        True
        """
        wanted = self.shape
        if not shape:
            return True
        if shape[0] != wanted[0]:
            return False
        return 0 in wanted[1:] or math.prod(shape[1:]) == math.prod(wanted[1:])

    def same(self, other: Place) -> bool:
        """Whether both are the same parts of the same weight."""
        return (self.weight, self.first, self.last) == (other.weight, other.first, other.last)


@dataclass(frozen=True, slots=True)
class Component:
    """A model of the pipeline: the denoiser, or a text encoder.

    Attributes:
        name: its folder in a pipeline, and its prefix in diffusers' keys.
        kohya: prefixes of flattened keys; the first is written.
        kohya_layout: whose names are flattened when kohya keys are written, "native" or "diffusers".
        native: prefixes of native names, in adapters and checkpoints; empty for none.
        comfy: prefix of ComfyUI's keys; empty where ComfyUI has none.
        comfy_layout: whose names follow it, "native" or "diffusers".
        weights: all of them.
    """

    name: str
    kohya: tuple[str, ...]
    kohya_layout: str
    native: tuple[str, ...]
    weights: tuple[Weight, ...]
    comfy: str = ""
    comfy_layout: str = "native"


@dataclass(frozen=True)
class Architecture:
    """A family of models whose modules are known by name and shape."""

    name: str
    title: str
    hints: tuple[str, ...]
    components: tuple[Component, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)  # modelspec's name for it, and others'
    instead_of: tuple[str, ...] = ()

    def lookup(self, stem: str) -> Place | None:
        """The place a module's name leads to, in any spelling; None where it leads nowhere, or to two places.

        The full name of a checkpoint's tensor is found too where the tensor is not called ``weight``.
        """
        found: Place | None = None
        for place in self._readings(stem):
            if found is None:
                found = place
            elif not found.same(place):
                return None
        return found

    def _readings(self, stem: str) -> Iterator[Place]:
        """Each place a name could mean: one for every prefix that can be taken from it."""
        for component, index in zip(self.components, self._indices, strict=True):
            for prefix in component.kohya:
                if stem.startswith(prefix) and stem[len(prefix) :][:1] in {"_", "."}:
                    yield from index.flattened(flat(stem[len(prefix) :]).lstrip("_"))
            for prefix in component.native:
                if not prefix or stem.startswith(f"{prefix}."):
                    yield from index.native_first(stem[len(prefix) + 1 :] if prefix else stem)
            if stem.startswith(f"{component.name}."):
                yield from index.diffusers_first(stem[len(component.name) + 1 :])

    @cached_property
    def _indices(self) -> tuple[_Index, ...]:
        return tuple(_Index(component.weights) for component in self.components)

    @cached_property
    def canonical(self) -> dict[str, Place]:
        """The place of each module, by its canonical name: component and diffusers' path."""
        return {
            f"{component.name}.{part.name}": Place(weight, index, index + 1, native=False)
            for component in self.components
            for weight in component.weights
            for index, part in enumerate(weight.parts)
        }

    def component(self, name: str) -> Component:
        """By its name."""
        return next(component for component in self.components if component.name == name)


class _Index:
    """A component's weights by name: the original code's names, and diffusers'."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.native: dict[str, Place] = {}
        self.diffusers: dict[str, Place] = {}
        for weight in weights:
            self._add_native(weight)
            self._add_diffusers(weight)

    def _add_native(self, weight: Weight) -> None:
        count = len(weight.parts)
        whole = Place(weight, 0, count)
        self.native[weight.native] = whole
        if weight.tensor not in {"weight", ""}:
            self.native[weight.key] = whole
        if count > 1:  # a list of the parts behind the fused name, as OneTrainer has it: qkv.0, qkv.1, qkv.2
            for i in range(count):
                self.native[f"{weight.native}.{i}"] = Place(weight, i, i + 1)
        for alias, first, last in weight.aliases:
            self.native[alias] = Place(weight, first, last)

    def _add_diffusers(self, weight: Weight) -> None:
        for i, part in enumerate(weight.parts):
            place = Place(weight, i, i + 1, native=False)
            self.diffusers[part.name] = place
            if part.name.startswith("text_model."):  # transformers 5 leaves it out
                self.diffusers[part.name.removeprefix("text_model.")] = place
        for old, i in weight.old:
            self.diffusers[old] = Place(weight, i, i + 1, native=False)

    @cached_property
    def _flat(self) -> tuple[dict[str, Place], dict[str, Place]]:
        native, diffusers = (
            {flat(name): place for name, place in one.items()} for one in (self.native, self.diffusers)
        )
        return native, diffusers

    def flattened(self, name: str) -> Iterator[Place]:
        """What either calls so once its dots are underscores."""
        yield from (place for table in self._flat if (place := table.get(name)) is not None)

    def native_first(self, name: str) -> Iterator[Place]:
        """What the original code calls so, or else diffusers."""
        place = self.native.get(name) or self.diffusers.get(name)
        if place is not None:
            yield place

    def diffusers_first(self, name: str) -> Iterator[Place]:
        """What diffusers calls so, or else the original code."""
        place = self.diffusers.get(name) or self.native.get(name)
        if place is not None:
            yield place


def flat(name: str) -> str:
    """A dotted name as kohya's keys have it.

    >>> flat("down_blocks.0.to_out.0")
    'down_blocks_0_to_out_0'
    """
    return name.replace(".", "_")


@cache
def architectures() -> tuple[str, ...]:
    """The names of the families this build knows."""
    return tuple(
        sorted(entry.name.removesuffix(".toml") for entry in _DATA.iterdir() if entry.name.endswith(".toml"))
    )


@cache
def architecture(name: str) -> Architecture:
    """A family by its name, or by what metadata call it.

    Raises:
        Unsupported: it is not known, or several are called so; lists those that are.
    """
    found = called(name)
    if len(found) == 1:
        return _load(found[0])
    if found:
        raise Unsupported(f"{name!r} is the name of several architectures", hint=f"say {' or '.join(found)}")
    raise Unsupported(f"no architecture {name!r} is known", hint=f"known: {', '.join(architectures())}")


def called(text: str) -> tuple[str, ...]:
    """The families of this name, or that metadata call so; costs their heads only.

    >>> called("stable-diffusion-xl-v1-base/lora")
    ('sdxl',)
    """
    wanted = plain(_ADAPTER.sub("", text.strip()))
    known = architectures()
    named = tuple(one for one in known if plain(one) == wanted)
    return named or tuple(one for one in known if wanted in map(plain, _document(one).get("hints", ())))


def plain(text: str) -> str:
    """A name without case and punctuation, as metadata are compared.

    >>> plain("Flux.1-dev/lora")
    'flux1devlora'
    """
    return re.sub(r"[^a-z0-9]", "", text.lower())


@cache
def _document(name: str) -> dict[str, Any]:
    return tomllib.loads((_DATA / f"{name}.toml").read_text("utf-8"))


@cache
def _list(name: str) -> dict[str, Any]:
    return tomllib.loads((_DATA / "lists" / f"{name}.toml").read_text("utf-8"))


@cache
def _load(name: str) -> Architecture:
    raw = _document(name)
    return Architecture(
        name=raw["name"],
        title=raw["title"],
        hints=tuple(raw.get("hints", ())),
        components=tuple(_component(one) for one in raw["component"]),
        metadata=raw.get("metadata", {}),
        instead_of=tuple(raw.get("instead_of", ())),
    )


def _component(raw: Mapping[str, Any]) -> Component:
    listed = _list(raw["list"]) if "list" in raw else {}
    blocks = listed.get("block", {})
    sizes = raw.get("sizes", {})
    native_behind, diffusers_behind = raw.get("behind", ("", ""))
    weights = [
        *_expanded(raw["name"], listed.get("weight", ()), blocks, sizes, (native_behind, diffusers_behind)),
        *_expanded(raw["name"], raw.get("weight", ()), blocks, sizes),
    ]
    native = tuple(raw.get("native", ()))
    return Component(
        name=raw["name"],
        kohya=tuple(raw.get("kohya", ())),
        kohya_layout=raw.get("kohya_layout", "native"),
        native=native,
        weights=tuple(weights),
        comfy=raw.get("comfy", native[0] if native else ""),
        comfy_layout=raw.get("comfy_layout", "native"),
    )


def _expanded(
    component: str,
    entries: Iterable[Mapping[str, Any]],
    blocks: Mapping[str, Any],
    sizes: Mapping[str, int],
    behind: tuple[str, str] = ("", ""),
) -> Iterator[Weight]:
    """The weights of some entries; ``behind`` are the native and diffusers names of the block they are in."""
    for entry in entries:
        for names in _combinations(entry, sizes):
            native, diffusers = _prefixed(entry, names, behind)
            if "block" in entry:
                yield from _expanded(component, blocks[entry["block"]], blocks, names, (native, diffusers))
            else:
                yield _weight(component, entry, names, behind, (native, diffusers))


def _combinations(entry: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    given = {**sizes, **{key: _number(value, sizes) for key, value in entry.get("sizes", {}).items()}}
    ranges = {
        key: value if isinstance(value, list) else range(_number(value, given))
        for key, value in entry.get("range", {}).items()
    }
    for values in itertools.product(*ranges.values()):
        yield {**given, **dict(zip(ranges, values, strict=True))}


def _prefixed(entry: Mapping[str, Any], names: Mapping[str, int], behind: tuple[str, str]) -> tuple[str, str]:
    native = _filled(entry.get("native", ""), names)
    diffusers = _filled(entry["diffusers"], names) if "diffusers" in entry else native
    return _joined(behind[0], native), _joined(behind[1], diffusers)


def _weight(
    component: str,
    entry: Mapping[str, Any],
    names: Mapping[str, int],
    behind: tuple[str, str],
    own: tuple[str, str],
) -> Weight:
    shape = tuple(_number(size, names) for size in entry["shape"])
    parts = tuple(_parts(entry, names, behind[1], own[1], shape[0]))
    return Weight(
        component=component,
        native=own[0],
        shape=shape,
        parts=parts,
        swapped=entry.get("swapped", False),
        tensor=entry.get("tensor", "weight"),
        aliases=tuple(_alias(one, names, behind[0], len(parts)) for one in entry.get("aliases", ())),
        old=tuple((_joined(behind[1], _filled(name, names)), i) for name, i in entry.get("old", ())),
        transposed=entry.get("transposed", False),
    )


def _parts(
    entry: Mapping[str, Any], names: Mapping[str, int], behind: str, own: str, rows: int
) -> Iterator[Part]:
    if "parts" not in entry:
        yield Part(own, 0, rows)
        return
    start = 0
    for name, count in entry["parts"]:
        stop = start + _number(count, names)
        yield Part(_joined(behind, _filled(name, names)), start, stop)
        start = stop


def _alias(
    alias: str | Mapping[str, Any], names: Mapping[str, int], behind: str, count: int
) -> tuple[str, int, int]:
    if isinstance(alias, str):
        return _joined(behind, _filled(alias, names)), 0, count
    first, last = alias["parts"]
    return _joined(behind, _filled(alias["name"], names)), first, last


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _filled(template: str, names: Mapping[str, int]) -> str:
    """A template with its braces filled.

    >>> _filled("input_blocks.{3*i+j+1}.0", {"i": 2, "j": 1})
    'input_blocks.8.0'
    """
    pieces = _pieces(template)
    if len(pieces) == 1:
        return template
    return "".join([str(_number(piece, names)) if i % 2 else piece for i, piece in enumerate(pieces)])


@cache
def _pieces(template: str) -> tuple[str, ...]:
    return tuple(_BRACES.split(template))


def _number(value: int | str, names: Mapping[str, int]) -> int:
    """A number of the data: itself, a name's, or a sum of products of those."""
    if isinstance(value, int):
        return value
    found = names.get(value)
    if found is not None:
        return found
    total = 0
    for factors in _terms(value):
        product = 1
        for factor in factors:
            product *= factor if isinstance(factor, int) else names[factor]
        total += product
    return total


@cache
def _terms(text: str) -> tuple[tuple[int | str, ...], ...]:
    return tuple(
        tuple(int(factor) if factor.isdigit() else factor for factor in term.split("*"))
        for term in text.replace(" ", "").split("+")
    )
