"""The checks that rules name. Each is a generator over what it finds in :class:`~loratools.engines.base.Facts`.

A check says only that a feature is there. What an engine makes of it stands in the engine's file.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loratools.engines.base import Found

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loratools.adapter import Module
    from loratools.engines.base import Facts

    Check = Callable[..., Iterator[Found]]

__all__ = ["CHECKS", "has_no_place", "layer_holes"]

CHECKS: dict[str, Check] = {}
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
_REDONE = {"pissa", "olora"}  # initialisations that the base alone tells again
_PROJECTIONS = ({"w1", "w2", "w3"}, {"gate_proj", "up_proj", "down_proj"})
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"(?P<before>.+?)\.(?P<index>\d{1,5})\.(?P<after>.+)")


def _check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _named(names: Sequence[str], **words: object) -> Iterator[Found]:
    """One finding for all names together."""
    if names:
        having = "1 module has" if len(names) == 1 else f"{len(names):,} modules have"
        told = {"count": len(names), "having": having, "first": names[0], "names": _few(names)}
        yield Found(_few(names), {**told, **words})


# --- what the file is --------------------------------------------------------------------------------------


@_check
def dialect(facts: Facts, *, reads: Sequence[str] = (), only: Sequence[str] = ()) -> Iterator[Found]:
    """An adapter of a format that is none of ``reads``, or one of ``only``."""
    form = facts.adapter.format
    if form in only or (not only and form not in reads):
        readable = bool(facts.adapter.modules) and facts.adapter.refusal is None
        yield Found(facts.adapter.name, {"format": form}, mendable=readable)


@_check
def weights_file(facts: Facts, *, suffixes: Sequence[str]) -> Iterator[Found]:
    """Weights in a file of one of these kinds."""
    if facts.suffix in suffixes:
        yield Found(facts.adapter.name, {"suffix": facts.suffix})


@_check
def adapter_name(facts: Facts, *, usual: bool | None = None) -> Iterator[Found]:
    """Keys that still carry the adapter's name; ``usual``: only where it is ``default``, or only where it is not."""
    yield from _named([k for k in facts.named if usual is None or (".default." in f"{k}.") == usual])


@_check
def prefix_missing(facts: Facts) -> Iterator[Found]:
    """Keys without PEFT's prefix."""
    yield from _named(facts.unprefixed)


@_check
def prefix_doubled(facts: Facts) -> Iterator[Found]:
    """Keys with PEFT's prefix twice."""
    yield from _named(facts.doubled)


@_check
def unpaired(facts: Facts) -> Iterator[Found]:
    """A factor without the one it belongs to."""
    yield from _named(facts.unpaired)


@_check
def stray_keys(facts: Facts, *, reason: str) -> Iterator[Found]:
    """Tensors that make no module, for a reason that an expression finds."""
    wanted = re.compile(reason)
    stray = facts.adapter.extras.items()
    yield from _named([key for key, e in stray if e.role == "unclaimed" and wanted.search(e.reason)])


@_check
def base_copies(facts: Facts) -> Iterator[Found]:
    """Copies of a weight of the base, which PEFT puts beside a LoRA on an embedding."""
    yield from _named([key for key, extra in facts.adapter.extras.items() if extra.role == "base_copy"])


@_check
def adapter_type(facts: Facts, *, allowed: Sequence[str]) -> Iterator[Found]:
    """A configuration of another PEFT type."""
    kind = facts.adapter.config.peft_type
    if kind is not None and kind not in allowed:
        yield Found("peft_type", {"type": kind})


@_check
def kinds(facts: Facts, *, names: Sequence[str]) -> Iterator[Found]:
    """Modules of one of these kinds."""
    found = [name for name, module in facts.adapter.modules.items() if module.kind in names]
    if found:
        yield from _named(found, kind=facts.adapter.modules[found[0]].kind)


