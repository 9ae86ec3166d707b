"""Which architecture an adapter belongs to, from the names of its modules and the shapes of their deltas.

Words of the names say which families to load; the one whose weights take the most modules, by name and shape, is the
answer. What metadata say only chooses between families that fit equally well.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.architectures.base import architecture, called, flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from loratools.architectures.base import Architecture, Weight

__all__ = ["Detection", "detect"]

_UNETS = ("sd1", "sd2", "sdxl")
_SD3 = ("sd3", "sd3.5-medium", "sd3.5-large")
_WAN = ("wan-14b", "wan-1.3b", "wan-5b")
_FLUX = ("flux1", "chroma")
_FLUX2 = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")
_LTX = ("ltx-video-2b", "ltx-video-13b", "ltx-2")
_LLM = ("lumina2", "anima", "qwen-image", "z-image")
_MMDIT = (*_FLUX, "hunyuan-video", "qwen-image", *_SD3, *_FLUX2)
_UNET = r"(^|_)((down|up|input|output)_blocks_#|mid_block|middle_block_#|conv_in|conv_out|label_emb|add_embedding)(_|$)"
# Words of flattened names, numbers written #, and all the families that have them. A family must have every word found.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"joint_blocks_#_", _SD3),
    (r"(double|single)_blocks_#_|single_transformer_blocks_#_", (*_FLUX, "hunyuan-video", *_FLUX2)),
    (r"transformer_blocks_#_(attn_|ff_|img_m|txt_m)", (*_MMDIT, "krea2", "anima", *_LTX)),
    (r"_attn_add_[qkv]_proj|_attn_to_add_out", _MMDIT),
    (r"_img_mod_#|_img_mlp_net", ("qwen-image",)),
    (r"_ff_linear_in|_ff_linear_out|to_qkv_mlp_proj|stream_modulation", _FLUX2),
    (
        r"_ff_context_net|single_transformer_blocks_#_(proj_mlp|attn_to_[qkv]$)",
        (*_FLUX, "hunyuan-video", *_SD3),
    ),
    (r"^(\w+_)?transformer_blocks_#_(attn#|norm#_linear_#)_", (*_WAN, "anima", *_LTX, "sd3.5-medium")),
    (r"(^|_)blocks_#_(self_attn|cross_attn|ffn)", (*_WAN, "anima", "hunyuan-video")),
    (r"(^|_)blocks_#_(attn_w|attn_gate|mlp_gate)|(txt|text_)fusion_", ("krea2",)),
    (r"(^|_)blocks_#_(mlp_layer#|adaln)|llm_adapter|text_conditioner", ("anima",)),
    (r"(^|_)blocks_#_attn#_", (*_WAN, "anima", *_LTX, "sd3.5-medium")),
    (r"(layers|noise_refiner|context_refiner)_#_(attention|attn|feed_forward|adaLN)", ("z-image", "lumina2")),
    (r"(double|single)_stream_blocks_#|caption_projection_#_linear", ("hidream-i1",)),
    (r"patchify_proj|adaln_single", _LTX),
    (
        r"(img_in|txt_in|time_in|vector_in|guidance_in)(_|$)",
        (*_FLUX, *_FLUX2, "hunyuan-video", "qwen-image", "krea2"),
    ),
    (
        r"(x_embedder|context_embedder|norm_out)(_|$)|final_layer_(linear|ada)",
        (*_MMDIT, *_LLM, "krea2", "hidream-i1"),
    ),
)
# Numbers that only some have: deep transformers, or a fourth level.
_NUMBERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(attentions|(put|iddle)_blocks?)[._]\d+[._](\d+[._])?transformer_blocks[._][1-9]", ("sdxl",)),
    (r"((up|down)_blocks[._]3|(in|out)put_blocks[._](9|1[01]))[._]", ("sd1", "sd2")),
)
# Read only where no denoiser is adapted.
_TEXT_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"(text_model|encoder|encoder_#|te|te#)_encoder_layers_#|resblocks_#",
        (*_UNETS, "flux1", *_SD3, "hunyuan-video"),
    ),
    (r"encoder_block_#_layer_#", (*_FLUX, *_SD3)),
    (r"^(lora_te|text_encoder(s_[\w#]*_transformer)?)_(model_|language_model_)*layers_#_", _LLM),
)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Detection:
    """The architecture an adapter belongs to.

    Attributes:
        architecture: its name; None where none fits, or where several do and nothing chooses.
        evidence: a sentence for the user.
        candidates: all that fit as well, the chosen one first.
    """

    architecture: str | None
    evidence: str
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Score:
    family: Architecture
    fitting: int
    named: int
    exact: int  # of those that fit, where the family has only one size
    weights: frozenset[Weight]

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.fitting, self.named, self.exact


def detect(modules: Mapping[str, tuple[int, ...]], hints: Iterable[str] = ()) -> Detection:
    """Find the architecture of an adapter.

    Args:
        modules: the shape of each module's delta, by the module's name; an empty shape is not known.
        hints: what metadata call the base model.
    """
    hints = [hint for hint in hints if hint]
    scores = [_score(architecture(name), modules) for name in _families(modules)]
    best = _best(scores, len(modules))
    if not best:
        return Detection(None, _why_none(scores, len(modules)))
    tied = [score.family for score in best]
    chosen = _chosen(tied, hints)
    evidence = f"{best[0].named} of {len(modules)} modules by name, {best[0].fitting} by shape too"
    rest = [one for one in tied if one is not chosen]
    if chosen is None:
        return Detection(None, f"{evidence}, in each of several families", tuple(one.name for one in tied))
    if rest:
        evidence += f"; as well as in {', '.join(one.title for one in rest)}"
    evidence += _contradiction(chosen, hints)
    return Detection(chosen.name, evidence, (chosen.name, *(one.name for one in rest)))


def _best(scores: list[_Score], count: int) -> list[_Score]:
    """The families that take the most modules; of those, the ones whose layers they cover entirely, if any do.

    At least half of the modules must fit, or one where the family is the only one with all of the names.
    """
    best = max(scores, key=lambda score: score.rank, default=None)
    if best is None:
        return []
    tied = [score for score in scores if score.rank == best.rank]
    if not best.fitting or (best.fitting * 2 < count and (best.named < count or len(tied) > 1)):
        return []
    if len(tied) > 1:
        tied = [score for score in tied if _covers(score)] or tied
    return tied


def _covers(score: _Score) -> bool:
    """Whether every layer that could have such a module has one: 19 double blocks are all of FLUX's."""
    kinds = Counter(
        (weight.component, _NUMBER.sub("#", weight.native, count=1))
        for component in score.family.components
        for weight in component.weights
    )
    hit = Counter((weight.component, _NUMBER.sub("#", weight.native, count=1)) for weight in score.weights)
    return all(kinds[kind] == number for kind, number in hit.items())


