"""Files of other formats, named for what they are. This build reads their headers; it computes with PEFT alone.

Each :class:`Sign` is a pattern that only one dialect's keys fit. Factors are grouped by their suffixes so that ranks
and shapes can be shown; where what scales them lies in a tensor, it stays unread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loratools.tensors.base import TensorSource

__all__ = ["LORA_FORMATS", "SIGNS", "Sign", "recognise"]


@dataclass(frozen=True, slots=True)
class Sign:
    """A format, the kind of thing it holds, and the key that gives it away."""

    format: str
    kind: str
    pattern: re.Pattern[str]
    what: str


def _sign(form: str, kind: str, pattern: str, what: str) -> Sign:
    return Sign(form, kind, re.compile(pattern), what)


_BARE = "PEFT factors without their configuration"
# In this order: the first that fits any key wins.
SIGNS = (
    _sign("unilora", "unilora", r".*unilora_theta_d", "a Uni-LoRA vector"),
    _sign("finegates", "finegates", r".*\.finegates_\w+", "FineGates gates"),
    _sign("lllite", "lllite", r"lllite_.*", "ControlNet-LLLite"),
    _sign("bare-peft", "ia3", r".*\.ia3_l(?:\.[^.]+)?", "IA3 vectors without their configuration"),
    _sign("bare-peft", "adalora", r".*\.lora_E(?:\.[^.]+)?", "AdaLoRA factors without their configuration"),
    _sign("bare-peft", "loha", r"base_model\.model\..*\.hada_\w+", _BARE),
    _sign("bare-peft", "lokr", r"base_model\.model\..*\.lokr_\w+", _BARE),
    _sign("lycoris", "lokr", r".*\.lokr_\w+", "LyCORIS LoKr factors"),
    _sign("lycoris", "loha", r".*\.hada_\w+", "LyCORIS LoHa factors"),
    _sign("lycoris", "oft", r".*\.oft_(?:blocks|diag|R\.weight)", "OFT blocks"),
    _sign("kohya", "lora", r"lora_(?:unet|te\d?|prior_\w+|transformer)_+.*\.lora_down\.weight", "kohya names"),
    _sign("xlabs", "lora", r".*\.processor\.(?:qkv|proj)_lora\d?\.down\.weight", "XLabs Flux names"),
    _sign("diffusers", "lora", r".*(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight", "diffusers names"),
    _sign("comfy", "lora", r"diffusion_model\..*\.lora_(?:A|down)\.weight", "ComfyUI names"),
    _sign(
        "diffusers", "lora", r"(?:unet|transformer|text_encoder)(?:_\d)?\..*\.lora_A\.weight",
        "diffusers names, PEFT factors",
    ),
    _sign("kohya", "lora", r".*\.lora_down\.weight", "kohya factors under dotted names"),
    _sign("cloneofsimo", "lora", r"(?:unet|text_encoder):\d+:(?:up|down)", "cloneofsimo numbering"),
    _sign("mlx", "lora", r".*\.lora_a", "MLX factors"),
    _sign("loralib", "lora", r".*\.lora_A", "loralib factors"),
    _sign("bare-peft", "lora", r".*\.lora_(?:embedding_A|A(?:\.[^.]+)?\.weight)", _BARE),
    _sign("sam-lora", "lora", r"w_a_\d+", "SAM LoRA numbering"),
    _sign("bare-peft", "soft prompt", r"prompt_embeddings|prompt_encoder\..*", "a soft prompt"),
    _sign("bare-peft", "another PEFT type", r"base_model\.model\..*", "PEFT's prefix, without its configuration"),
    _sign("textual-inversion", "textual inversion", r"emb_params|clip_[lg]|string_to_param.*|<.*>", "an embedding"),
    _sign("nameless", "lora", r"\d+", "a list of tensors without names"),
)  # fmt: skip
LORA_FORMATS = frozenset(sign.format for sign in SIGNS if sign.kind in {"lora", "lokr", "loha"}) - {
    "bare-peft"
}

# Suffix of a key -> its role in the module before it. A factor in capitals comes as (in, rank) or (rank, out).
_SUFFIXES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_embedding_A": "down", ".lora_embedding_B": "up",
    ".down.weight": "down", ".up.weight": "up",
    ".lora_A": "down", ".lora_B": "up", ".lora_E": "singular",
    ".lora_a": "DOWN", ".lora_b": "UP",
    ":down": "down", ":up": "up",
    ".alpha": "alpha", ":alpha": "alpha",
    ".dora_scale": "magnitude", ".lora_magnitude_vector": "magnitude", ".m": "magnitude",
    ".hada_w1_a": "first_a", ".hada_w1_b": "first_b", ".hada_w2_a": "second_a", ".hada_w2_b": "second_b",
    ".hada_t1": "first_core", ".hada_t2": "second_core",
    ".lokr_w1": "left", ".lokr_w1_a": "left_a", ".lokr_w1_b": "left_b",
    ".lokr_w2": "right", ".lokr_w2_a": "right_a", ".lokr_w2_b": "right_b", ".lokr_t2": "right_core",
}  # fmt: skip
_LONGEST_FIRST = sorted(_SUFFIXES, key=len, reverse=True)
_NUMBERED = re.compile(r"w_(?P<role>[ab])_(?P<stem>\d+)")
_LEFTOVERS = (".alpha", ".dropout_p", ".lora_alpha", ".scaling")


def recognise(
    name: str, source: TensorSource, config: Mapping[str, Any], *, alpha: float | None = None
) -> Adapter:
    """Say what a file is that PEFT's reader does not claim.

    Args:
        name: what to call it.
        source: its header.
        config: the JSON beside it, or empty.
        alpha: what the user says the modules are scaled by, over their rank.
    """
    sign = next((s for s in SIGNS if any(map(s.pattern.fullmatch, source.specs))), None)
    modules = {} if sign is None else dict(_modules(source, sign, _scale(config), alpha))
    claimed = {ref.name for module in modules.values() for ref in module.tensors.values()}
    reason = "not part of a module this build reads"
    extras = {
        key: Extra(TensorRef(source, key), key, "unclaimed", reason)
        for key in source.specs
        if key not in claimed
    }
    if sign is None:
        form, kind, evidence = _stranger(source.specs)
    else:
        form, kind, evidence = sign.format, sign.kind, sign.what
    base = config.get("base_model_name_or_path") or config.get("model")
    return Adapter(
        name=name,
        format=form,
        modules=modules,
        config=AdapterConfig(None, base if isinstance(base, str) else None, dict(config)),
        metadata=source.metadata,
        extras=extras,
        evidence=evidence,
        kinds=tuple(sorted({module.kind for module in modules.values()})) or (kind,),
        warnings=() if form in LORA_FORMATS else (f"not a LoRA this build reads: {kind} ({evidence})",),
        refusal=_refusal(form, kind, evidence),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


_BARE_HINT = dict.fromkeys(
    ("lora", "loha", "lokr"),
    "pass its adapter_config.json with --config, or the alpha it was trained with, with --alpha",
)


def _refusal(form: str, kind: str, evidence: str) -> tuple[str, str]:
    if form == "bare-peft":
        return f"{evidence}: nothing says how it is scaled", _BARE_HINT.get(
            kind, "pass its adapter_config.json with --config"
        )
    if form in LORA_FORMATS:
        return (
            f"is a LoRA in format {form} ({evidence})",
            "this build computes with PEFT adapters only: export it as one with the tool that trained it",
        )
    return f"is no adapter: {kind} ({evidence})", "an adapter has pairs of factors in it"


def _scale(config: Mapping[str, Any]) -> float | None:
    """The factor MLX writes down; it multiplies the delta as it is."""
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    return float(scale) if known and scale is not None else None


def _modules(
    source: TensorSource, sign: Sign, scale: float | None, alpha: float | None
) -> Iterator[tuple[str, Module]]:
    groups = _pairs_in_order(source) if sign.format == "nameless" else _by_stem(source)
    for stem, tensors in groups.items():
        described = _describe({role: ref.shape for role, ref in tensors.items()})
        if described is None:
            continue
        kind, rank, shape = described
        said, scaling = None, None
        if alpha is not None and rank:
            said, scaling = alpha, alpha / rank
        elif sign.format == "mlx" and scale is not None and rank:
            said, scaling = scale * rank, scale
        roles = {role.lower(): ref for role, ref in tensors.items()}
        yield stem, Module(kind, roles, rank, said, scaling, shape)


def _by_stem(source: TensorSource) -> dict[str, dict[str, TensorRef]]:
    groups: dict[str, dict[str, TensorRef]] = {}
    for key in source.specs:
        numbered = _NUMBERED.fullmatch(key)
        if numbered:
            stem, role = numbered["stem"], "down" if numbered["role"] == "a" else "up"
        else:
            suffix = next((s for s in _LONGEST_FIRST if key.endswith(s)), None)
            if suffix is None:
                continue
            stem, role = key.removesuffix(suffix), _SUFFIXES[suffix]
        groups.setdefault(stem, {})[role] = TensorRef(source, key)
    return groups


def _pairs_in_order(source: TensorSource) -> dict[str, dict[str, TensorRef]]:
    """A list that holds up and down in turns, as cloneofsimo's first trainer wrote it."""
    refs = [TensorRef(source, str(i)) for i in range(len(source.specs)) if str(i) in source.specs]
    return {
        str(i // 2): {"up": refs[i], "down": refs[i + 1]}
        for i in range(0, len(refs) - 1, 2)
        if len(refs[i].shape) > 1 and len(refs[i + 1].shape) > 1 and refs[i].shape[1] == refs[i + 1].shape[0]
    }


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int | None, tuple[int, ...]] | None:
    """Kind, rank and the delta's shape; None where the roles make no module."""
    if any(not shape or 0 in shape for role, shape in shapes.items() if role not in {"alpha", "magnitude"}):
        return None
    dora = "magnitude" in shapes
    if {"down", "up"} <= shapes.keys():
        down, up = shapes["down"], shapes["up"]
        if len(down) == 1:  # rank 1, stored as vectors
            return "lora", 1, (up[0], down[0])
        kernel = shapes["mid"][2:] if "mid" in shapes else down[2:]
        kind = "adalora" if "singular" in shapes else "dora" if dora else "lora"
        return kind, down[0], (up[0], down[1], *kernel)
    if {"DOWN", "UP"} <= shapes.keys():
        down, up = shapes["DOWN"], shapes["UP"]
        return "dora" if dora else "lora", down[-1], (up[-1], down[0])
    if {"first_a", "first_b", "second_a", "second_b"} <= shapes.keys():
        left, right = shapes["first_a"], shapes["first_b"]
        core = shapes.get("first_core")
        return "loha", right[0], ((left[0], right[-1]) if core is None else (left[1], right[-1], *core[2:]))
    return _describe_kronecker(shapes)


