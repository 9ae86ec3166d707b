"""Which tool's names a file has, and each module's name as the tables of architectures know it.

A name says nothing of the kind of module, and nothing of the model: those are asked separately.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import AmbiguousFormat
from loratools.formats.suffixes import split_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.formats.suffixes import Key
    from loratools.tensors.base import TensorSource

__all__ = ["BARE", "Names", "is_bare", "name_modules", "plain_stem"]

BARE = "bare-peft"  # PEFT's factors, under names that belong to no diffusion model
_PEFT = "base_model.model."
_PEFT_SUFFIXES = {
    ".lora_A.weight", ".lora_B.weight", ".lora_A", ".lora_B", ".lora_E", ".lora_embedding_A", ".lora_embedding_B",
    ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
}  # fmt: skip
_FLAT = re.compile(
    r"lora_(?:unet|te\d?|prior_unet|prior_te|transformer)[_.]|lycoris_|oft_unet_|Hunyuan_video_I2V_lora_"
)
_ONETRAINER = re.compile(r"lora_(?:transformer|prior_unet|prior_te)_")
_NEUTRAL = re.compile(r"lora_te\d?_")
_RENAMED = {"lycoris_": "lora_unet_", "oft_unet_": "lora_unet_", "Hunyuan_video_I2V_lora_": "lora_unet_"}
_COMFY = re.compile(r"(?:model\.)?diffusion_model\.|text_encoders\.[a-z0-9_]+\.")
_PIPELINE = re.compile(
    r"(?:unet|transformer(?:_\d)?|text_encoder(?:_\d)?|text_conditioner|prior|controlnet|vae)\."
)
# Language models that have a module called transformer, too.
_LANGUAGE = re.compile(
    r"transformer\.(?:h|wte|wpe|word_embeddings|encoder|embedding|output_layer)\b"
    r"|transformer\.layers?\.\d+\.(?!attn\.to_|attention\.to_|feed_forward\.|adaLN)"
    r"|transformer\.blocks\.\d+\.(?:attn\.(?:Wqkv|out_proj)|ffn\.(?:up|down)_proj|norm_attn_norm)"
)
_DIFFUSERS_UNET = re.compile(
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:attentions|resnets|motion_modules|downsamplers|upsamplers)\."
)
_DIFFUSERS_DIT = re.compile(
    r"(?:\w+_)?transformer_blocks\.\d+\.|layers\.\d+\.attention\.to_(?:q|k|v|out)\b"
    r"|blocks\.\d+\.(?:attn[12]\.(?:to_|add_)|ffn\.net\.)"
)
_NATIVE = re.compile(
    r"(?:double|single|joint)_(?:stream_)?blocks\.\d+\.|(?:input|output)_blocks\.\d+\.|middle_block\.\d+\."
    r"|(?:vace_)?blocks\.\d+\.(?:(?:self_attn|cross_attn|adaln_modulation\w*)\.|ffn\.\d)"
    r"|blocks\.\d+\.attn\.(?:wq|wk|wv|wo|gate)\b"
    r"|layers\.\d+\.(?:attention\.(?:qkv|out)|adaLN_modulation\.\d+)\b|(?:context|noise)_refiner\.\d+\."
    r"|(?:txtfusion|text_fusion)\."
)
# What the original code of some families wraps its model in; and where text encoders lie in single files.
_WRAPPED = re.compile(
    r"^(?:(?:net|model(?:\.model)?)\.(?=(?:double|single)_blocks\.)|net\.(?=blocks\.|llm_adapter\.))"
)
_WRAPPER = re.compile(r"^(?:net|model(?:\.model)?)\.")
_TEXT = re.compile(r"(?:clip_[lgh]|t5xxl|cond_stage_model|conditioner|text_encoders?(?:_\d)?)\.")
_XLABS = re.compile(r"_blocks\.\d+\.processor\.(?:qkv|proj)_lora\d?$")
_TEXT_PROJECTION = re.compile(r"(?P<head>.*\.self_attn)\.to_(?P<which>q|k|v|out)")


@dataclass(frozen=True, slots=True)
class Names:
    """What the names of a file's modules say.

    Attributes:
        format: the dialect; :data:`BARE` where they are no diffusion model's.
        evidence: the key that decided, and why.
        modules: by the file's stem, the name the architectures' tables take.
        warnings: where some of the names are another dialect's.
    """

    format: str
    evidence: str
    modules: Mapping[str, str]
    warnings: tuple[str, ...] = ()


# Claims by vocabulary alone, which a majority of others overrules: a name without a prefix is its file's.
_WEAK = ("", "native", "diffusers' words")
_WHAT = {
    "kohya": "kohya's flattened names",
    "onetrainer": "OneTrainer's prefixes",
    "comfy": "the original code's names, under ComfyUI's prefix",
    "native": "the original code's names, without a prefix",
    "diffusers": "diffusers' names",
    "diffusers' words": "diffusers' names, without a prefix",
    "xlabs": "XLabs' attention processors",
    "bfl-control": "the original code's names, with biases beside the factors",
    BARE: "PEFT's factors under names of no known diffusion model",
}


def is_bare(source: TensorSource, *, prefixed: bool = True) -> bool:
    """Whether the factors in a file are PEFT's and no module's name is one of a diffusion model.

    Args:
        source: the file.
        prefixed: whether PEFT's own prefix may stand before the names.
    """
    stems = {
        found.stem: found for key in source.specs if (found := split_key(key)) is not None and found.family
    }
    if not prefixed and any(stem.startswith(_PEFT) for stem in stems):
        return False
    return not any(_claim(plain_stem(stem), found) for stem, found in stems.items())


def name_modules(keys: Mapping[str, Key], *, whole: str = "the file") -> Names:
    """Decide whose names these are: each module is asked, and the majority is the file's dialect.

    Args:
        keys: by key, what it is made of.
        whole: what to call the file.

    Raises:
        AmbiguousFormat: as many modules speak for one dialect as for another.
    """
    if not keys:
        return Names(BARE, "no factors", {})
    first: dict[str, str] = {}
    for key, parts in keys.items():
        first.setdefault(parts.stem, key)
    claims = {stem: _claim(plain_stem(stem), keys[key]) for stem, key in first.items()}
    votes = Counter(claim for claim in claims.values() if claim)
    form = _elected(votes, claims, first, keys, whole)
    if form == "native":
        form = _control(keys) or "comfy"
    alike = [stem for stem, claim in claims.items() if claim and _family(claim) == _family(form)]
    decider = next((stem for stem in alike if claims[stem] == form), (alike or list(first))[0])
    what = _WHAT[form if form == "bfl-control" else claims[decider] or form]
    home = "unet." if any(_DIFFUSERS_UNET.match(plain_stem(stem)) for stem in first) else "transformer."
    others = {
        claim: stem
        for stem, claim in claims.items()
        if claim not in _WEAK and _family(claim) != _family(form)
    }
    return Names(
        form,
        f"{what}: {first[decider]}",
        {stem: _normal(stem, form if claims[stem] in _WEAK else claims[stem], home) for stem in first},
        tuple(f"{first[stem]} has {_WHAT[claim]}, among {_WHAT[form]}" for claim, stem in others.items()),
    )


def _elected(
    votes: Counter[str],
    claims: Mapping[str, str],
    first: Mapping[str, str],
    keys: Mapping[str, Key],
    whole: str,
) -> str:
    families: Counter[str] = Counter()
    for claim, count in votes.items():
        families[_family(claim)] += count
    ranked = families.most_common(2)
    if not ranked:
        if any(_FLAT.match(plain_stem(stem)) for stem in claims):
            return "kohya"
        prefixed = any(stem.startswith(_PEFT) for stem in claims)
        return BARE if prefixed or any(parts.suffix in _PEFT_SUFFIXES for parts in keys.values()) else "kohya"
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        told = [
            next(first[stem] for stem, c in claims.items() if c and _family(c) == name) for name, _ in ranked
        ]
        raise AmbiguousFormat(
            f"{whole} is {ranked[0][0]} by {told[0]} and {ranked[1][0]} by {told[1]}, with as many modules each",
            hint="split it into a file for each",
        )
    mine = [claim for claim in votes if _family(claim) == ranked[0][0]]
    special = next((claim for claim in ("onetrainer", "xlabs") if claim in mine), None)
    return special or max(mine, key=votes.__getitem__).removesuffix("' words")


def _family(claim: str) -> str:
    """Dialects that one file may mix, as one."""
    return {
        "onetrainer": "kohya",
        "native": "comfy",
        "bfl-control": "comfy",
        "diffusers' words": "diffusers",
    }.get(claim, claim)


def _claim(stem: str, key: Key) -> str:
    """The dialect one module speaks for; empty where it could be several's."""
    if _FLAT.match(stem):
        return "onetrainer" if _ONETRAINER.match(stem) else "" if _NEUTRAL.match(stem) else "kohya"
    if _XLABS.search(stem):
        return "xlabs"
    if _COMFY.match(stem):
        return "comfy"
    if _PIPELINE.match(stem) and not _LANGUAGE.match(stem):
        return "diffusers"
    if key.suffix.startswith("_lora."):
        return "diffusers"
    if _DIFFUSERS_UNET.match(stem) or _DIFFUSERS_DIT.match(stem):
        return "diffusers' words"
    if _NATIVE.match(_WRAPPED.sub("", stem, count=1)):
        return "native"
    return ""


