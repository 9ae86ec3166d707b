"""Files that PEFT's reader does not claim: handed to the reader of their dialect, or named for what they are.

What is no adapter is told first, by keys that nothing else has; then the names and the factors decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, AdapterConfig, Extra
from loratools.errors import AmbiguousFormat
from loratools.formats.dialects import BARE, is_bare
from loratools.formats.numbered import numbered_keys
from loratools.formats.suffixes import split_key
from loratools.tensors.base import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loratools.tensors.base import TensorSource

__all__ = ["NO_ADAPTERS", "Sign", "only_recognised", "recognise"]


@dataclass(frozen=True, slots=True)
class Sign:
    """A kind of file that holds no delta of weights, and the key that gives it away.

    Attributes:
        format: what to call it.
        kind: the same, in words.
        pattern: which no key of an adapter fits.
        what: the evidence, in words.
        instead: what to do with it.
    """

    format: str
    kind: str
    pattern: re.Pattern[str]
    what: str
    instead: str = "an adapter has pairs of factors in it"


def _sign(form: str, kind: str, pattern: str, what: str, *instead: str) -> Sign:
    return Sign(form, kind, re.compile(pattern), what, *instead)


_CONFIG = "pass its adapter_config.json with --config"
# In this order: the first that fits any key wins.
NO_ADAPTERS = (
    _sign("unilora", "unilora", r".*unilora_theta_d", "a Uni-LoRA vector"),
    _sign("finegates", "finegates", r".*\.finegates_\w+", "FineGates gates"),
    _sign("lllite", "lllite", r"lllite_.*", "ControlNet-LLLite", "load it as a ControlNet"),
    _sign("control-lora", "control-lora", r"lora_controlnet", "a ControlNet stored as low-rank factors",
          "load it as a ControlNet"),
    _sign("controlnet", "controlnet", r"(?:control_model\.|controlnet_).*", "a ControlNet"),
    _sign("ip-adapter", "ip-adapter", r"(?:image_proj|ip_adapter)\..*", "an IP-Adapter", "load it as an IP-Adapter"),
    _sign(BARE, "ia3", r".*\.ia3_l(?:\.[^.]+)?", "IA3 vectors without their configuration", _CONFIG),
)  # fmt: skip
# Only where there are no factors: an adapter may carry such tensors along.
_WITHOUT_FACTORS = (
    _sign(BARE, "soft prompt", r"prompt_embeddings|prompt_encoder\..*", "a soft prompt", _CONFIG),
    _sign(BARE, "another PEFT type", r"base_model\.model\..*", "PEFT's prefix, without its configuration", _CONFIG),
    _sign("textual-inversion", "textual inversion", r"emb_params|clip_[lg]|string_to_param.*|bundle_emb\..*|<.*>",
          "an embedding", "load it as an embedding"),
    _sign("hypernetwork", "hypernetwork", r"(?:320|640|768|1024|1280)(?:\..*)?", "layers by their width"),
)  # fmt: skip
_LEFTOVERS = (".alpha", ".dropout_p", ".lora_alpha", ".scaling")
_MLX = re.compile(r"(?P<path>.+)\.lora_a")


# What is an adapter, and too little of one.
_UNFINISHED = (
    _sign("sam-lora", "lora", "", "Segment Anything's numbering (w_a_000)"),
    _sign("nameless", "lora", "", "a list of tensors without names: shown, and not computed with"),
    _sign(
        BARE,
        "lora",
        "",
        "PEFT's factors without their configuration: --config or --alpha says what is missing",
    ),
    _sign("stripped", "an adapter without its factors", "", "alphas alone"),
    _sign("full-model", "full model", "", "weights, and no factors"),
)


def only_recognised() -> tuple[Sign, ...]:
    """What is named for what it is, and not computed with as it is."""
    return (*_UNFINISHED, *NO_ADAPTERS, *_WITHOUT_FACTORS)


def recognise(
    name: str,
    source: TensorSource,
    config: Mapping[str, Any],
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> Adapter:
    """Read a file by its keys, or say what it is.

    Args:
        name: what to call it.
        source: its header.
        config: the JSON beside it, or empty.
        alpha: what the user says the modules are scaled by, over their rank.
        enable_lora: which parts of a fused weight the file has factors for, where only the user knows.

    Raises:
        AmbiguousFormat: two dialects claim it.
        BadConfig: what the user says contradicts the file.
    """
    keys = source.specs
    sign = _first(NO_ADAPTERS, keys)
    if sign is not None:
        return _stranger(name, source, config, sign)
    claims = _claims(source)
    if len(claims) > 1:
        told = " and ".join(f"{form} by {key}" for form, key in claims.items())
        raise AmbiguousFormat(f"{name} is {told}", hint="split it into a file for each")
    if "mlx" in claims:
        from loratools.formats.mlx import read_mlx

        return read_mlx(name, source, config, alpha=alpha)
    if "loralib" in claims:
        from loratools.formats.loralib import read_loralib

        return read_loralib(name, source, alpha=alpha, enable_lora=enable_lora)
    if claims:
        from loratools.formats.reading import read_dialect

        return read_dialect(name, source, config, alpha=alpha)
    return _stranger(name, source, config, _first(_WITHOUT_FACTORS, keys) or _unnamed(keys))


def _first(signs: Iterable[Sign], keys: Iterable[str]) -> Sign | None:
    return next((sign for sign in signs if any(map(sign.pattern.fullmatch, keys))), None)


def _claims(source: TensorSource) -> dict[str, str]:
    """Who would read the file, and a key that says so. The dialects of image models count as one."""
    keys, claims = source.specs, dict[str, str]()
    for key in keys:
        if (found := _MLX.fullmatch(key)) and f"{found['path']}.lora_b" in keys:
            claims["mlx"] = key
            break
    bare = _is_loralib(source)
    for key in keys:
        if bare and key.endswith((".lora_A", ".lora_B")):
            claims.setdefault("loralib", key)
        elif _is_factor(source, key):
            claims.setdefault("another dialect", key)
    numbered = numbered_keys(source)
    if not claims and numbered is not None and numbered[0]:
        claims["another dialect"] = next(iter(numbered[0]))
    return claims


def _is_loralib(source: TensorSource) -> bool:
    """Both factors without ``.weight``, as loralib saves them; PEFT's AdaLoRA and Mochi's LoRAs have that, too."""
    keys = source.specs
    paired = any(key.endswith(".lora_A") and f"{key.removesuffix('A')}B" in keys for key in keys)
    return paired and not any(key.endswith(".lora_E") for key in keys) and is_bare(source, prefixed=False)


def _is_factor(source: TensorSource, key: str) -> bool:
    """Whether a key is a factor's by its suffix; GLoRA's words may be a model's own, so that all four must be there."""
    found = split_key(key)
    if found is None:
        return False
    if found.family == "glora":
        return all(f"{found.stem}.{word}.weight" in source.specs for word in ("a1", "a2", "b1", "b2"))
    return bool(found.family) or found.role == "diff_bias"


