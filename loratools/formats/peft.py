"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

What each key means is one table, :data:`ROLES`. Facts: PEFT 0.2 to 0.21, measured.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.adapter import SAVED_EMBEDDING, Adapter, AdapterConfig, Extra, Module
from loratools.formats.peft_config import effective_scaling
from loratools.formats.refusals import why_broken, why_refused
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import ExtraRole
    from loratools.formats.peft_config import PeftConfig
    from loratools.tensors.base import TensorSource

__all__ = [
    "INNER_PROJECTION",
    "PREFIX",
    "ROLES",
    "Problem",
    "adds_twice",
    "broken_modules",
    "common_config",
    "has_peft_keys",
    "layer_name",
    "pattern_name",
    "read_peft",
    "split_key",
    "with_blockwise",
    "within",
]

PREFIX = "base_model.model."

# Key suffix -> (kind of module, role of the tensor). An adapter's name may stand behind the first word:
# lora_A.default.weight.
ROLES: dict[str, tuple[str, str]] = {
    "lora_A.weight": ("lora", "down"),
    "lora_B.weight": ("lora", "up"),
    "lora_B.bias": ("lora", "up_bias"),
    "lora_embedding_A": ("lora", "embedding_down"),
    "lora_embedding_B": ("lora", "embedding_up"),
    "lora_magnitude_vector": ("lora", "magnitude"),
    "lora_magnitude_vector.weight": ("lora", "magnitude"),  # PEFT 0.10 and 0.11
    "lora_diag": ("lora", "diag"),
    "lora_A": ("adalora", "down"),
    "lora_B": ("adalora", "up"),
    "lora_E": ("adalora", "singular"),
    "ranknum": ("adalora", "ranknum"),
    "ia3_l": ("ia3", "scale"),
    "hada_w1_a": ("loha", "first_a"),
    "hada_w1_b": ("loha", "first_b"),
    "hada_t1": ("loha", "first_core"),
    "hada_w2_a": ("loha", "second_a"),
    "hada_w2_b": ("loha", "second_b"),
    "hada_t2": ("loha", "second_core"),
    "lokr_w1": ("lokr", "left"),
    "lokr_w1_a": ("lokr", "left_a"),
    "lokr_w1_b": ("lokr", "left_b"),
    "lokr_w2": ("lokr", "right"),
    "lokr_w2_a": ("lokr", "right_a"),
    "lokr_w2_b": ("lokr", "right_b"),
    "lokr_t2": ("lokr", "right_core"),
}
_WORDS = "|".join(sorted({key.split(".")[0] for key in ROLES}, key=len, reverse=True))
_KEY = re.compile(
    rf"(?P<path>.+?)\.(?P<word>{_WORDS})(?:\.(?!weight$|bias$)[^.]+)?(?P<tail>\.weight|\.bias)?"
)
_TOKENS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_TRAINING_ONLY = ("lora_monteclora_sampler.", "lora_velora_embed", "original_module.")

_REQUIRED = {
    "lora": ({"down", "up"}, {"embedding_down", "embedding_up"}),
    "adalora": ({"down", "up", "singular"},),
    "ia3": ({"scale"},),
    "loha": ({"first_a", "first_b", "second_a", "second_b"},),
    "lokr": (
        {"left", "right"}, {"left_a", "left_b", "right"}, {"left", "right_a", "right_b"},
        {"left_a", "left_b", "right_a", "right_b"},
    ),
}  # fmt: skip
_DIMENSIONS = {"up_bias": 1, "magnitude": 1, "diag": 1, "scale": 1}
_INNER = {
    "loha": (("first_a", "first_b", "first_core"), ("second_a", "second_b", "second_core")),
    "lokr": (("left_a", "left_b", ""), ("right_a", "right_b", "right_core")),
}
_RANK_FIRST = ("first_b", "left_b", "right_b")  # factors whose first dimension is the rank
_TYPES = {"LORA": {"lora"}, "ADALORA": {"adalora"}, "IA3": {"ia3"}, "LOHA": {"loha"}, "LOKR": {"lokr"}}
# The output projection inside torch's MultiheadAttention, which PEFT wraps together with the attention.
INNER_PROJECTION = ".base_layer.out_proj"
_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES


