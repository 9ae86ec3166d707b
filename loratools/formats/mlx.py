"""MLX adapters: ``adapters.safetensors`` (once ``adapters.npz``) and the training arguments in ``adapter_config.json``.

Linear layers and embeddings keep their factors transposed, experts keep theirs stacked and not transposed. ``scale`` is
the final multiplier, one for all modules, as is the rank. Facts: MLX-LM of 2026-08.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.errors import BadConfig, Unsupported
from loratools.formats.pairs import Pair, alike, commonest, folded, plain_pairs
from loratools.formats.peft_config import CONFIG_NAME
from loratools.formats.refusals import why_broken
from loratools.formats.registry import Written
from loratools.tensors.base import TensorRef
from loratools.tensors.pieces import slab
from loratools.tensors.views import placed, reshaped, stacked, transposed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from loratools.architectures.base import Architecture
    from loratools.tensors.base import TensorSource

__all__ = ["WEIGHTS_NAME", "read_mlx", "write_mlx"]

WEIGHTS_NAME = "adapters.safetensors"
ALL_LAYERS = -1  # of num_layers; modules are named in full, so that the number decides nothing
_HEAD = "lm_head"
_KEY = re.compile(r"(?P<path>.+)\.(?P<word>lora_a|lora_b|m)")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embedding", "embed_in")

# One expert of a checkpoint, and how MLX calls the stack of them.
_EXPERT = re.compile(r"(?P<owner>.+)\.experts\.(?P<index>\d+)\.(?P<part>\w+)")
_STACK = re.compile(r"(?P<owner>.+)\.switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MIXTRAL_OWNER = "block_sparse_moe"
_PARTS = ("gate_proj", "up_proj", "down_proj")

# Modules that MLX calls as Hugging Face does; of vision models, the language model is the outer name.
_KNOWN = re.compile(r"(?:language_model\.)?(?:model\.(?:layers\.\d+\..+|embed_tokens)|lm_head)")
_SPELLINGS = (
    (re.compile(r"(?:model\.)?language_model\.(?=layers\.|embed_tokens)"), "language_model.model."),
    (re.compile(r"(?=layers\.\d+\.|embed_tokens$)"), "model."),
)


# --- reading -----------------------------------------------------------------------------------------------


def read_mlx(
    name: str, source: TensorSource, raw_config: Mapping[str, Any], *, alpha: float | None = None
) -> Adapter:
    """Turn MLX's keys and training arguments into an adapter; reads no values.

    Args:
        name: what to call it in messages.
        source: the tensors.
        raw_config: ``adapter_config.json``, or empty.
        alpha: what a module is scaled by, over its rank, where no configuration says the scale.

    Raises:
        BadConfig: a field that decides the scale cannot be, or contradicts ``alpha``.
    """
    scale = _scale(name, raw_config)
    groups, extras = _grouped(source)
    modules: dict[str, Module] = {}
    broken: dict[str, str] = {}
    for path, roles in groups.items():
        problem = _problem(path, roles)
        if problem is not None:
            broken[path] = problem
            extras |= {ref.name: Extra(ref, path, "unclaimed", problem) for ref in roles.values()}
            continue
        for full, module in _modules(path, roles):
            rank = module.rank or 1
            said = alpha if alpha is not None else None if scale is None else scale * rank
            scaling = None if said is None else alpha / rank if alpha is not None else scale
            _require_silent(name, full, scale, scaling)
            modules[full] = replace(module, alpha=said, scaling=scaling)
    base = raw_config.get("model")
    return Adapter(
        name=name,
        format="mlx",
        modules=modules,
        config=AdapterConfig(None, base if isinstance(base, str) else None, dict(raw_config)),
        metadata=source.metadata,
        extras=extras,
        evidence="lora_a and lora_b" + (" and lora_parameters" if "lora_parameters" in raw_config else ""),
        kinds=tuple(sorted({module.kind for module in modules.values()})) or ("lora",),
        warnings=_warnings(raw_config, scale),
        refusal=_refusal(raw_config, modules) or why_broken(broken),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


def _scale(name: str, raw: Mapping[str, Any]) -> float | None:
    """The final multiplier, as the configuration gives it.

    Raises:
        BadConfig: it is no finite number.
    """
    parameters = raw.get("lora_parameters")
    if parameters is None:
        return None
    if not isinstance(parameters, dict):
        raise BadConfig(
            f"{name}: lora_parameters is not an object", hint="rank, scale and dropout stand in it"
        )
    value = parameters.get("scale")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadConfig(f"{name}: lora_parameters.scale is {value!r}, expected a number")
    return float(value)


def _require_silent(name: str, path: str, scale: float | None, scaling: float | None) -> None:
    if scale is not None and scaling is not None and not math.isclose(scale, scaling, rel_tol=1e-9):
        raise BadConfig(
            f"{name}: lora_parameters.scale is {scale:g}, and the alpha given makes it {scaling:g} for {path}",
            hint="leave the alpha out, or edit adapter_config.json",
        )


def _grouped(source: TensorSource) -> tuple[dict[str, dict[str, TensorRef]], dict[str, Extra]]:
    """The factors of each module by their word, and everything else."""
    groups: dict[str, dict[str, TensorRef]] = {}
    extras: dict[str, Extra] = {}
    for key in source.specs:
        ref, found = TensorRef(source, key), _KEY.fullmatch(key)
        if found is None:
            extras[key] = Extra(ref, key, "unclaimed", "no factor of an MLX LoRA")
        else:
            groups.setdefault(found["path"], {})[found["word"]] = ref
    return groups, extras


def _problem(path: str, roles: Mapping[str, TensorRef]) -> str | None:
    """Why these tensors make no module; None where they do."""
    if not {"lora_a", "lora_b"} <= roles.keys():
        return f"{', '.join(ref.name for ref in roles.values())} without the factor it belongs to"
    a, b = roles["lora_a"].shape, roles["lora_b"].shape
    if 0 in (*a, *b):
        return f"a factor is empty: lora_a {list(a)}, lora_b {list(b)}"
    if len(b) == 3:
        return _stack_problem(path, roles)
    if len(a) != 2 or len(b) != 2:
        return f"lora_a {list(a)} and lora_b {list(b)}, expected (in, rank) and (rank, out)"
    if a[1] != b[0]:
        return f"lora_a {list(a)} and lora_b {list(b)} have different ranks"
    wanted = a[0] if _is_embedding(path) else b[1]
    if "m" in roles and roles["m"].spec.count != wanted:
        return f"{roles['m'].name} {list(roles['m'].shape)} should have {wanted} values"
    return None


def _stack_problem(path: str, roles: Mapping[str, TensorRef]) -> str | None:
    """The same for stacked experts: (experts, rank, in), once (experts * rank, in), and (experts, out, rank)."""
    a, b = roles["lora_a"].shape, roles["lora_b"].shape
    if "m" in roles:
        return f"{roles['m'].name}: MLX has no DoRA of experts"
    if _STACK.fullmatch(path) is None:
        return f"{path}: stacked experts, and nothing says what they are called in Hugging Face's model"
    fits = a[:2] == (b[0], b[2]) if len(a) == 3 else len(a) == 2 and a[0] == b[0] * b[2]
    return None if fits else f"lora_a {list(a)} and lora_b {list(b)} do not fit as stacked experts"


def _is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in _EMBEDDINGS


def _modules(path: str, roles: Mapping[str, TensorRef]) -> Iterator[tuple[str, Module]]:
    """The modules of one path under Hugging Face's names: one, or one an expert."""
    a, b = roles["lora_a"], roles["lora_b"]
    if len(b.shape) == 3:
        count, out, rank = b.shape
        for index in range(count):
            down, up = slab(a, index, (rank, a.shape[-1])), slab(b, index, (out, rank))
            yield _expert_name(path, index), _module("lora", {"down": down, "up": up}, {})
        return
    tensors = {"down": transposed(a), "up": transposed(b)}
    options: dict[str, Any] = {"embedding": True} if _is_embedding(path) else {}
    if "m" not in roles:
        yield path, _module("lora", tensors, options)
        return
    if options:  # MLX norms an embedding's rows, PEFT its columns
        options["magnitude_axis"] = 1
    yield path, _module("dora", {**tensors, "magnitude": roles["m"]}, options)


