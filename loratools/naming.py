"""How a model's modules are called in memory and on disk, where the two differ.

transformers renames some checkpoints while it loads them. An adapter uses the names in memory, the checkpoint the
names on disk. Each dialect here spells a tensor name on disk as it is called in memory; ``bind`` tries them and takes
the one under which the adapter's modules are found. Facts from transformers 5.24, ``conversion_mapping.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "DIALECTS",
    "EXPERT_PARTS",
    "FUSED_EXPERTS",
    "TRANSPOSED_EXPERTS",
    "Dialect",
    "ExpertPart",
    "spell",
]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Substitutions from disk to memory, applied in order."""

    name: str
    rules: tuple[tuple[str, str], ...] = ()


DIALECTS = (
    Dialect("as stored"),
    Dialect("mixtral", ((r"\.block_sparse_moe\.", ".mlp."),)),
    Dialect("mixtral before transformers 5", ((r"\.mlp\.(experts|gate)\.", r".block_sparse_moe.\1."),)),
    Dialect("phimoe", ((r"\.block_sparse_moe\.", ".mlp."), (r"\.gate\.weight", ".router.weight"))),
    Dialect(
        "granitemoe",
        (
            (r"block_sparse_moe\.input_linear\.weight", "block_sparse_moe.experts.gate_up_proj"),
            (r"block_sparse_moe\.output_linear\.weight", "block_sparse_moe.experts.down_proj"),
            (r"block_sparse_moe\.router\.layer\.weight", "block_sparse_moe.router.weight"),
        ),
    ),
    Dialect(
        "vit",
        (
            (r"encoder\.layer\.", "layers."),
            (r"attention\.query", "q_proj"),
            (r"attention\.key", "k_proj"),
            (r"attention\.value", "v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ),
    ),
    Dialect(
        "dinov2",
        (
            (r"attention\.attention\.query", "attention.q_proj"),
            (r"attention\.attention\.key", "attention.k_proj"),
            (r"attention\.attention\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
        ),
    ),
    Dialect(
        "swin",
        (
            (r"attention\.self\.query", "attention.q_proj"),
            (r"attention\.self\.key", "attention.k_proj"),
            (r"attention\.self\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ),
    ),
    Dialect(
        "llava",
        (
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model", "model.language_model"),
            (r"^language_model", "model.language_model"),
            (r"^(vision_tower|vision_model|multi_modal_projector|image_newline|audio_tower)", r"model.\1"),
        ),
    ),
    Dialect(
        "qwen2-vl",
        ((r"^visual", "model.visual"), (r"^model(?!\.(language_model|visual))", "model.language_model")),
    ),
    Dialect("gpt-neox", ((r"^embed_out\.", "lm_head."),)),
)


def spell(names: Iterable[str], dialect: Dialect) -> dict[str, str]:
    """Names in memory to names on disk, under a dialect.

    >>> spell(["m.block_sparse_moe.gate.weight"], DIALECTS[1])
    {'m.mlp.gate.weight': 'm.block_sparse_moe.gate.weight'}
    """
    rules = [(re.compile(pattern), replacement) for pattern, replacement in dialect.rules]
    spelled = {}
    for disk in names:
        memory = disk
        for pattern, replacement in rules:
            memory = pattern.sub(replacement, memory)
        spelled[memory] = disk
    return spelled


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One matrix of an expert, and where it lies inside the fused parameter of all experts."""

    fused: str  # the 3-D parameter in memory
    half: int | None  # 0 is the first half of its output features (gate), 1 the second (up), None all of them


# What an expert's matrices are called where a checkpoint keeps them apart.
EXPERT_PARTS: dict[str, ExpertPart] = {
    "gate_proj": ExpertPart("gate_up_proj", 0),
    "up_proj": ExpertPart("gate_up_proj", 1),
    "down_proj": ExpertPart("down_proj", None),
    "w1": ExpertPart("gate_up_proj", 0),
    "w3": ExpertPart("gate_up_proj", 1),
    "w2": ExpertPart("down_proj", None),
}

# Model types whose fused expert tensors are stored (experts, in, out).
TRANSPOSED_EXPERTS = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text"}

# The order in which transformers defines the parameters of a fused expert module. PEFT nests its wrappers in it.
FUSED_EXPERTS = ("gate_up_proj", "down_proj")