class _Key(NamedTuple):
    path: str
    kind: str
    role: str


def split_key(key: str) -> _Key | None:
    """The module, kind and role of an adapter key; None for a key that belongs to no module.

    >>> split_key("model.layers.0.q_proj.lora_A.default.weight")
    _Key(path='model.layers.0.q_proj', kind='lora', role='down')
    """
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    meaning = ROLES.get(found["word"] + (found["tail"] or ""))
    return None if meaning is None else _Key(found["path"], *meaning)


def has_peft_keys(source: TensorSource) -> bool:
    """Whether any key is one that PEFT writes for a LoRA layer."""
    return any(key.startswith("base_model.") or split_key(key) is not None for key in source.specs)


def common_config(source: TensorSource) -> dict[str, Any]:
    """A configuration that says of the ranks what the tensors say; empty where there are no LoRA factors."""
    ranks: dict[str, int] = {}
    for key, spec in source.specs.items():
        found = split_key(_path(key))
        if found is not None and found[1:] in {("lora", "down"), ("lora", "embedding_down")} and spec.shape:
            ranks[found.path] = spec.shape[0]
    if not ranks:
        return {}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
    return {"peft_type": "LORA", "r": usual, "rank_pattern": odd}


def _path(key: str) -> str:
    """A key below the wrapped model: PEFT's prefix is dropped, however often it stands there."""
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def read_peft(name: str, source: TensorSource, config: PeftConfig, evidence: str) -> Adapter:
    """Turn keys and configuration into an :class:`~loratools.adapter.Adapter`; reads no values."""
    groups, extras = _group(source, config)
    modules: dict[str, Module] = {}
    broken: dict[str, str] = {}
    for (path, kind), tensors in groups.items():
        problem = _problem(path, kind, tensors, config)
        if problem is None:
            modules[path] = _module(path, kind, tensors, config)
            if (count := tensors.get("ranknum")) is not None:
                extras[count.name] = Extra(count, path, "training_only", "repeats the rank that pruning left")
            continue
        broken[path] = problem.text
        extras |= {ref.name: Extra(ref, path, "unclaimed", problem.text) for ref in tensors.values()}
    if not modules and not broken and any(split_key(_path(key)) for key in source.specs):
        broken["the adapter"] = f"declared as {config.peft_type}, with the tensors of another type"
    present = sorted({module.kind for module in modules.values()}) or [config.peft_type.lower()]
    return Adapter(
        name=name,
        format="peft",
        modules=modules,
        config=AdapterConfig(config.peft_type, config.base_model, config.raw),
        metadata=source.metadata,
        extras=extras,
        evidence=evidence,
        kinds=tuple(present),
        warnings=config.warnings + (() if source.specs else ("the file holds no tensors",)),
        refusal=why_refused(config, modules, _TYPES) or why_broken(broken),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


def _group(
    source: TensorSource, config: PeftConfig
) -> tuple[dict[tuple[str, str], dict[str, TensorRef]], dict[str, Extra]]:
    """The tensors of each module by role, under (path, kind); and those that belong to no module."""
    groups: dict[tuple[str, str], dict[str, TensorRef]] = {}
    extras: dict[str, Extra] = {}
    known = _TYPES.get(config.peft_type, set())
    for key in source.specs:
        ref, path = TensorRef(source, key), _path(key)
        found = split_key(path)
        if found is None or found.kind not in known:
            extras[key] = _extra(ref, path, config)
            continue
        roles = groups.setdefault((found.path, found.kind), {})
        if found.role in roles:
            reason = f"{roles[found.role].name} is the same factor under another name"
            extras[key] = Extra(ref, found.path, "unclaimed", reason)
        else:
            roles[found.role] = ref
    return groups, extras


class Problem(NamedTuple):
    """Why tensors that look like a module make none."""

    code: str
    text: str


def broken_modules(source: TensorSource, config: PeftConfig) -> dict[str, tuple[Problem, tuple[str, ...]]]:
    """Modules that cannot be one: their problem, and the tensors concerned."""
    found = {}
    for (path, kind), tensors in _group(source, config)[0].items():
        problem = _problem(path, kind, tensors, config)
        if problem is not None:
            found[path] = problem, tuple(ref.name for ref in tensors.values())
    return found


def _problem(path: str, kind: str, tensors: Mapping[str, TensorRef], config: PeftConfig) -> Problem | None:
    """Why these tensors make no module; None if they do."""
    if not any(required <= tensors.keys() for required in _REQUIRED[kind]):
        have = ", ".join(tensors)
        return Problem("unpaired-factor", f"{have} without the factor it belongs to")
    for role, ref in tensors.items():
        if role == "ranknum":
            continue
        least = _DIMENSIONS.get(role, 2)
        ranks = ref.shape[1:] if role == "up" else ref.shape[:1]
        pruned = kind == "adalora" and ranks == (0,)  # which leaves some modules nothing
        if 0 in ref.shape and not pruned:
            text = f"{role} is empty {list(ref.shape)}: saved without gathering it (DeepSpeed ZeRO-3)"
            return Problem("empty-factor", text)
        if len(ref.shape) < least:
            text = f"{role} has shape {list(ref.shape)}, expected {least} dimensions or more"
            return Problem("factor-dimensions", text)
    shapes = {role: ref.shape for role, ref in tensors.items()}
    misfit = _misfit(kind, shapes, _blocks(path, config), config)
    return None if misfit is None else Problem("factors-disagree", misfit)


def _misfit(
    kind: str, shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, int], config: PeftConfig
) -> str | None:
    """Two factors whose inner dimensions differ, or a vector of the wrong length."""
    if kind == "lora" and (enabled := _enabled(config)):
        return _fused_misfit(shapes, enabled)
    if kind in {"lora", "adalora"} and not blocks:
        down = shapes.get("down") or shapes["embedding_down"]
        up = shapes.get("up") or shapes["embedding_up"]
        if len(down) < 3 and up[1] != down[0]:
            return f"down {list(down)} and up {list(up)} have different ranks"
        for role, wanted in (
            ("up_bias", up[0]),
            ("magnitude", up[0]),
            ("diag", down[0]),
            ("singular", down[0]),
        ):
            if role in shapes and prod(shapes[role]) != wanted:
                return f"{role} {list(shapes[role])} should have {wanted} values"
    for a, b, core in _INNER.get(kind, ()):
        if a in shapes and b in shapes and core not in shapes and shapes[a][1] != shapes[b][0]:
            return f"{a} {list(shapes[a])} and {b} {list(shapes[b])} have different ranks"
    return None


