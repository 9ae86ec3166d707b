"""What stands behind a module's name in a key, and what it means: the one table, for readers and for writers.

Facts: sd-scripts, LyCORIS, diffusers, ComfyUI, OneTrainer, ai-toolkit and PEFT, as they write today and wrote before.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["SUFFIXES", "Key", "Meaning", "spelled", "split_key"]


class Meaning(NamedTuple):
    """What a tensor is to its module.

    Attributes:
        family: the kind of module it makes; empty where it stands beside factors of any kind.
        role: its part in the module.
    """

    family: str
    role: str


class Key(NamedTuple):
    """A key taken apart.

    Attributes:
        stem: the module's name as the file has it.
        family: see :class:`Meaning`.
        role: see :class:`Meaning`.
        suffix: what stood behind the stem, without an adapter's name.
    """

    stem: str
    family: str
    role: str
    suffix: str


# Suffix -> meaning. What diffusers' attention processors had, to_q_lora.down.weight, is not in it: see _of_processor.
SUFFIXES: dict[str, Meaning] = {
    ".lora_down.weight": Meaning("lora", "down"),
    ".lora_up.weight": Meaning("lora", "up"),
    ".lora_mid.weight": Meaning("lora", "mid"),
    ".lora_A.weight": Meaning("lora", "down"),
    ".lora_B.weight": Meaning("lora", "up"),
    ".lora_B.bias": Meaning("lora", "up_bias"),
    ".lora_A": Meaning("lora", "down"),
    ".lora_B": Meaning("lora", "up"),
    ".lora_E": Meaning("adalora", "singular"),
    ".lora_embedding_A": Meaning("lora", "embedding_down"),
    ".lora_embedding_B": Meaning("lora", "embedding_up"),
    ".lora.down.weight": Meaning("lora", "down"),
    ".lora.up.weight": Meaning("lora", "up"),
    ".lora_linear_layer.down.weight": Meaning("lora", "down"),
    ".lora_linear_layer.up.weight": Meaning("lora", "up"),
    ".hada_w1_a": Meaning("loha", "first_a"),
    ".hada_w1_b": Meaning("loha", "first_b"),
    ".hada_t1": Meaning("loha", "first_core"),
    ".hada_w2_a": Meaning("loha", "second_a"),
    ".hada_w2_b": Meaning("loha", "second_b"),
    ".hada_t2": Meaning("loha", "second_core"),
    ".lokr_w1": Meaning("lokr", "left"),
    ".lokr_w1_a": Meaning("lokr", "left_a"),
    ".lokr_w1_b": Meaning("lokr", "left_b"),
    ".lokr_w2": Meaning("lokr", "right"),
    ".lokr_w2_a": Meaning("lokr", "right_a"),
    ".lokr_w2_b": Meaning("lokr", "right_b"),
    ".lokr_t2": Meaning("lokr", "right_core"),
    ".diff": Meaning("full", "diff"),
    ".diff_b": Meaning("", "diff_bias"),  # also beside the factors of a LoRA
    ".w_norm": Meaning("norm", "diff"),
    ".b_norm": Meaning("norm", "diff_bias"),
    ".set_weight": Meaning("set", "value"),
    ".on_input": Meaning("ia3", "on_input"),
    ".a1.weight": Meaning("glora", "a1"),
    ".a2.weight": Meaning("glora", "a2"),
    ".b1.weight": Meaning("glora", "b1"),
    ".b2.weight": Meaning("glora", "b2"),
    ".bm.weight": Meaning("glora", "bm"),
    ".oft_blocks": Meaning("oft", "blocks"),
    ".oft_diag": Meaning("oft", "diag"),
    ".oft_R.weight": Meaning("oft", "packed"),
    ".oft_R.scaled_oft": Meaning("oft", "scaled"),
    ".rescale": Meaning("oft", "rescale"),
    ".q_layer.weight": Meaning("tlora", "q_layer"),
    ".p_layer.weight": Meaning("tlora", "p_layer"),
    ".lambda_layer": Meaning("tlora", "lambda_layer"),
    ".alpha": Meaning("", "alpha"),
    ".lora.alpha": Meaning("", "alpha"),
    ".lora_linear_layer.alpha": Meaning("", "alpha"),
    ".dora_scale": Meaning("", "magnitude"),
    ".magnitude": Meaning("", "magnitude"),
    ".lora_magnitude_vector": Meaning("", "magnitude"),
    ".lora_magnitude_vector.weight": Meaning("", "magnitude"),
    ".reshape_weight": Meaning("", "reshape"),
}
# Those of one role are spelled as the dialect's own tools do; what is not listed here, as kohya's.
_KOHYA = {
    ("lora", "down"): ".lora_down.weight",
    ("lora", "up"): ".lora_up.weight",
    ("lora", "up_bias"): ".lora_B.bias",
    ("", "alpha"): ".alpha",
    ("", "magnitude"): ".dora_scale",
}
_PEFT_FACTORS = {("lora", "down"): ".lora_A.weight", ("lora", "up"): ".lora_B.weight"}
_SPELLINGS = {
    "kohya": _KOHYA,
    "comfy": _KOHYA | _PEFT_FACTORS,
    "diffusers": _KOHYA | _PEFT_FACTORS | {("", "magnitude"): ".lora_magnitude_vector"},
}
# Words behind which an adapter's name may stand: lora_A.default.weight.
_NAMED = ("lora_", "hada_", "lokr_", "oft_R")
_PROCESSOR = "_lora"
_LEGS = {"down.weight": Meaning("lora", "down"), "up.weight": Meaning("lora", "up")}
_XLABS = re.compile(r"_blocks\.\d+\.processor\.(?:qkv|proj)_lora\d?$")


def spelled(dialect: str, family: str, role: str) -> str:
    """The suffix a dialect writes for a role.

    >>> spelled("kohya", "lora", "down"), spelled("diffusers", "dora", "magnitude")
    ('.lora_down.weight', '.lora_magnitude_vector')

    Raises:
        KeyError: no suffix has that meaning.
    """
    family = "lora" if family == "dora" else "oft" if family in {"boft", "oftv2"} else family
    own = _SPELLINGS.get(dialect, _KOHYA)
    for meaning in (Meaning(family, role), Meaning("", role)):
        if meaning in own:
            return own[meaning]
        for text, known in SUFFIXES.items():
            if known == meaning:
                return text
    raise KeyError(f"{family} has no {role}")


def split_key(key: str) -> Key | None:
    """The module, family and role of a key by its longest known suffix; None for a key with none.

    >>> split_key("lora_unet_mid_block_proj_in.lora_up.weight")
    Key(stem='lora_unet_mid_block_proj_in', family='lora', role='up', suffix='.lora_up.weight')
    >>> split_key("attn1.processor.to_q_lora.down.weight").stem
    'attn1.processor.to_q'
    """
    words = key.rsplit(".", 3)
    for count in range(min(3, len(words) - 1), 0, -1):
        found = _meaning(words[-count:])
        if found is not None:
            suffix, meaning = found
            return Key(".".join(words[:-count]), *meaning, suffix)
    return _of_processor(words)


def _meaning(words: list[str]) -> tuple[str, Meaning] | None:
    suffix = "." + ".".join(words)
    if (known := SUFFIXES.get(suffix)) is not None:
        return suffix, known
    if len(words) > 1 and words[0].startswith(_NAMED) and _is_name(words[1]):
        suffix = "." + ".".join([words[0], *words[2:]])
        if (known := SUFFIXES.get(suffix)) is not None:
            return suffix, known
    return None


def _is_name(word: str) -> bool:
    """Whether a word behind a factor's may be an adapter's name; a number counts parts of a split projection."""
    return word not in {"weight", "bias"} and not word.isdigit()


def _of_processor(words: list[str]) -> Key | None:
    """``to_q_lora.down.weight``, as diffusers' attention processors were saved, and ``to_q_lora.alpha``.

    XLabs numbers its own, ``processor.qkv_lora1``: there the projection and the number are one name.
    """
    for count, tails in ((2, _LEGS), (1, {"alpha": Meaning("", "alpha")})):
        tail, rest = ".".join(words[-count:]), words[:-count]
        if tail not in tails or not rest:
            continue
        if _XLABS.search(".".join(rest)):
            return Key(".".join(rest), *tails[tail], "." + tail)
        if rest[-1].endswith(_PROCESSOR):
            return Key(".".join(rest).removesuffix(_PROCESSOR), *tails[tail], f"{_PROCESSOR}.{tail}")
    return None
