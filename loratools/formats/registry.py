"""Every format by name: what this build does with it, and where its writer is.

The one list behind ``loratools formats``, ``--to`` and ``Adapter.save(format=)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from loratools.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratools.adapter import Adapter
    from loratools.architectures.base import Architecture
    from loratools.tensors.base import TensorRef

__all__ = ["FORMATS", "Format", "Written", "find_format", "is_diffusion", "writable"]


@dataclass(frozen=True, slots=True)
class Written:
    """An adapter in the terms of a format.

    Attributes:
        tensors: by key, in the order they are written.
        metadata: of the weight file's header.
        files: small files beside the weights, by name.
        weights: the weight file's name in a folder; its ending is that of a single file.
        lost: keys and module names that the format has no place for, each with the reason.
        warnings: what a program that loads it does otherwise than the adapter means.
    """

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    weights: str = "adapter_model.safetensors"
    lost: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store adapters.

    Attributes:
        name: as ``--to`` takes it.
        title: in words.
        kinds: of modules it can hold.
        signs: what gives it away.
        writer: ``module:function``; empty where it is only read.
        folder: whether it is a folder by nature, so that a configuration lies beside the weights.
        computes: whether verbs compute with what is read from it.
        diffusion: whether its names are those of diffusion models, which only an architecture explains.
        narrow: whether it has names for some modules of its models only.
        needs_base: whether its writer asks for the base's ``config.json``, as ``base_config``.
        aliases: other names for it.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    signs: tuple[str, ...]
    writer: str = ""
    folder: bool = False
    computes: bool = True
    diffusion: bool = False
    narrow: bool = False
    needs_base: bool = False
    aliases: tuple[str, ...] = ()

    def write(self, adapter: Adapter, architecture: Architecture | None = None, **options: Any) -> Written:
        """The adapter in this format's terms; reads values only where several factors become one.

        Args:
            adapter: any.
            architecture: whose names, where they depend on one.
            options: what this format's writer takes besides.

        Raises:
            Unsupported: this build does not write it, or it needs an architecture.
        """
        if not self.writer:
            raise Unsupported(
                f"{self.name} is read, not written", hint=f"written are {', '.join(writable())}"
            )
        module, _, function = self.writer.partition(":")
        written: Written = getattr(import_module(module), function)(adapter, architecture, **options)
        return written


def _formats(*formats: Format) -> dict[str, Format]:
    return {one.name: one for one in formats}


_LYCORIS = ("lora", "dora", "loha", "lokr", "full", "norm")
_WITH_BASE = ("ia3", "glora", "oft", "boft")
FORMATS: dict[str, Format] = _formats(
    Format(
        "peft", "PEFT folder", ("lora", "dora", "adalora", "ia3", "loha", "lokr"),
        ("adapter_config.json beside the weights",), "loratools.formats.peft_writing:written", folder=True,
    ),
    Format(
        "kohya", "kohya-ss and LyCORIS", (*_LYCORIS, *_WITH_BASE), ("lora_unet_..., lora_te_... keys",),
        "loratools.formats.kohya:write_kohya", aliases=("lycoris", "sd-scripts"), diffusion=True,
    ),
    Format(
        "diffusers", "diffusers", ("lora", "dora"), ("unet. / transformer. / text_encoder. keys",),
        "loratools.formats.diffusers:write_diffusers", diffusion=True,
    ),
    Format(
        "comfy", "ComfyUI, ai-toolkit, SimpleTuner", (*_LYCORIS, *_WITH_BASE), ("diffusion_model. keys",),
        "loratools.formats.comfy:write_comfy", aliases=("ai-toolkit", "comfyui"), diffusion=True,
    ),
    Format(
        "mlx", "MLX", ("lora", "dora"), ("lora_a and lora_b in adapters.safetensors",),
        "loratools.formats.mlx:write_mlx", folder=True, needs_base=True,
    ),
    Format(
        "gguf", "GGUF of llama.cpp", ("lora",), ("general.type is adapter",), "loratools.formats.gguf:write_gguf",
        needs_base=True,
    ),
    Format(
        "xlabs", "XLabs x-flux", ("lora",), ("processor.qkv_lora1 keys",),
        "loratools.formats.flux_dialects:write_xlabs", diffusion=True, narrow=True,
    ),
    Format(
        "onetrainer", "OneTrainer", (*_LYCORIS, *_WITH_BASE), ("lora_transformer_... keys",),
        "loratools.formats.onetrainer:write_onetrainer", diffusion=True,
    ),
    Format(
        "bfl-control", "Black Forest Labs control LoRA", ("lora", "set"), ("double_blocks... with lora_B.bias",),
        "loratools.formats.flux_dialects:write_control", diffusion=True, narrow=True,
    ),
    Format(
        "cloneofsimo", "cloneofsimo/lora", ("lora",), ("unet:0:up",),
        "loratools.formats.cloneofsimo:write_cloneofsimo", diffusion=True, narrow=True,
    ),
    Format("loralib", "loralib and merged-linear", ("lora",), ("lora_A and lora_B without .weight",)),
)  # fmt: skip


def find_format(name: str) -> Format:
    """A format by its name or one of its other names.

    Raises:
        Unsupported: there is none; lists those that are.
    """
    for one in FORMATS.values():
        if name in (one.name, *one.aliases):
            return one
    raise Unsupported(f"no format {name!r} is known", hint=f"written are {', '.join(writable())}")


def is_diffusion(name: str) -> bool:
    """Whether a format's names are those of diffusion models."""
    found = FORMATS.get(name)
    return found is not None and found.diffusion


def writable() -> tuple[str, ...]:
    """The names ``--to`` takes."""
    return tuple(one.name for one in FORMATS.values() if one.writer)