def _fused_misfit(shapes: Mapping[str, tuple[int, ...]], enabled: list[bool]) -> str | None:
    """Factors that are not those of ``enabled`` blocks."""
    down, up, count = shapes.get("down"), shapes.get("up"), sum(enabled)
    if shapes.keys() != {"down", "up"} or down is None or up is None:
        return f"{', '.join(shapes)}: the merged-linear layout (enable_lora) has lora_A and lora_B alone"
    if len(down) != 2 or down[0] != count * up[1] or up[0] % count or any(n != 1 for n in up[2:]):
        return f"down {list(down)} and up {list(up)} are not those of {count} blocks (enable_lora)"
    return None


def _enabled(config: PeftConfig) -> list[bool]:
    """Which blocks of a fused weight the merged-linear layout of PEFT before 0.3 adapts; empty otherwise."""
    listed = config.raw.get("enable_lora")
    return [bool(one) for one in listed] if isinstance(listed, list) and any(listed) else []


def _module(path: str, kind: str, tensors: Mapping[str, TensorRef], config: PeftConfig) -> Module:
    if kind == "ia3":
        scale = tensors["scale"].shape
        # A matrix's is (1, in) or (out, 1); a convolution's (1, features, 1, 1) either way.
        telling = len(scale) == 2 and scale != (1, 1)
        feedforward = scale[0] == 1 if telling else config.feedforward_modules.matches(path)
        return Module(kind, tensors, None, None, None, scale, {"feedforward": feedforward})
    rank, alpha, scaling = effective_scaling(config, pattern_name(path, config))
    if kind == "adalora":
        return _adalora(tensors, rank, alpha)
    if kind in {"loha", "lokr"}:
        shape = _loha_shape(tensors) if kind == "loha" else _lokr_shape(tensors)
        stored = next((tensors[role].shape[0] for role in _RANK_FIRST if role in tensors), rank)
        options: dict[str, Any] = {} if stored == rank else {"config_rank": rank}
        if "right" in tensors and len(tensors["right"].shape) == 3:
            options["padded_kernel"] = True  # PEFT's own way with whole sides of a 1-d convolution
        return Module(kind, tensors, stored, alpha, scaling, shape, options)
    return _lora(path, dict(tensors), config, (rank, alpha, scaling))