def _module(kind: str, tensors: Mapping[str, TensorRef], options: Mapping[str, Any]) -> Module:
    down, up = tensors["down"], tensors["up"]
    return Module(kind, tensors, down.shape[0], None, None, (up.shape[0], down.shape[1]), options)


def _expert_name(path: str, index: int) -> str:
    found = _STACK.fullmatch(path)
    assert found is not None
    owner, part = found["owner"], found["part"]
    if owner.rpartition(".")[2] == _MIXTRAL_OWNER:
        part = next(name for name, plain in _MIXTRAL.items() if plain == part)
    return f"{owner}.experts.{index}.{part}"


def _warnings(raw: Mapping[str, Any], scale: float | None) -> tuple[str, ...]:
    parameters = raw.get("lora_parameters")
    alpha, rank = (parameters.get(key) if isinstance(parameters, dict) else None for key in ("alpha", "rank"))
    known = all(type(value) in (int, float) and value for value in (alpha, rank)) and scale is not None
    if known and not math.isclose(alpha / rank, scale or 0.0, rel_tol=1e-6):  # type: ignore[operator]
        return (f"lora_parameters says alpha {alpha} and scale {scale:g}: MLX multiplies by the scale alone",)
    return ()


def _refusal(raw: Mapping[str, Any], modules: Mapping[str, Module]) -> tuple[str, str] | None:
    """Why it cannot be computed with, and the way out; None where it can."""
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") is True else "lora")
    if kind == "full":
        return (
            "is a full fine-tune of MLX (fine_tune_type): whole weights, no LoRA",
            "mlx_lm.fuse makes a model of it",
        )
    if kind not in {"lora", "dora"}:
        return f"has fine_tune_type {kind!r}, which is neither lora nor dora", "edit adapter_config.json"
    bare = next((path for path, module in modules.items() if kind == "dora" and module.kind == "lora"), None)
    if bare is not None:
        return f"fine_tune_type is dora, and {bare} has no m", "set it to lora, if it is a plain LoRA"
    odd = next((path for path, module in modules.items() if module.options.get("magnitude_axis")), None)
    if odd is not None:
        return f"{odd} is MLX's DoRA of an embedding, which norms its rows", "keep it as an adapter"
    unscaled = next((path for path, module in modules.items() if module.scaling is None), None)
    if unscaled is not None:
        if "alpha" in raw and "rank" in raw:  # mlx-vlm: alpha itself before a fix, alpha / rank since
            hint = "its versions of mlx-vlm read alpha differently: --alpha says it (over the rank)"
        else:
            hint = "pass its adapter_config.json with --config, or --alpha (the scale times the rank)"
        return "nothing says its scale: no lora_parameters.scale", hint
    return None