@_check
def roles(facts: Facts, *, names: Sequence[str]) -> Iterator[Found]:
    """Modules with a tensor of one of these roles, such as the core of a Tucker decomposition."""
    having = [n for n, m in facts.adapter.modules.items() if set(names) & m.tensors.keys()]
    yield from _named(having)


@_check
def fields_missing(facts: Facts, *, names: Sequence[str]) -> Iterator[Found]:
    """Fields that the configuration does not have."""
    absent = [name for name in names if facts.config.get(name) is None]
    yield from _named(absent)


@_check
def fields_set(facts: Facts, *, names: Sequence[str]) -> Iterator[Found]:
    """Fields of the configuration that are set."""
    yield from _named([name for name in names if facts.config.get(name)])


@_check
def initialisation(
    facts: Facts, *, names: Sequence[str], without: str = "", beside: str = ""
) -> Iterator[Found]:
    """An initialisation that took something out of the base.

    Args:
        facts: of the adapter.
        names: how its name may begin.
        without: only where this field is not set.
        beside: only where this field is set.
    """
    value = facts.config.get("init_lora_weights")
    if (without and facts.config.get(without)) or (beside and not facts.config.get(beside)):
        return
    if isinstance(value, str) and value.lower().startswith(tuple(names)):
        yield Found("init_lora_weights", {"init": value}, mendable=value.lower() in _REDONE)


@_check
def targets_pattern(facts: Facts) -> Iterator[Found]:
    """``target_modules`` as an expression."""
    value = facts.config.get("target_modules")
    if isinstance(value, str) and value not in {"all", "all-linear"}:
        yield Found("target_modules", {"pattern": value})


# --- scale and rank ----------------------------------------------------------------------------------------


def _factors(facts: Facts) -> dict[str, Module]:
    return {
        n: m for n, m in facts.adapter.modules.items() if m.rank and m.kind in {"lora", "dora", "adalora"}
    }


def _config_alpha(facts: Facts) -> float | None:
    value = facts.config.get("lora_alpha")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return 8.0 if facts.adapter.format == "peft" else None  # which PEFT takes


@_check
def rslora(facts: Facts) -> Iterator[Found]:
    """A scaling of alpha / sqrt(rank)."""
    if not facts.config.get("use_rslora"):
        return
    for module in _factors(facts).values():
        if module.rank != 1:
            plain = None if module.alpha is None else module.alpha / (module.rank or 1)
            words = {
                "wanted": _number(module.scaling),
                "got": _number(plain),
                "times": _number((module.rank or 1) ** 0.5),
            }
            yield Found("use_rslora", words)
            return


@_check
def alpha_pattern(facts: Facts) -> Iterator[Found]:
    """Modules with an alpha of their own."""
    usual = _config_alpha(facts)
    if usual is None:
        return
    own = [n for n, m in _factors(facts).items() if m.alpha is not None and m.alpha != usual]
    if own:
        alpha = facts.adapter.modules[own[0]].alpha
        yield from _named(own, alpha=_number(alpha), usual=_number(usual))


@_check
def mixed_rank(facts: Facts, *, scaled: bool | None = None) -> Iterator[Found]:
    """Modules of several ranks; ``scaled = false``: where nothing says how they are scaled."""
    ranks = {n: m.rank for n, m in _factors(facts).items() if "config_rank" not in m.options}
    said = any("alpha" in m.tensors for m in facts.adapter.modules.values()) or "lora_alpha" in facts.config
    if scaled is not None and scaled != said:
        return
    configured = facts.config.get("r") if facts.adapter.format == "peft" else None
    usual = (
        configured if isinstance(configured, int) else max(ranks.values(), key=lambda r: r or 0, default=None)
    )
    odd = [name for name, rank in ranks.items() if rank != usual]
    if odd:
        yield from _named(odd, rank=ranks[odd[0]], usual=usual)


@_check
def rank_contradicts(facts: Facts) -> Iterator[Found]:
    """Tensors of another rank than the configuration gives them."""
    odd = [n for n, m in facts.adapter.modules.items() if "config_rank" in m.options]
    if odd:
        module = facts.adapter.modules[odd[0]]
        yield from _named(odd, rank=module.rank, usual=module.options["config_rank"])


