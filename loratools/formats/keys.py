"""What the writers of kohya's, ComfyUI's and diffusers' files share: modules as keys, and a record of what has none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loratools.adapter import CONSTRAINED, RANKED, UNSCALED
from loratools.architectures.base import called
from loratools.canonical import candidates
from loratools.errors import LoratoolsError, Unsupported
from loratools.formats.fusing import as_lora, fused, native_name, split_adapter, split_kept
from loratools.formats.pairs import folded
from loratools.formats.registry import Written
from loratools.formats.suffixes import spelled
from loratools.metadata.hashes import LEGACY, MODEL, MODELSPEC
from loratools.metadata.translation import ModuleFacts, carry_over, kohya_metadata, network_metadata
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource
from loratools.tensors.views import reshaped, sources

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from loratools.adapter import Adapter, Module
    from loratools.architectures.base import Architecture, Component
    from loratools.dtypes import Array
    from loratools.formats.fusing import Kept

__all__ = [
    "ALPHA",
    "BLANK_HASHES",
    "Sheet",
    "lycoris_tensors",
    "name_model",
    "require_dialect",
    "spell",
    "without_alpha",
]

ALPHA = "alpha"
_LARGEST = 3e38
# Hashes that a file stated, and will state of its new bytes: they have these lengths, and are filled in at the end.
BLANK_HASHES = {MODEL: "0" * 64, LEGACY: "0" * 8, MODELSPEC: "0x" + "0" * 64}
# Keys that name the model -> which of an architecture's names that is.
_NAMES = {"ss_base_model_version": "base_model", "modelspec.architecture": "modelspec"}
_IMPLEMENTATION = "modelspec.implementation"
_PLAIN = {"lora", "dora"}
_LORA, _LYCORIS = "networks.lora", "lycoris.kohya"
_TRAINERS = {
    "flux1": "networks.lora_flux",
    "chroma": "networks.lora_flux",
}  # those whose adapters another one reads
_ALGORITHMS = {"oft": "diag-oft", "oftv2": "diag-oft"}  # kinds that LyCORIS calls something else


@dataclass(slots=True)
class Sheet:
    """A file being written: keys, and what has no place in it.

    Attributes:
        dialect: whose.
        tensors: by key.
        lost: see :class:`~loratools.formats.registry.Written`.
        ranks: of each module written, with its alpha, and whether it is a convolution with a larger kernel.
        kinds: of the modules written.
        spelled: makes the tensors of a module: of its name, the module and the dialect.
    """

    dialect: str
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, tuple[ModuleFacts, bool]] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    spelled: Callable[[str, Module, str], Mapping[str, TensorRef]] | None = None

    def add(self, tensors: Mapping[str, TensorRef]) -> None:
        """Note keys.

        Raises:
            Unsupported: one is there already.
        """
        for key, ref in tensors.items():
            if key in self.tensors:
                raise Unsupported(f"two modules would be written as {key}")
            self.tensors[key] = ref

    def note(self, stem: str, module: Module) -> None:
        """Remember what metadata say of a module."""
        self.kinds.add(module.kind)
        if module.rank and module.scaling is not None and module.kind in RANKED:
            told = ModuleFacts(module.rank, _product(module, module.rank))
            self.ranks[stem] = told, any(size > 1 for size in module.shape[2:])

    def lose(self, name: str, module: Module, reason: str) -> None:
        """Note that a module cannot be written: under every key it came from."""
        keys = sorted({one.name for ref in module.tensors.values() for one in sources(ref)})
        self.lost |= dict.fromkeys(keys or [name], reason)

    def carry(self, adapter: Adapter) -> None:
        """Carry what is no module: bundled embeddings, and everything where the dialect stays the same."""
        for key, extra in adapter.extras.items():
            if str(extra.role) == "carried" or adapter.format == self.dialect:
                self.tensors.setdefault(key, extra.tensor)
            elif extra.role != "training_only":
                self.lost[key] = extra.reason

    def written(
        self,
        adapter: Adapter,
        architecture: Architecture | None,
        weights: str,
        metadata: Mapping[str, str] | None = None,
    ) -> Written:
        """The file, its tensors in the order in which the safetensors library writes them."""
        order = sorted(self.tensors, key=lambda key: (-self.tensors[key].spec.dtype.bits, key))
        said = {**self.metadata(adapter, architecture), **(metadata or {})}
        return Written({key: self.tensors[key] for key in order}, said, weights=weights, lost=self.lost)

    def metadata(self, adapter: Adapter, architecture: Architecture | None) -> dict[str, str]:
        """What the adapter's metadata say that is still true of the file; nothing that they do not say of the model."""
        kept, _ = carry_over(adapter.metadata)
        if implementation := adapter.metadata.get(
            _IMPLEMENTATION
        ):  # without which the others are no ModelSpec
            kept[_IMPLEMENTATION] = implementation
        kept |= {key: blank for key, blank in BLANK_HASHES.items() if key in adapter.metadata}
        if architecture is not None:
            kept |= _corrected(kept, architecture, architecture.instead_of)
        return kept | (self._training(adapter, architecture) if self.dialect == "kohya" else {})

    def _training(self, adapter: Adapter, architecture: Architecture | None) -> dict[str, str]:
        """The ``ss_network_`` keys: what was said, where it is true; what tools look for, where nothing was."""
        plain, convolutions = ({name: told for name, (told, conv) in self.ranks.items() if conv is is_conv}
                               for is_conv in (False, True))  # fmt: skip
        said = network_metadata(adapter.metadata, plain, convolutions=convolutions, kinds=self.kinds)
        if said:
            return said
        found = kohya_metadata(
            plain, convolutions=convolutions, algo=self._algorithm(),
            base_model_version=_version(adapter, architecture),
        )  # fmt: skip
        module = _trainer(adapter, architecture) if self.kinds <= _PLAIN else _LYCORIS
        if module is None:
            del found["ss_network_module"]
            return found
        return {**found, "ss_network_module": module}

    def _algorithm(self) -> str | None:
        """LyCORIS' name of what made the modules; None for plain LoRA, and for several kinds beside each other."""
        kinds = self.kinds - {"full", "norm"} or self.kinds & {"full"}
        if kinds <= _PLAIN:
            return "locon" if kinds and self.kinds - kinds else None
        return next((_ALGORITHMS.get(kind, kind) for kind in kinds), None) if len(kinds) == 1 else None