def _control(keys: Mapping[str, Key]) -> str | None:
    """Black Forest Labs' control LoRAs train the biases with the factors."""
    return "bfl-control" if any(parts.role == "up_bias" for parts in keys.values()) else None


def plain_stem(stem: str) -> str:
    """A stem without PEFT's prefix, however often it stands there.

    >>> plain_stem("base_model.model.base_model.model.x_embedder")
    'x_embedder'
    """
    while stem.startswith(_PEFT):
        stem = stem.removeprefix(_PEFT)
    return stem


def _normal(stem: str, claim: str, home: str) -> str:
    """A module's name as the tables have it: prefixes of one spelling, projections by their modules."""
    name = plain_stem(stem)
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    if _FLAT.match(name):
        return name
    if claim.startswith("diffusers"):
        return _of_diffusers(name, home)
    if claim in {"native", "comfy", "xlabs", "bfl-control"} and not (_COMFY.match(name) or _TEXT.match(name)):
        return "diffusion_model." + _WRAPPER.sub("", name, count=1)
    return name


def _of_diffusers(name: str, home: str) -> str:
    """Projections by their modules, and the component in front.

    >>> _of_diffusers("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out", "unet.")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'
    >>> _of_diffusers("text_encoder.text_model.encoder.layers.0.self_attn.to_q", "unet.")
    'text_encoder.text_model.encoder.layers.0.self_attn.q_proj'
    """
    text = _TEXT_PROJECTION.fullmatch(name)
    if text is not None:
        return f"{text['head']}.{text['which']}_proj"
    by_processor = (
        ".processor." in name or ".attentions." in name
    )  # a transformer's own module may be called so
    name = name.replace(".processor.", ".")
    if by_processor and name.endswith(".to_out") and ".attn" in name:
        name += ".0"
    return name if _PIPELINE.match(name) else home + name