def _greatest(facts: Facts) -> int:
    return max((module.rank or 0 for module in _factors(facts).values()), default=0)


@_check
def rank_flag(facts: Facts, *, allowed: Sequence[int] = (), default: int = 0) -> Iterator[Found]:
    """The rank an engine must be started for: the greatest, or the next that it knows; none up to its default."""
    rank = _greatest(facts)
    if rank <= default:
        return
    served = next((step for step in sorted(allowed) if step >= rank), None) if allowed else rank
    if rank and served is not None:
        targets = sorted({_last(name) for name in _factors(facts)})
        yield Found("", {"rank": rank, "served": served, "targets": " ".join(targets)})


@_check
def rank_above(facts: Facts, *, limit: int) -> Iterator[Found]:
    """A rank beyond a limit."""
    above = [name for name, module in _factors(facts).items() if (module.rank or 0) > limit]
    yield from _named(above, rank=_greatest(facts), limit=limit)


@_check
def rank_outside(facts: Facts, *, least: int, most: int) -> Iterator[Found]:
    """A rank outside of a range."""
    rank = _greatest(facts)
    if rank and not least <= rank <= most:
        yield Found("", {"rank": rank, "least": least, "most": most})


@_check
def alpha_fractional(facts: Facts) -> Iterator[Found]:
    """A ``lora_alpha`` that is no whole number, or is written as one that has a fraction."""
    value = facts.config.get("lora_alpha")
    if isinstance(value, float):
        yield Found("lora_alpha", {"alpha": value})


@_check
def alpha_zero(facts: Facts) -> Iterator[Found]:
    """A ``lora_alpha`` of 0."""
    if _config_alpha(facts) == 0:
        yield Found("lora_alpha")


@_check
def alpha_negative(facts: Facts) -> Iterator[Found]:
    """A ``lora_alpha`` below 0."""
    alpha = _config_alpha(facts)
    if alpha is not None and alpha < 0:
        yield Found("lora_alpha", {"alpha": _number(alpha)})


def _number(value: float | None) -> str:
    return "an unknown factor" if value is None else f"{value:.4g}"


# --- what stands beside plain factors ----------------------------------------------------------------------


@_check
def dora(facts: Facts, *, axis: int | None = None, experts: bool | None = None) -> Iterator[Found]:
    """Magnitude vectors; of this axis only (0: one value an output), or of experts only."""
    modules = facts.adapter.modules
    found = [n for n, m in modules.items() if m.kind == "dora" or "magnitude" in m.tensors]
    if axis is not None:
        found = [n for n in found if modules[n].options.get("magnitude_axis", 0) == axis]
    if experts:
        found = [n for n in found if _is_expert(n, modules[n])]
    yield from _named(found)
    if not found and facts.config.get("use_dora") and axis is None and not experts:
        yield Found("use_dora", {"count": 0, "first": "", "names": "use_dora"})


@_check
def bias(facts: Facts, *, configured: bool = False) -> Iterator[Found]:
    """Biases that were trained along; with ``configured``, also where only the configuration says so."""
    trained = [k for k, e in facts.adapter.extras.items() if e.reason.startswith("bias=")]
    if trained:
        yield from _named(trained)
    elif configured and facts.config.get("bias") not in (None, "none"):
        yield Found("bias", {"count": 0, "first": "", "names": f"bias={facts.config['bias']}"})


@_check
def lora_bias(facts: Facts, *, configured: bool = False) -> Iterator[Found]:
    """A bias beside a factor; with ``configured``, also where only the configuration says so."""
    having = [name for name, module in facts.adapter.modules.items() if "up_bias" in module.tensors]
    if having or (configured and facts.config.get("lora_bias")):
        yield from _named(having or ["lora_bias"])