def name_model(metadata: Mapping[str, str], dialect: str, architecture: Architecture) -> dict[str, str]:
    """Metadata that name the model which the user named.

    What they say already stays, unless it is another model; kohya's tools look for one key.
    """
    own = architecture.metadata.get("base_model")
    stated = {"ss_base_model_version": own} if dialect == "kohya" and own else {}
    return {**stated, **metadata, **_corrected(metadata, architecture)}


def _corrected(
    metadata: Mapping[str, str], architecture: Architecture, others: Collection[str] = ()
) -> dict[str, str]:
    """The names of models in metadata that are those of another family than these, as they should be."""
    right, found = {architecture.name, *others}, {}
    for key, name in _NAMES.items():
        families = called(metadata.get(key, ""))
        if families and right.isdisjoint(families) and name in architecture.metadata:
            found[key] = architecture.metadata[name]
    return found


def _version(adapter: Adapter, architecture: Architecture | None) -> str | None:
    """The model as kohya's scripts call it, where the file says in other words which it is."""
    if architecture is None or adapter.metadata.get("ss_base_model_version"):
        return None
    words = (adapter.metadata.get("modelspec.architecture"), adapter.config.base_model)
    named = any(architecture.name in called(text) for text in words if text)
    return architecture.metadata.get("base_model") if named else None


def _trainer(adapter: Adapter, architecture: Architecture | None) -> str | None:
    """The module of kohya's scripts that reads plain LoRA of a model; None where it may be one or another."""
    families = (architecture.name,) if architecture is not None else candidates(adapter)
    found = {_TRAINERS.get(family, _LORA) for family in families} or {_LORA}
    return found.pop() if len(found) == 1 else None