def _lora(
    path: str, tensors: dict[str, TensorRef], config: PeftConfig, resolved: tuple[int, float, float]
) -> Module:
    rank, alpha, scaling = resolved
    options: dict[str, Any] = {}
    if "embedding_down" in tensors:
        tensors["down"], tensors["up"] = tensors.pop("embedding_down"), tensors.pop("embedding_up")
        options["embedding"] = True
    down, up = tensors["down"].shape, tensors["up"].shape
    stored = down[0]
    options |= _blocks(path, config)
    if path.endswith(INNER_PROJECTION) and adds_twice(config):
        scaling = 2 * scaling
    if config.target_parameters and stored != rank and stored % rank == 0 and up[-1:] == down[:1]:
        options["experts"] = stored // rank
        stored = rank
    if enabled := _enabled(config):  # the same delta as one pair: n times the rank, and so n times the alpha
        from loratools.formats.loralib import unfused

        tensors["up"] = unfused(tensors["up"], enabled)
        count = sum(enabled)
        rank, alpha, up = rank * count, alpha * count, tensors["up"].shape
        options |= {"blocks": count} if count > 1 else {}
    if isinstance(config.init, str) and config.init.lower() in {"pissa", "olora"}:
        options["init"] = config.init.lower()
    if "diag" in tensors:
        options["init"] = "kasa"
    kind = "dora" if "magnitude" in tensors else "lora"
    shape = _factored_shape(down, up, options)
    if stored != rank:
        options["config_rank"] = rank
    return Module(kind, tensors, stored, alpha, scaling, shape, options)


def adds_twice(config: PeftConfig) -> bool:
    """Whether the delta of an attention's output projection counts twice.

    PEFT up to 0.21 adds it twice, in every forward pass (so in training) as in merging; the model that was trained
    is the one with two (https://github.com/huggingface/peft/pull/3774).
    """
    numbers = re.findall(r"\d+", str(config.raw.get("peft_version") or ""))[:2]
    return tuple(map(int, numbers)) < (0, 22)


def _factored_shape(
    down: tuple[int, ...], up: tuple[int, ...], options: Mapping[str, Any]
) -> tuple[int, ...]:
    """Shape of up @ down with block-diagonal factors expanded and a kernel's dimensions kept."""
    return (up[0], down[1] * options.get("down_blocks", 1), *down[2:])


def _blocks(path: str, config: PeftConfig) -> dict[str, int]:
    """BD-LoRA: which factor is stored as the blocks of a block-diagonal matrix."""
    if config.block_diagonal is None:
        return {}
    last, blocks = path.rpartition(".")[2], config.block_diagonal.get("nblocks", 1)
    for role, names in (("down", "target_modules_bd_a"), ("up", "target_modules_bd_b")):
        if any(pattern in last for pattern in config.block_diagonal.get(names) or ()):
            return {f"{role}_blocks": blocks}
    return {}


def _adalora(tensors: Mapping[str, TensorRef], initial: int, alpha: float) -> Module:
    """AdaLoRA's scaling is alpha / (init_r + 1e-5): pruning leaves fewer ranks, none perhaps, and the same scaling."""
    rank = tensors["down"].shape[0]
    strength = alpha if alpha > 0 else float(rank)
    roles = {role: ref for role, ref in tensors.items() if role != "ranknum"}
    shape = (tensors["up"].shape[0], *tensors["down"].shape[1:])
    return Module("adalora", roles, rank, alpha, strength / (initial + 1e-5), shape)