@_check
def saved_modules(
    facts: Facts, *, unless: Sequence[str] = (), among: Sequence[str] = (), configured: bool = False
) -> Iterator[Found]:
    """Whole tensors or token rows that replace the base's.

    Args:
        facts: of the adapter.
        unless: names of modules that are none of it.
        among: names of the modules meant; by default, all.
        configured: also where only the configuration says so.
    """
    whole = [
        k for k, e in facts.adapter.extras.items()
        if e.role == "token_rows" or (e.role == "replacement" and not e.reason.startswith("bias="))
    ]  # fmt: skip
    listed = facts.config.get("modules_to_save")
    if configured and not whole and isinstance(listed, list):
        whole = [str(name) for name in listed]
    named = set(unless) | set(among)
    inside = [key for key in whole if named & set(key.split("."))]
    yield from _named(inside if among else [key for key in whole if key not in inside])


@_check
def embeddings(
    facts: Facts,
    *,
    names: Sequence[str] = (*_EMBEDDINGS, "lm_head"),
    families: Sequence[str] = (),
    unless_families: Sequence[str] = (),
    with_base: bool = True,
    without_base: bool = True,
    tied: bool | None = None,
    vocabulary: int | None = None,
) -> Iterator[Found]:
    """A LoRA on the input or output embedding.

    Args:
        facts: of the adapter.
        names: of the layers meant.
        families: only where the base is of one of these.
        unless_families: only where the base is known to be of none of these.
        with_base: also where a base is given.
        without_base: also where no base is given.
        tied: only where the base's embeddings are tied, or are not; no base counts as neither.
        vocabulary: only where the base has more rows than this.
    """
    base = facts.base
    if not (without_base if base is None else with_base):
        return
    if base is not None and (
        (families and base.family not in families)
        or base.family in unless_families
        or (tied is not None and base.tied != tied)
        or (vocabulary is not None and (base.vocabulary or 0) <= vocabulary)
    ):
        return
    modules = facts.adapter.modules
    found = [
        n
        for n, m in modules.items()
        if _last(n) in names or (m.options.get("embedding") and _EMBEDDINGS[0] in names)
    ]
    yield from _named(found, family="" if base is None else base.family)


@_check
def vocabulary_resized(facts: Facts) -> Iterator[Found]:
    """Tokens that the base does not have. Known with a base only."""
    base = facts.base
    if base is None or base.vocabulary is None:
        return
    beyond = sorted(token for token in facts.added_tokens if token >= base.vocabulary)
    if beyond:
        yield Found("added_tokens.json", {"rows": beyond[-1] + 1, "vocabulary": base.vocabulary})
        return
    for name, (delta, weight) in base.misfits.items():
        if _last(name) in (*_EMBEDDINGS, "lm_head"):
            yield Found(name, {"rows": max(delta), "vocabulary": max(weight)})
            return
    for key, extra in facts.adapter.extras.items():
        owner = _last(extra.target.removesuffix(".weight"))
        whole = extra.role in {"replacement", "base_copy"} and owner in (*_EMBEDDINGS, "lm_head")
        if whole and extra.tensor.shape[:1] != (base.vocabulary,):
            yield Found(key, {"rows": extra.tensor.shape[0], "vocabulary": base.vocabulary})
            return


def _is_expert(name: str, module: Module) -> bool:
    return "experts" in module.options or _EXPERT.search(f".{name}.") is not None


@_check
def experts_apart(facts: Facts) -> Iterator[Found]:
    """Experts with factors of their own, each a module."""
    yield from _named(
        [
            n
            for n, m in facts.adapter.modules.items()
            if _EXPERT.search(f".{n}.") and not m.options.get("experts")
        ]
    )


@_check
def experts_packed(
    facts: Facts,
    *,
    families: Sequence[str] = (),
    unless_families: Sequence[str] = (),
    without_base: bool = True,
) -> Iterator[Found]:
    """Experts packed into one pair of factors (PEFT's ``target_parameters``)."""
    base = facts.base
    if base is None and not without_base:
        return
    if base is not None and ((families and base.family not in families) or base.family in unless_families):
        return
    packed = [
        n for n, m in facts.adapter.modules.items() if "experts" in m.options or "parameter" in m.options
    ]
    if packed or facts.config.get("target_parameters"):
        yield from _named(packed or ["target_parameters"], family="" if base is None else base.family)