def spell(
    sheet: Sheet,
    adapter: Adapter,
    architecture: Architecture | None,
    *,
    stem: Callable[[Component, str], str | None],
    layout: Callable[[Component], str],
) -> None:
    """Write every module of an adapter under the names of a dialect.

    Args:
        sheet: what is written on.
        adapter: any.
        architecture: None where nothing is to be renamed.
        stem: a module's name, of its component and its path.
        layout: whether a component's paths are those of the original code, ``native``, or of ``diffusers``.

    Raises:
        Unsupported: there is no architecture, and the adapter is in another dialect.
    """
    sheet.carry(adapter)
    if architecture is None:
        require_dialect(sheet.dialect, adapter)
        for name, module in adapter.modules.items():
            _write(sheet, name, name, module)
        return
    layouts = {component.name: layout(component) for component in architecture.components}
    found = split_adapter(
        adapter, architecture, keep=lambda place: layouts[place.weight.component] == "native"
    )
    for name in found.unmatched:
        _unmatched(sheet, name, adapter, architecture)
    for name, reason in found.failed.items():
        sheet.lose(name, adapter.modules[name], reason)
    modules = {name: (found.places[name].weight.component, module) for name, module in found.modules.items()}
    for kept in found.whole.values():
        component = architecture.component(kept.place.weight.component)
        if layouts[component.name] == "native":
            _write(sheet, stem(component, native_name(kept.place.weight)), kept.origin, kept.module)
        else:
            modules |= _parts(sheet, component.name, kept)
    apart = {name: module for name, (component, module) in modules.items() if layouts[component] == "native"}
    native, lost = fused(apart, architecture)
    for name, reason in lost.items():
        sheet.lose(name, apart[name], reason)
    for one in native:
        component = architecture.component(one.component)
        _write(sheet, stem(component, one.name), one.name, one.module)
    for name, (owner, module) in modules.items():
        if layouts[owner] == "diffusers":
            path = name.removeprefix(f"{owner}.")
            _write(sheet, stem(architecture.component(owner), path), name, module)


def _parts(sheet: Sheet, component: str, kept: Kept) -> dict[str, tuple[str, Module]]:
    try:
        return {name: (component, module) for name, module in split_kept(kept.origin, kept).items()}
    except LoratoolsError as error:
        sheet.lose(kept.origin, kept.module, str(error))
        return {}


def _unmatched(sheet: Sheet, name: str, adapter: Adapter, architecture: Architecture) -> None:
    module = adapter.modules[name]
    if adapter.format == sheet.dialect:
        _write(sheet, name, name, module)
    else:
        sheet.lose(name, module, f"{architecture.title} has no such module")


def _write(sheet: Sheet, stem: str | None, name: str, module: Module) -> None:
    if stem is None:
        sheet.lose(name, module, f"{sheet.dialect} has no names for this part of the model")
        return
    try:
        sheet.add((sheet.spelled or lycoris_tensors)(stem, module, sheet.dialect))
        sheet.note(stem, module)
    except Unsupported as error:
        sheet.lose(name, module, str(error))


def require_dialect(dialect: str, adapter: Adapter) -> None:
    """Refuse to invent names.

    Raises:
        Unsupported: the adapter has the names of another dialect.
    """
    if adapter.format != dialect:
        raise Unsupported(
            f"{adapter.name}: nothing says which model it belongs to, and {dialect} names depend on it",
            hint="--arch says which (loratools formats lists them), or --base with the model",
        )


def without_alpha(module: Module) -> Module:
    """A module without the tensor of a number that it knows already."""
    return replace(module, tensors={role: ref for role, ref in module.tensors.items() if role != ALPHA})


def lycoris_tensors(stem: str, module: Module, dialect: str = "kohya") -> dict[str, TensorRef]:
    """A module's tensors under the keys that LyCORIS, kohya's scripts and ComfyUI give them.

    Args:
        stem: what stands before the suffix.
        module: of any kind.
        dialect: whose suffixes: ``kohya`` or ``comfy``.

    Raises:
        Unsupported: there are none for its kind, or nothing says how it is scaled.
    """
    module = _plain(stem, module)
    if "mid" in module.tensors:
        dialect = "kohya"  # ComfyUI looks for the core beside these names alone
    tensors = {}
    for role, ref in module.tensors.items():
        if role == ALPHA:
            continue
        suffix = (
            ".weight" if (module.kind, role) == ("ia3", "scale") else _suffix(stem, dialect, module, role)
        )
        tensors[stem + suffix] = _magnitude(module, ref) if role == "magnitude" else ref
    if module.kind == "ia3" and "on_input" not in module.tensors:
        tensors[f"{stem}.on_input"] = _on_input(stem, module)
    return tensors | _alpha(stem, module)


def _suffix(stem: str, dialect: str, module: Module, role: str) -> str:
    try:
        return spelled(dialect, module.kind, role)
    except KeyError as error:
        raise Unsupported(f"{stem}: there is no key for the {role} of a {module.kind} module") from error