# --- writing -----------------------------------------------------------------------------------------------


def write_mlx(
    adapter: Adapter,
    architecture: Architecture | None = None,
    *,
    base_config: Mapping[str, Any] | None = None,
) -> Written:
    """An adapter as MLX-LM loads it. Reads values only where a scale must be folded into a factor.

    Smaller ranks are padded with zeros, since MLX has one rank; of several scales the commonest is written, and the
    others are folded into ``lora_b``, exactly where the ratio is a power of two.

    Args:
        adapter: of a language model, under Hugging Face's names.
        architecture: not needed.
        base_config: the base's ``config.json``: whether its embeddings are tied.

    Raises:
        Unsupported: none of its modules can be written, or nothing says a scale.
    """
    del architecture
    pairs, lost = plain_pairs(adapter, dora=True)
    named, unknown = _named(pairs)
    lost |= unknown
    tied = _tied(base_config)
    if tied:
        for path in [path for path in named if path.rpartition(".")[2] == _HEAD]:
            del named[path]
            lost |= {
                name: "the base's embeddings are tied: its model in MLX has no lm_head, and refuses to load one"
                for name in pairs
                if _spelled(name) == path
            }
    if not named:
        raise Unsupported(f"{adapter.name}: none of its modules can be written for MLX", hint=_first(lost))
    scale = commonest(pair.scaling for members in named.values() for pair in members)
    rank = max(pair.rank for members in named.values() for pair in members)
    tensors: dict[str, TensorRef] = {}
    for path, members in named.items():
        tensors |= _tensors(path, [_common(pair, scale, rank) for pair in members])
    dora = {pair.magnitude is not None for members in named.values() for pair in members}
    if len(dora) > 1:
        bare = next(path for path, members in named.items() if members[0].magnitude is None)
        raise Unsupported(
            f"{adapter.name}: {bare} is a plain LoRA beside DoRA modules, and MLX has one kind for all",
            hint="merge it into the base, and extract a LoRA from the two",
        )
    config = _config(adapter, tuple(named), rank, scale, dora=dora == {True})
    files, warnings = {CONFIG_NAME: config}, _doubts(named, tied)
    return Written(tensors, {"format": "mlx"}, files, WEIGHTS_NAME, lost, warnings)


def _tied(config: Mapping[str, Any] | None) -> bool | None:
    """Whether input and output embedding of a base are one weight; None where nothing says so."""
    if not config:
        return None
    text = config.get("text_config")
    for section in (text if isinstance(text, dict) else {}, config):
        if isinstance(section.get("tie_word_embeddings"), bool):
            return bool(section["tie_word_embeddings"])
        if str(section.get("model_type")).startswith("gemma"):  # MLX has no other
            return True
    return None


