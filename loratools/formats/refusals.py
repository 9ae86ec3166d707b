"""PEFT adapters that are well formed and have no meaning as an update of weights: the reason, and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from loratools.adapter import Module
    from loratools.formats.peft_config import PeftConfig

__all__ = ["why_broken", "why_refused"]

_PLAIN = ("PiSSA, OLoRA, CorDA and LoRA-GA adapters become plain ones in PEFT: "
          "save_pretrained(path_initial_model_for_weight_conversion=...)")  # fmt: skip
_BACKBONE = "merge it into the backbone that LoftQ saved with it"

# Initialisations that changed the base in a way that cannot be redone from the base alone.
_LOST_BASES = {
    "pissa_niter": "was trained against a base minus a randomised SVD, which cannot be reproduced",
    "corda": "was trained against a base minus a data-dependent part (CorDA) that is not in the file",
    "lora_ga": "was trained against a base minus a gradient-dependent part (LoRA-GA) that is not in the file",
    "loftq": "was trained against a re-quantised base (LoftQ), which is not the one here",
}

_PROMPTS = {
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
# Fields that, where they are set, leave an adapter without a meaning as an update of the weights; and the way out.
_REFUSED_FIELDS = {
    "alora_invocation_tokens": (
        "is an activated LoRA (aLoRA): it applies to some tokens only",
        "keep it as an adapter",
    ),
    "arrow_config": (
        "is an Arrow router over several adapters: its choice depends on the input",
        "merge the experts it routes",
    ),
    "use_qalora": (
        "is a QALoRA: its A works on groups of inputs of a quantised base",
        "serve it with the base it was trained on",
    ),
    "layer_replication": (
        "replicates layers (layer_replication): copies with different deltas share one stored weight",
        "write out the replicated base first, then merge without layer_replication",
    ),
}


def why_refused(
    config: PeftConfig, modules: Mapping[str, Module], known: Collection[str]
) -> tuple[str, str] | None:
    """Why this adapter has no meaning as an update of the weights, and the way out; None where it has one.

    Args:
        config: the adapter's.
        modules: what was read of it.
        known: types that are computed with.
    """
    if config.peft_type in _PROMPTS:
        return (
            f"{config.peft_type} steers the model through its inputs; there is nothing to merge",
            "keep it as an adapter and load it with PEFT",
        )
    if config.peft_type not in {*known, "TRAINABLE_TOKENS"}:
        return (
            f"{config.peft_type} adapters are not computed with by this build",
            "PEFT's save_as_lora turns many kinds into a LoRA",
        )
    init = config.init.lower() if isinstance(config.init, str) else ""
    for start, reason in _LOST_BASES.items():
        if init.startswith(start):
            return reason, _BACKBONE if start == "loftq" else _PLAIN
    for name, refusal in _REFUSED_FIELDS.items():
        if config.raw.get(name):
            return refusal
    bare = next((path for path, m in modules.items() if config.use_dora and m.kind == "lora"), None)
    if bare is not None:
        return (
            f"the configuration says use_dora, and {bare} has no magnitude vector",
            "save the adapter again; or set use_dora to false, if it is a plain LoRA",
        )
    grouped = next((p for p, m in modules.items() if _is_grouped(m)), None)
    if grouped is not None:
        return (
            f"{grouped} adapts a grouped convolution, whose delta PEFT does not define",
            "keep it as an adapter",
        )
    return None


def why_broken(broken: Mapping[str, str]) -> tuple[str, str] | None:
    """The same for modules that cannot be one, by their problem."""
    if not broken:
        return None
    path, problem = next(iter(broken.items()))
    more = f" (and {len(broken) - 1} more like it)" if len(broken) > 1 else ""
    return (
        f"{path} is broken{more}: {problem}",
        "loratools validate lists every fault; save the adapter again",
    )


def _is_grouped(module: Module) -> bool:
    if module.kind not in {"lora", "dora"} or len(module.tensors["down"].shape) < 3:
        return False
    return module.tensors["up"].shape[1] != module.tensors["down"].shape[0]