@_check
def expert_ranks(facts: Facts) -> Iterator[Found]:
    """Experts of one projection whose ranks differ."""
    ranks: dict[str, set[int | None]] = {}
    for name, module in facts.adapter.modules.items():
        if _EXPERT.search(f".{name}."):
            ranks.setdefault(_EXPERT.sub(".experts.*.", name), set()).add(module.rank)
    yield from _named([name for name, found in ranks.items() if len(found) > 1])


@_check
def experts_partly(facts: Facts) -> Iterator[Found]:
    """Experts of one layer that have other projections than the rest, or lack one of the three."""
    layers: dict[str, dict[str, set[str]]] = {}
    for name in facts.adapter.modules:
        found = _EXPERT.search(f".{name}.")
        if found is not None:
            layer = f".{name}"[1 : found.start()]
            layers.setdefault(layer, {}).setdefault(found[0], set()).add(_last(name))
    partly = [
        layer
        for layer, experts in layers.items()
        if any(not any(names >= whole for whole in _PROJECTIONS) for names in experts.values())
    ]
    yield from _named(partly)


@_check
def packed_partly(facts: Facts, *, members: Sequence[str], needed: Sequence[str]) -> Iterator[Found]:
    """Layers of which some of ``members`` are adapted, and not all that are ``needed`` beside them."""
    groups: dict[str, set[str]] = {}
    for name in facts.adapter.modules:
        owner, _, last = name.rpartition(".")
        if last in members:
            groups.setdefault(owner, set()).add(last)
    lacking = {owner: sorted(set(needed) - found) for owner, found in groups.items() if set(needed) - found}
    yield from _named(list(lacking), missing=", ".join(next(iter(lacking.values()), [])))