def _doubts(paths: Iterable[str], tied: bool | None) -> tuple[str, ...]:
    """What MLX does otherwise than PEFT with the embeddings of a base that are tied, or may be."""
    last = {path.rpartition(".")[2]: path for path in paths}
    embedding = next((last[word] for word in _EMBEDDINGS if word in last), None)
    if tied is False:
        return ()
    found = []
    whether = "" if tied else "if the base's embeddings are tied, "
    if embedding is not None:
        found.append(
            f"{embedding}: {whether}MLX adds it to the output embedding too, and PEFT to the input alone: "
            "the model computes something else"
        )
    if _HEAD in last:
        found.append(
            f"{last[_HEAD]}: {whether}MLX has no such module and refuses the adapter: --base says it"
        )
    return tuple(found)


def _first(lost: Mapping[str, str]) -> str | None:
    return next((f"{name}: {reason}" for name, reason in lost.items()), None)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The experts of one stack, by index."""

    members: dict[int, Pair]
    names: dict[int, str]


def _named(pairs: Mapping[str, Pair]) -> tuple[dict[str, list[Pair]], dict[str, str]]:
    """The pairs by MLX's names, several where experts are stacked; and those it has no name for."""
    named: dict[str, list[Pair]] = {}
    lost: dict[str, str] = {}
    stacks: dict[str, _Stack] = {}
    for name, pair in pairs.items():
        path = _spelled(name)
        expert = _EXPERT.fullmatch(path)
        part = None if expert is None else _MIXTRAL.get(expert["part"], expert["part"])
        if _KNOWN.fullmatch(path) is None or (expert is not None and part not in _PARTS):
            lost[name] = (
                "MLX may call it otherwise: only decoder layers, embed_tokens and lm_head are known by name"
            )
        elif expert is None:
            named[path] = [pair]
        else:
            stack = stacks.setdefault(f"{expert['owner']}.switch_mlp.{part}", _Stack({}, {}))
            stack.members[int(expert["index"])], stack.names[int(expert["index"])] = pair, name
    for path, stack in stacks.items():
        reason = _why_not_stacked(stack.members)
        if reason is None:
            named[path] = [stack.members[index] for index in sorted(stack.members)]
        else:
            lost |= dict.fromkeys(stack.names.values(), reason)
    return named, lost


def _spelled(name: str) -> str:
    """A module's name as MLX's own models have it.

    >>> _spelled("model.language_model.layers.3.mlp.up_proj"), _spelled("layers.3.mlp.up_proj")
    ('language_model.model.layers.3.mlp.up_proj', 'model.layers.3.mlp.up_proj')
    """
    for pattern, put in _SPELLINGS:
        if pattern.match(name):
            return pattern.sub(put, name, count=1)
    return name


def _why_not_stacked(members: Mapping[int, Pair]) -> str | None:
    missing = next((index for index in range(len(members)) if index not in members), None)
    if missing is not None:
        return f"MLX stacks all experts, and expert {missing} has no factors"
    if any(pair.magnitude is not None for pair in members.values()):
        return "MLX has no DoRA of experts"
    if len({(pair.down.shape[1], pair.up.shape[0]) for pair in members.values()}) > 1:
        return "MLX stacks all experts, and they have different shapes"
    return None


def _common(pair: Pair, scale: float, rank: int) -> Pair:
    """A pair under the scale and the rank of all."""
    up, down = pair.up, pair.down
    if not math.isclose(pair.scaling, scale, rel_tol=1e-12):
        up = folded(up, pair.scaling / scale)
    if pair.rank != rank:
        down = placed([down], [(0, 0)], (rank, down.shape[1]))
        up = placed([up], [(0, 0)], (up.shape[0], rank))
    return replace(pair, down=down, up=up, scaling=scale)


def _tensors(path: str, members: list[Pair]) -> dict[str, TensorRef]:
    if _STACK.fullmatch(path):
        return {
            f"{path}.lora_a": stacked(alike(pair.down for pair in members)),
            f"{path}.lora_b": stacked(alike(pair.up for pair in members)),
        }
    (pair,) = members
    tensors = {f"{path}.lora_a": transposed(pair.down), f"{path}.lora_b": transposed(pair.up)}
    if pair.magnitude is not None:
        tensors[f"{path}.m"] = reshaped(pair.magnitude, (pair.up.shape[0],))
    return tensors


def _config(adapter: Adapter, keys: tuple[str, ...], rank: int, scale: float, *, dora: bool) -> bytes:
    """What MLX-LM's loader reads. Modules are named in full, which means the same whatever ``num_layers`` is."""
    parameters = {"rank": rank, "scale": scale, "alpha": scale * rank, "dropout": 0.0, "keys": sorted(keys)}
    document: dict[str, Any] = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": ALL_LAYERS,
        "lora_parameters": parameters,
    }
    if adapter.config.base_model is not None:
        document["model"] = adapter.config.base_model
    return (json.dumps(document, indent=4, ensure_ascii=False, sort_keys=True) + "\n").encode()
