"""How an adapter's module names must be changed to be the base's: decided by the base, never guessed.

The modules are looked up first as they are spelled, then under every dialect of :mod:`loratools.naming` and every
change of prefix the base's own names suggest. One spelling must account for more modules than all others; a tie is
an error.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loratools.errors import UnmatchedModules
from loratools.naming import DIALECTS, EXPERT_PARTS, Dialect, spell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.adapter import Adapter
    from loratools.models import BaseModel

__all__ = ["EXPERT", "BaseNames", "Spelling", "bare", "choose_spelling", "finds_all", "flattened"]

EXPERT = re.compile(r"(?P<owner>.*\.experts)\.(?P<index>\d+)\.(?P<part>[A-Za-z0-9_]+)")
_NATURAL = ".(out, in)"  # no name of a module
# What stands before a name whose dots have become underscores, and the folder of a pipeline it speaks of.
_FLAT = re.compile(
    r"(?:lora|lycoris|oft)_(?:(?P<denoiser>unet|transformer|prior_unet)|te(?P<encoder>\d?))?_+(?P<rest>\w+)"
)
_MAX_STRIPPED = 4  # name components that a prefix change may drop


class BaseNames:
    """The base's names under one dialect: tensors in memory and the modules they belong to."""

    def __init__(self, base: BaseModel, dialect: Dialect) -> None:
        self.dialect = dialect
        self.specs = dict(base.source.specs)
        if base.tie is not None and not base.tie.stored:
            # The head exists in memory, as another name of the embedding.
            self.specs[base.tie.head] = self.specs[base.tie.embedding]
        self.model_type = base.config.get("model_type")
        self.disk = spell(self.specs, dialect)

    @cached_property
    def first(self) -> dict[str, str]:
        """The first tensor on disk within each module, by the module's path."""
        found: dict[str, str] = {}
        for name in sorted(self.disk, key=self.disk.__getitem__):
            path = name.rpartition(".")[0]
            while path and path not in found:
                found[path] = self.disk[name]
                path = path.rpartition(".")[0]
        return found

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every module path: each proper prefix of a tensor's name."""
        return frozenset(self.first)

    @cached_property
    def prefixes(self) -> list[str]:
        """Module paths near the root, which a name may lack."""
        return sorted({path for path in self.modules if path.count(".") < 3 and not re.search(r"\d", path)})

    def shape(self, memory: str) -> tuple[int, ...]:
        """Of a tensor, by its name in memory."""
        return self.specs[self.disk[memory]].shape

    def holds(self, path: str) -> bool:
        """Whether a module of this path exists, fused with others perhaps."""
        if path in self.modules or path in self.disk:
            return True
        expert = EXPERT.fullmatch(path)
        if expert is None or expert["part"] not in EXPERT_PARTS:
            return False
        return f"{expert['owner']}.{EXPERT_PARTS[expert['part']].fused}" in self.disk

    def stored_transposed(self, weight: str, flag: object) -> bool:
        """Whether a weight is stored (in, out), as in GPT-2's Conv1D.

        Modules of the same name tell, in all layers, by the length of their bias; else those beside it. PEFT's
        ``fan_in_fan_out`` speaks of the last layer that was adapted only, so it is heard where no module is seen to be
        stored (out, in).
        """
        path = weight.removesuffix(".weight")
        parent, _, last = path.rpartition(".")
        vote = self._votes[last] or self._votes[f"{parent}."]
        return vote > 0 or (vote == 0 and flag is True and not self._votes[_NATURAL])

    @cached_property
    def _votes(self) -> Counter[str]:
        """By last component, and by "parent.": modules stored (in, out) minus those stored (out, in).

        Under :data:`_NATURAL`, how many of the latter there are. Seen where a bias has the length of one dimension
        and not of the other.
        """
        votes: Counter[str] = Counter()
        for name in self.disk:
            path, bias = name.removesuffix(".weight"), name.removesuffix("weight") + "bias"
            shape = self.shape(name)
            if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias in self.disk:
                parent, _, last = path.rpartition(".")
                vote = 1 if self.shape(bias) == shape[1:] else -1
                votes[last] += vote
                votes[f"{parent}."] += vote
                votes[_NATURAL] += vote < 0
        return votes


@dataclass(frozen=True, slots=True)
class Spelling:
    """A way to turn the adapter's module paths into the base's: a dialect, components dropped, a prefix added."""

    base: BaseNames
    stripped: int = 0
    prefix: str = ""

    def __call__(self, path: str) -> str:
        """The base's name for a module of the adapter."""
        if self.stripped:
            path = path.split(".", self.stripped)[-1] if path.count(".") >= self.stripped else path
        return f"{self.prefix}.{path}" if self.prefix else path

    def finds(self, paths: list[str]) -> int:
        """How many of the paths are places in the base.

        Distinct ones: a spelling that puts the encoder's modules on top of the decoder's explains only half.
        """
        return len({there for path in paths if self.base.holds(there := self(path))})

    @property
    def words(self) -> str:
        """The change, for a message; empty where there is none."""
        changes = []
        if self.stripped:
            changes.append(f"without {self.stripped} leading component{'s' * (self.stripped > 1)}")
        if self.prefix:
            changes.append(f"under {self.prefix}")
        if self.base.dialect.rules:
            changes.append(f"in the {self.base.dialect.name} spelling")
        return ", ".join(changes)


def bare(name: str) -> str:
    """A module path without the layers PEFT wraps around it."""
    return name.replace(".base_layer", "")