def _loha_shape(tensors: Mapping[str, TensorRef]) -> tuple[int, ...]:
    left, right = tensors["first_a"].shape, tensors["first_b"].shape
    if "first_core" in tensors:  # a convolution: (rank, out), (rank, in) and the kernel in the core
        return (left[1], right[1], *tensors["first_core"].shape[2:])
    return (left[0], right[1])


def _lokr_shape(tensors: Mapping[str, TensorRef]) -> tuple[int, ...]:
    def side(which: str) -> tuple[int, ...]:
        if which in tensors:
            return tensors[which].shape
        left, right = tensors[f"{which}_a"].shape, tensors[f"{which}_b"].shape
        if f"{which}_core" in tensors:
            return (left[1], right[1], *tensors[f"{which}_core"].shape[2:])
        return (left[0], right[1])

    left, right = side("left"), side("right")
    return (left[0] * right[0], left[1] * right[1], *right[2:])


def layer_name(path: str) -> str:
    """The layer that PEFT wrapped, which is what its configuration speaks of."""
    return path.removesuffix(INNER_PROJECTION).replace(".base_layer", "")


def pattern_name(path: str, config: PeftConfig) -> str:
    """What PEFT matches patterns against: the layer, or layer.parameter for a targeted parameter."""
    bare = layer_name(path)
    if config.target_parameters:
        names = [p.rpartition(".") for p in config.target_parameters]
        mine = [last for owner, _, last in names if bare == owner or bare.endswith("." + owner)]
        if mine:
            depth = path.count(".base_layer")
            ordered = sorted(mine, key=_definition_order)
            return f"{bare}.{ordered[max(len(ordered) - 1 - depth, 0)]}"
    return bare


def _definition_order(parameter: str) -> tuple[int, str]:
    order = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    return (order.index(parameter) if parameter in order else len(order), parameter)


def _extra(ref: TensorRef, path: str, config: PeftConfig) -> Extra:
    tokens = _TOKENS.fullmatch(path)
    if tokens is not None:
        owner = tokens["path"]
        rows = next((rows for name, rows in config.token_indices.items() if _ends(owner, name)), ())
        return Extra(ref, f"{owner}.weight", "token_rows", "replaced token rows", rows)
    if any(part in path for part in _TRAINING_ONLY):
        return Extra(ref, path, "training_only", "used in training only")
    bare = (
        path.replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        .replace(".modules_to_save.", ".")
    )
    role, reason = _role(path, bare, config)
    return Extra(ref, bare, role, reason)


def _role(path: str, bare: str, config: PeftConfig) -> tuple[ExtraRole, str]:
    owner, _, last = bare.rpartition(".")
    if split_key(path) is not None:
        return "unclaimed", f"a {config.peft_type} adapter has no such tensor"
    if any(within(owner, name) for name in config.modules_to_save):
        return "replacement", "modules_to_save"
    if last == "bias" and config.bias in {"all", "lora_only"}:
        return "replacement", f"bias={config.bias}"
    if last == "weight" and path.endswith(".base_layer.weight"):
        return "base_copy", "the base embedding beside its LoRA"
    if last == "weight" and any(_ends(owner, name) for name in _EMBEDDINGS):
        return "replacement", SAVED_EMBEDDING
    if last == "weight" and config.tie_weights and config.modules_to_save:
        return "replacement", "tied to a module of modules_to_save"
    if last == "bias" and config.bias.endswith("_only"):
        return "replacement", f"bias={config.bias}"
    return "unclaimed", "no field of the configuration explains it"


def _ends(path: str, name: str) -> bool:
    return not name or path == name or path.endswith("." + name)


def within(path: str, name: str) -> bool:
    """Whether this module, or one it lies in, has a name that ends with ``name``: PEFT's rule, dot or no dot."""
    parts = path.split(".")
    return any(".".join(parts[: n + 1]).endswith(name) for n in range(len(parts)))


def with_blockwise(adapter: Adapter) -> Adapter:
    """The same adapter with the experts' B read expert-slowest, as unsloth packed it before 2026-09.

    The shapes are the same and no marker tells the two apart, so only the user can say.
    """
    modules = {
        name: replace(module, options={**module.options, "blockwise": True})
        if "experts" in module.options
        else module
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)