def _families(modules: Iterable[str]) -> list[str]:
    """Those that have all the words of the names; all that have any where none has all. In a fixed order."""
    found = _spoken_of(list(modules))
    together = list(dict.fromkeys(name for families in found for name in families))
    return [name for name in together if all(name in families for families in found)] or together


def _spoken_of(names: list[str]) -> list[tuple[str, ...]]:
    """For each of the words that the names have, the families that have it."""
    skeletons = {_NUMBER.sub("#", flat(name)) for name in names}
    if any(map(re.compile(_UNET).search, skeletons)):
        return [_UNETS, *_having(_NUMBERS, names)]
    return _having(_SIGNS, skeletons) or _having(_TEXT_SIGNS, skeletons)


def _having(signs: tuple[tuple[str, tuple[str, ...]], ...], names: Iterable[str]) -> list[tuple[str, ...]]:
    return [families for sign, families in signs if any(map(re.compile(sign).search, names))]


def _score(family: Architecture, modules: Mapping[str, tuple[int, ...]]) -> _Score:
    places = [(family.lookup(name), shape) for name, shape in modules.items()]
    named = [(place, shape) for place, shape in places if place is not None]
    fitting = [place for place, shape in named if place.fits(shape)]
    exact = sum(0 not in place.weight.shape for place in fitting)
    return _Score(family, len(fitting), len(named), exact, frozenset(place.weight for place, _ in named))


def _chosen(tied: list[Architecture], hints: list[str]) -> Architecture | None:
    """The only one, the one hinted at, or the one that stands for the others, whose names are the same."""
    if len(tied) == 1:
        return tied[0]
    meant = {name for hint in hints for name in called(hint)}
    hinted = [one for one in tied if one.name in meant]
    if len(hinted) == 1:
        return hinted[0]
    names = {one.name for one in tied}
    return next((one for one in tied if names <= {one.name, *one.instead_of}), None)


def _contradiction(chosen: Architecture, hints: list[str]) -> str:
    meant = {name for hint in hints for name in called(hint)}
    if not meant or chosen.name in meant:
        return ""
    return f"; metadata say {' or '.join(sorted(meant))}, which the modules contradict"


def _why_none(scores: list[_Score], count: int) -> str:
    best = max(scores, key=lambda score: score.named, default=None)
    if best is None or not best.named:
        return "no family has modules of these names"
    return f"{best.named} of {count} names are in {best.family.title}, but only {best.fitting} fit its shapes"