def _stranger(name: str, source: TensorSource, config: Mapping[str, Any], sign: Sign) -> Adapter:
    refs = [TensorRef(source, key) for key in source.specs]
    base = config.get("base_model_name_or_path") or config.get("model")
    return Adapter(
        name=name,
        format=sign.format,
        modules={},
        config=AdapterConfig(None, base if isinstance(base, str) else None, dict(config)),
        metadata=source.metadata,
        extras={ref.name: Extra(ref, ref.name, "unclaimed", "not part of a module") for ref in refs},
        evidence=sign.what,
        kinds=(sign.kind,),
        warnings=(f"no LoRA: {sign.kind} ({sign.what})",),
        refusal=_refusal(sign),
        tensors=tuple(refs),
    )


def _refusal(sign: Sign) -> tuple[str, str]:
    if sign.format == BARE:
        return f"{sign.what}: nothing says how it is scaled", sign.instead
    return f"is no adapter: {sign.kind} ({sign.what})", sign.instead


def _unnamed(keys: Mapping[str, object]) -> Sign:
    if keys and all(name.endswith(_LEFTOVERS) for name in keys):
        what = f"{len(keys)} scalars such as {next(iter(keys))}"
        return _sign("stripped", "an adapter without its factors", "", what)
    weights = [name for name in keys if name.endswith((".weight", ".bias"))]
    evidence = f"{len(keys)} tensors, none of them a factor"
    if len(weights) >= max(2, len(keys) // 2):
        return _sign("full-model", "full model", "", evidence)
    return _sign("unknown", "unknown", "", evidence)