def choose_spelling(
    adapter: Adapter, base: BaseModel, paths: list[str], besides: list[str] | None = None
) -> Spelling:
    """The spelling that finds most of the adapter's modules in the base.

    Args:
        adapter: whose they are, for messages.
        base: where to look.
        paths: of the modules.
        besides: of the modules that other tensors belong to, which decide between spellings that are equal otherwise.

    Raises:
        UnmatchedModules: two fit equally well and mean different weights.
    """
    plain = Spelling(BaseNames(base, DIALECTS[0]))
    paths, others = list(dict.fromkeys(paths)), list(dict.fromkeys(besides or ()))
    best = (plain.finds(paths), plain.finds(others))
    if best == (len(paths), len(others)):
        return plain
    found = [plain] if best[0] else []
    for spelling in _spellings(base, paths):
        count = (spelling.finds(paths), spelling.finds(others))
        if count > best:
            best, found = count, [spelling]
        elif count == best and best[0]:
            found.append(spelling)
    if not found:
        return plain
    # A name that fits as it is, but for what stands before it, is not looked for elsewhere under half of itself.
    least = min(spelling.stripped for spelling in found)
    return _single(adapter, [spelling for spelling in found if spelling.stripped == least], paths)


def _spellings(base: BaseModel, paths: list[str]) -> Iterator[Spelling]:
    seen: set[frozenset[str]] = set()
    for dialect in DIALECTS:
        names = BaseNames(base, dialect)
        key = frozenset(names.disk)
        if key in seen:
            continue  # the dialect changes nothing here
        seen.add(key)
        for stripped in range(min(_MAX_STRIPPED, max(p.count(".") for p in paths)) + 1):
            for prefix in ("", *names.prefixes):
                yield Spelling(names, stripped, prefix)


def _single(adapter: Adapter, found: list[Spelling], paths: list[str]) -> Spelling:
    """The one spelling, where those that fit agree on what they mean; the plainest of equals.

    Raises:
        UnmatchedModules: they disagree.
    """
    meanings: dict[tuple[str, ...], Spelling] = {}
    for spelling in found:
        meant = tuple(spelling(p) if spelling.base.holds(spelling(p)) else "" for p in paths)
        resolved = tuple(_place(spelling.base, m) for m in meant)
        meanings.setdefault(resolved, spelling)
    candidates = list(meanings.values())
    if len(candidates) > 1 and not (candidates[0].stripped == 0 and not candidates[0].prefix):
        example = next(p for p in paths if len({s(p) for s in candidates}) > 1)
        where = ", ".join(sorted({s(example) for s in candidates if s.base.holds(s(example))})[:4])
        raise UnmatchedModules(
            f"{adapter.name}: {example} could be {where}", (example,),
            hint="rename the adapter's modules so that they carry the base's full path",
        )  # fmt: skip
    return candidates[0]


def _place(base: BaseNames, path: str) -> str:
    """A tensor on disk that stands for a module, however its experts are packed."""
    for tail in (".weight", "", ".in_proj_weight"):
        if path + tail in base.disk:
            return base.disk[path + tail]
    return base.first.get(path, path)


def finds_all(base: BaseModel, paths: list[str]) -> bool:
    """Whether every path is one of the base's, spelled as it is."""
    plain = Spelling(BaseNames(base, DIALECTS[0]))
    return plain.finds(paths) == len(set(paths))


def flattened(adapter: Adapter, base: BaseModel) -> dict[str, str]:
    """The base's paths for module names whose dots have become underscores, found by flattening the base's own.

    And, in a pipeline, for names whose first component is a folder's, or that one of its folders alone has.

    Raises:
        UnmatchedModules: a name could be several.
    """
    paths = _in_folders(adapter, base) if base.components else {}
    names = {name: found for name in adapter.modules if (found := _FLAT.fullmatch(name)) is not None}
    if not names:
        return paths
    known: dict[str, set[str]] = {}
    for path in BaseNames(base, DIALECTS[0]).modules:
        parts = re.split(r"[./]", path)
        for start in range(len(parts)):
            known.setdefault("_".join(parts[start:]), set()).add(path)
    for name, found in names.items():
        meant = _of_component(known.get(found["rest"], set()), found)
        whole = [path for path in meant if re.sub(r"[./]", "_", path) == found["rest"]]
        if len(meant) > 1 and len(whole) != 1:
            raise UnmatchedModules(
                f"{adapter.name}: {name} could be {' or '.join(sorted(meant)[:4])}", (name,),
                hint="rename the adapter's modules so that they carry the base's full path",
            )  # fmt: skip
        if meant:
            paths[name] = (whole or sorted(meant))[0]
    return paths


def _in_folders(adapter: Adapter, base: BaseModel) -> dict[str, str]:
    modules = BaseNames(base, DIALECTS[0]).modules
    paths = {}
    for name in adapter.modules:
        head, _, rest = bare(name).partition(".")
        own = [f"{head}/{rest}"] if f"{head}/{rest}" in modules else []
        found = own or [
            path
            for one in (bare(name), rest)
            for folder in base.components
            if (path := f"{folder}/{one}") in modules
        ]
        if len(found) == 1:
            paths[name] = found[0]
    return paths


def _of_component(paths: set[str], found: re.Match[str]) -> set[str]:
    """Those in the folder a name's prefix speaks of, where the base has such folders."""
    if found["denoiser"]:
        wanted = r"unet|transformer|prior"
    elif found["encoder"] is not None:
        number = found["encoder"]
        wanted = rf"text_encoder(?:_{number})?" if number in {"", "1"} else rf"text_encoder_{number}"
    else:
        return paths
    mine = {path for path in paths if re.match(rf"(?:{wanted})/", path)}
    return mine if any("/" in path for path in paths) else paths
