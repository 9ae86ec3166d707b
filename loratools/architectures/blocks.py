"""Block weights: the blocks of a UNet or of FLUX by their short names, and vectors of one ratio for each.

The names and the vectors' lengths are those of the web UI extension "LoRA Block Weight": 17 or 26 ratios for Stable
Diffusion 1 and 2, 12 or 20 for XL, 61 for FLUX. BASE is the text encoders, and whatever a vector has no block for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import BadConfig, Unsupported, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loratools.architectures.base import Architecture, Place

__all__ = ["PRESETS", "VECTORS", "block", "blocks", "ratios"]


def _numbered(prefix: str, numbers: range | tuple[int, ...], digits: int = 2) -> Iterator[str]:
    return (f"{prefix}{number:0{digits}}" for number in numbers)


_SD_LORA = ("BASE", *_numbered("IN", (1, 2, 4, 5, 7, 8)), "M00", *_numbered("OUT", range(3, 12)))
_SD_FULL = ("BASE", *_numbered("IN", range(12)), "M00", *_numbered("OUT", range(12)))
_XL_LORA = ("BASE", *_numbered("IN", (4, 5, 7, 8)), "M00", *_numbered("OUT", range(6)))
_XL_FULL = ("BASE", *_numbered("IN", range(9)), "M00", *_numbered("OUT", range(9)))
_FLUX = ("CLIP", "T5", "IN", *_numbered("D", range(19), 3), *_numbered("S", range(38), 3), "OUT")

# The vectors of each family; the last has all of its blocks.
VECTORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sd1": (_SD_LORA, _SD_FULL),
    "sd2": (_SD_LORA, _SD_FULL),
    "sdxl": (_XL_LORA, _XL_FULL),
    "flux1": (_FLUX,),
    "chroma": (_FLUX,),
}
# The same ratio for all blocks, whatever the family.
_EVEN = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
PRESETS: dict[str, tuple[float, ...]] = {
    **{name: (ratio,) * 17 for name, ratio in _EVEN.items()},
    "INS": (1, 1, 1, 1, *(0,) * 13),
    "IND": (1, 0, 0, 0, 1, 1, 1, *(0,) * 10),
    "INALL": (*(1,) * 7, *(0,) * 10),
    "MIDD": (1, 0, 0, 0, *(1,) * 8, *(0,) * 5),
    "OUTD": (1, *(0,) * 7, *(1,) * 4, *(0,) * 5),
    "OUTS": (1, *(0,) * 11, *(1,) * 5),
    "OUTALL": (1, *(0,) * 7, *(1,) * 9),
    "FLUXALL": (1,) * 61,
}


def blocks(architecture: Architecture) -> tuple[str, ...]:
    """All blocks of a family, in the order of its longest vector; none where there is no convention."""
    return VECTORS.get(architecture.name, ((),))[-1]


def block(architecture: Architecture, place: Place) -> str | None:
    """The block a weight is in; None where the family has no such convention.

    >>> from loratools.architectures.base import architecture
    >>> sdxl = architecture("sdxl")
    >>> block(sdxl, sdxl.lookup("lora_unet_input_blocks_4_1_proj_in"))
    'IN04'
    """
    if architecture.name not in VECTORS:
        return None
    native = place.weight.native
    if VECTORS[architecture.name] == (_FLUX,):
        return _flux_block(place.weight.component, native)
    if place.weight.component != "unet":
        return "BASE"
    head, _, rest = native.partition(".")
    number = rest.partition(".")[0]
    if head == "middle_block":
        return "M00"
    prefix = {"input_blocks": "IN", "output_blocks": "OUT"}.get(head)
    return f"{prefix}{int(number):02}" if prefix else "BASE"


def _flux_block(component: str, native: str) -> str:
    if component != "transformer":
        return "CLIP" if native.startswith("text_model") else "T5"
    head, _, rest = native.partition(".")
    if head in {"double_blocks", "single_blocks"}:
        return f"{head[0].upper()}{int(rest.partition('.')[0]):03}"
    return "OUT" if head == "final_layer" else "IN"


def ratios(architecture: Architecture, vector: str) -> dict[str, float]:
    """A ratio for every block of a family, from a preset's name or from numbers with commas between them.

    A block that a short vector leaves out has the ratio of BASE.

    Raises:
        Unsupported: the family has no block weights.
        BadConfig: the vector has a length the family does not have, or something in it is no number.
    """
    known = VECTORS.get(architecture.name)
    if known is None:
        raise Unsupported(
            f"{architecture.title} has no block weights", hint=f"they are known for {', '.join(VECTORS)}"
        )
    even = _EVEN.get(vector.strip().upper())
    values = _values(vector) if even is None else (even,) * len(known[-1])
    names = next((one for one in known if len(one) == len(values)), None)
    if names is None:
        lengths = " or ".join(str(len(one)) for one in known)
        raise BadConfig(f"block weights: {len(values)} ratios, but {architecture.title} has {lengths} blocks")
    given = dict(zip(names, values, strict=True))
    return {name: given[name] if name in given else given["BASE"] for name in known[-1]}


def _values(vector: str) -> tuple[float, ...]:
    preset = PRESETS.get(vector.strip().upper())
    if preset is not None:
        return preset
    try:
        return tuple(float(piece) for piece in vector.split(","))
    except ValueError:
        raise BadConfig(
            f"block weights {quoted(vector)} are neither numbers nor a preset",
            hint=f"presets: {', '.join(PRESETS)}",
        ) from None