def _describe_kronecker(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[str, int | None, tuple[int, ...]] | None:
    sides = []
    for side in ("left", "right"):
        if side in shapes:
            sides.append(shapes[side])
        elif {f"{side}_a", f"{side}_b"} <= shapes.keys():
            a, b, core = shapes[f"{side}_a"], shapes[f"{side}_b"], shapes.get(f"{side}_core")
            sides.append((a[0], *b[1:]) if core is None else (a[1], b[1], *core[2:]))
    if len(sides) < 2 or any(len(side) < 2 for side in sides):
        return None
    left, right = sides
    rank = next((shapes[role][0] for role in ("right_b", "left_b") if role in shapes), None)
    return "lokr", rank, (left[0] * right[0], left[1] * right[1], *right[2:])


def _stranger(specs: Mapping[str, object]) -> tuple[str, str, str]:
    if specs and all(name.endswith(_LEFTOVERS) for name in specs):
        return (
            "stripped",
            "an adapter without its factors",
            f"{len(specs)} scalars such as {next(iter(specs))}",
        )
    weights = [name for name in specs if name.endswith((".weight", ".bias"))]
    evidence = f"{len(specs)} tensors, none of them a factor"
    if len(weights) >= max(2, len(specs) // 2):
        return "full-model", "full model", evidence
    return "unknown", "unknown", evidence