def _plain(stem: str, module: Module) -> Module:
    """A module in a form that LyCORIS has: a bias in its own right, no scaling where none is stored."""
    if module.scaling is None and module.kind not in UNSCALED:
        raise Unsupported(
            f"nothing says how {stem} is scaled", hint="pass its adapter_config.json, or --alpha"
        )
    if (
        module.kind == "adalora"
        or "diag" in module.tensors
        or module.options.keys() & {"up_blocks", "down_blocks", "rows", "padded_kernel"}
    ):
        module = as_lora(stem, module)
    if odd := module.options.keys() & {"experts", "init", "embedding"}:
        raise Unsupported(
            f"{stem}: {', '.join(sorted(odd))} has no keys", hint="loratools normalize may make it plain"
        )
    if module.kind == "ia3" and not module.options.get(
        "relative"
    ):  # PEFT's factors, which LyCORIS stores less one
        values = module.tensors["scale"].load()
        less = _number(module.tensors["scale"].name, values - values.dtype.type(1))
        return replace(
            module, tensors={**module.tensors, "scale": less}, options={**module.options, "relative": True}
        )
    tensors, factor = dict(module.tensors), module.scaling or 0.0
    if "up_bias" in tensors:
        tensors["diff_bias"] = folded(tensors.pop("up_bias"), factor)
    if factor == 1.0:
        return replace(module, tensors=tensors)
    if module.kind == "lokr" and {"left", "right"} <= tensors.keys():  # which LyCORIS never scales
        tensors["left"] = folded(tensors["left"], factor)
        return replace(module, tensors=tensors, scaling=1.0)
    if module.kind in {"full", "norm"}:
        tensors = {role: ref if role == ALPHA else folded(ref, factor) for role, ref in tensors.items()}
        return replace(module, tensors=tensors, scaling=1.0)
    return replace(module, tensors=tensors)


def _magnitude(module: Module, ref: TensorRef) -> TensorRef:
    """(out, 1, ...), or (1, in, ...) where the columns are what is scaled."""
    ones = tuple(1 for _ in module.shape[2:])
    count = ref.spec.count
    if module.options.get("magnitude_axis", 0) == 1:
        return reshaped(ref, (1, count, *ones))
    return reshaped(ref, (count, 1, *ones))


def _alpha(stem: str, module: Module) -> dict[str, TensorRef]:
    """The alpha: scaling times what readers divide it by, in float32 and without dimensions."""
    import numpy as np

    kind = "lora" if module.kind == "dora" else module.kind
    if kind in UNSCALED - CONSTRAINED:
        return {}
    if kind in CONSTRAINED:  # of which it is a limit, of all output features together
        constraint = float(module.options.get("constraint") or 0.0)
        value = constraint / (module.shape[0] or 1) if module.alpha is None else module.alpha
    else:
        divisor = _divisor(kind, module)
        if divisor is None:
            return {}
        value = _product(module, divisor)
    if not abs(value) <= _LARGEST:
        raise Unsupported(f"{stem}: alpha {value} is beyond float32")
    return {f"{stem}.{ALPHA}": _number(f"{stem}.{ALPHA}", np.array(value, np.float32))}


def _divisor(kind: str, module: Module) -> int | None:
    """The rank by which readers divide alpha; None for a LoKr without a decomposed side, which is not scaled."""
    tensors = module.tensors
    if kind == "lora":
        return tensors["down"].shape[0]
    if kind == "loha":
        return tensors["first_b"].shape[0]
    if kind == "lokr":
        side = next((tensors[role] for role in ("right_b", "left_b") if role in tensors), None)
        return None if side is None else side.shape[0]
    return module.rank


def _product(module: Module, divisor: int) -> float:
    """The alpha that gives a module's scaling; the one it was read with, where that is so."""
    scaling = module.scaling or 0.0
    if module.alpha is not None and module.alpha / divisor == scaling:
        return module.alpha
    return scaling * divisor


def _on_input(stem: str, module: Module) -> TensorRef:
    import numpy as np

    return _number(f"{stem}.on_input", np.array(bool(module.options.get("feedforward")), np.bool_))


def _number(name: str, value: Array) -> TensorRef:
    return TensorRef(MemorySource({name: value}), name)