def layer_holes(facts: Facts) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Kinds of modules that some layers lack, experts aside, from the first to the base's last or the last adapted.

    Returns:
        By kind, with ``*`` for the number of the layer: a module of it, and the layers without.
    """
    kinds: dict[str, dict[int, str]] = {}
    for name in facts.adapter.modules:
        found = _LAYER.fullmatch(name)
        if found is not None and "experts" not in name.split("."):
            kinds.setdefault(f"{found['before']}.*.{found['after']}", {})[int(found["index"])] = name
    most = max((max(indices) + 1 for indices in kinds.values()), default=0)
    known = None if facts.base is None else facts.base.layers
    holes = {}
    for kind, indices in kinds.items():
        lacking = tuple(i for i in range(most if known is None else known) if i not in indices)
        if lacking:
            holes[kind] = (next(iter(indices.values())), lacking)
    return holes


@_check
def layers_missing(facts: Facts) -> Iterator[Found]:
    """Kinds of modules that are not adapted in every layer."""
    holes = layer_holes(facts)
    layers = next(iter(holes.values()), ("", ()))[1]
    yield from _named(list(holes), layers=_few([str(layer) for layer in layers]))


@_check
def layers_unknown(facts: Facts) -> Iterator[Found]:
    """Numbered layers, where nothing says how many the base has."""
    if facts.base is None or facts.base.layers is None:
        numbers = [int(found["index"]) for n in facts.adapter.modules if (found := _LAYER.fullmatch(n))]
        if numbers:
            yield Found("", {"last": max(numbers)})


@_check
def module_names(facts: Facts, *, allowed: Sequence[str]) -> Iterator[Found]:
    """Modules called other than an engine allows."""
    yield from _named([n for n in facts.adapter.modules if _last(n) not in allowed])


@_check
def module_paths(facts: Facts, *, pattern: str) -> Iterator[Found]:
    """Modules whose path an expression finds."""
    wanted = re.compile(pattern)
    yield from _named([name for name in facts.adapter.modules if wanted.search(name)])


@_check
def convolutions(facts: Facts) -> Iterator[Found]:
    """Modules that adapt a convolution."""
    yield from _named([n for n, m in facts.adapter.modules.items() if len(m.shape) > 2])


@_check
def stored_transposed(facts: Facts) -> Iterator[Found]:
    """A configuration that says that weights are stored (in, out)."""
    if facts.config.get("fan_in_fan_out"):
        yield Found("fan_in_fan_out")


@_check
def beyond_half(facts: Facts) -> Iterator[Found]:
    """Values that half precision cannot hold."""
    yield from _named(facts.beyond_half)


@_check
def dtypes(facts: Facts, *, names: Sequence[str]) -> Iterator[Found]:
    """Factors of one of these types."""
    stored = {ref.spec.dtype.name for m in facts.adapter.modules.values() for ref in m.factors.values()}
    found = sorted(stored & set(names))
    if found:
        yield Found("", {"dtypes": ", ".join(found)}, mendable=not facts.beyond_half)


# --- against a base ----------------------------------------------------------------------------------------


@_check
def family(
    facts: Facts, *, allowed: Sequence[str] = (), among: Sequence[str] = (), unknown: bool = False
) -> Iterator[Found]:
    """A base of a family that is not ``allowed``, or is ``among`` some; or, with ``unknown``, one not known."""
    found = "" if facts.base is None else facts.base.family
    if (unknown and not found) or (
        not unknown and found and (found in among or (allowed and found not in allowed))
    ):
        yield Found("", {"family": found})


@_check
def architecture(facts: Facts, *, known: bool = True) -> Iterator[Found]:
    """A GGUF adapter for another architecture than the base's; or, with ``known = false``, one of which nothing says.

    The base's is known for the families that GGUF is written for here, and where both have one name.
    """
    base = facts.base
    said = str(facts.config.get("general.architecture", ""))
    if base is None or not base.family or not said:
        return
    alike = base.family.replace("_", "").replace("-", "") == said.replace("_", "").replace("-", "")
    differs = base.architecture != said if base.architecture else not alike
    if differs and bool(base.architecture) == known:
        words = {"said": said, "wanted": base.architecture, "family": base.family, "base": base.name}
        yield Found("general.architecture", words)


@_check
def unmatched(facts: Facts) -> Iterator[Found]:
    """Keys that nothing in the base answers to."""
    if facts.base is not None:
        yield from _named(facts.base.unmatched, base=facts.base.name)


@_check
def renamed(facts: Facts) -> Iterator[Found]:
    """Names that fit the base only when they are changed."""
    if facts.base is not None and facts.base.renamed:
        yield Found("", {"change": facts.base.renamed, "base": facts.base.name})


@_check
def misfit(facts: Facts, *, smaller: bool) -> Iterator[Found]:
    """Deltas of another shape than their weights, embeddings aside: no greater anywhere, or greater somewhere."""
    if facts.base is None:
        return
    for name, (delta, weight) in facts.base.misfits.items():
        if _last(name) in (*_EMBEDDINGS, "lm_head"):
            continue  # a matter of the vocabulary
        fits_within = len(delta) == len(weight) and all(a <= b for a, b in zip(delta, weight, strict=True))
        if fits_within == smaller:
            yield Found(name, {"delta": list(delta), "weight": list(weight)})


# --- what conversion refuses -------------------------------------------------------------------------------


def has_no_place(facts: Facts, target: str) -> bool:
    """Whether an adapter holds what a conversion to MLX or GGUF refuses."""
    if target not in {"mlx", "gguf"}:
        return False
    found = [
        initialisation(facts, names=("pissa", "olora", "corda", "loftq", "lora_ga")),
        bias(facts), lora_bias(facts), saved_modules(facts), experts_packed(facts),
        embeddings(facts, names=("lm_head",), tied=True, without_base=False),
    ]  # fmt: skip
    if target == "gguf":
        found.append(dora(facts))
    return any(next(one, None) is not None for one in found)
