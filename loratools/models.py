"""A base model: its tensors, and what its ``config.json`` says that a merge must know."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loratools.errors import AmbiguousFormat, CorruptFile, NotFound, UnknownFormat, Unsupported
from loratools.refs import local_path
from loratools.tensors.files import read_whole
from loratools.tensors.memory import MemorySource
from loratools.tensors.safetensors import SafetensorsFile, ShardedCheckpoint, read_index

if TYPE_CHECKING:
    from pathlib import Path

    from loratools.dtypes import Array
    from loratools.tensors.base import Extent, TensorSource, TensorSpec

__all__ = ["BaseModel", "Tie", "open_base", "open_weights", "quantisation_scheme", "require_unquantised"]

CONFIG_NAME = "config.json"
PIPELINE_NAME = "model_index.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_CONFIG = 16_000_000  # bytes
# Components of a pipeline that adapters are trained on: denoisers and text encoders.
_ADAPTED = re.compile(r"(?:unet|transformer|prior|decoder|text_encoder)(?:_[A-Za-z0-9]+)*")

Kind = Literal["folder", "file", "memory"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model, opened: headers read, no values.

    Attributes:
        path: the folder or file; None in memory.
        kind: what it is, and so what the output of a merge is.
        source: its tensors.
        files: tensor names by the file that holds them, in the order of their bytes.
        index_name: of the index beside the shards, if there is one.
        config: ``config.json``, or empty.
        components: of a diffusers pipeline, the models that adapters are for, by their folder; their tensors are named
            ``folder/name``, their files likewise.
    """

    path: Path | None
    kind: Kind
    source: TensorSource
    files: Mapping[str, tuple[str, ...]]
    index_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, BaseModel] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return str(self.path) if self.path is not None else "the state dict"

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens, as the configuration gives it."""
        text = self.config.get("text_config")
        for section in (self.config, text if isinstance(text, dict) else {}):
            if isinstance(section.get("vocab_size"), int):
                return int(section["vocab_size"])
        return None

    @property
    def says_tied(self) -> bool | None:
        """What the configuration says of tied embeddings; None when it says nothing."""
        text = self.config.get("text_config")
        for section in (self.config, text if isinstance(text, dict) else {}):
            if isinstance(section.get("tie_word_embeddings"), bool):
                return bool(section["tie_word_embeddings"])
        return None

    @property
    def tie(self) -> Tie | None:
        """The tied embeddings; None where the output embedding is a weight of its own, or there is none."""
        return find_tie(self)

    def identity(self) -> tuple[Any, ...]:
        """What must be unchanged for an interrupted merge to go on."""
        return self.source.identity()


@dataclass(frozen=True, slots=True)
class Tie:
    """An output embedding that is the input embedding.

    Attributes:
        embedding: the tensor on disk.
        head: what the output embedding's weight is called.
        stored: whether the checkpoint holds it all the same.
        bias: a bias that is tied along with it: its name, and the tensor on disk it equals.
    """

    embedding: str
    head: str
    stored: bool
    bias: tuple[str, str] | None = None


_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "tok_embeddings",
    "embed_in",
    "tokens_embed",
)
_HEADS = {
    "whisper": "proj_out",
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder",
    "longformer": "lm_head.decoder",
    "mpnet": "lm_head.decoder",
    "data2vec-text": "lm_head.decoder",
    "xlm-roberta-xl": "lm_head.decoder",
    "big_bird": "cls.predictions.decoder",
    "mobilebert": "cls.predictions.decoder",
    "ernie": "cls.predictions.decoder",
    "electra": "generator_lm_head",
    "convbert": "generator_lm_head",
    "albert": "predictions.decoder",
    "distilbert": "vocab_projector",
    "gpt_neox": "embed_out",
}
_WITH_HEAD = (
    "MTModel",
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "ForImageTextToText",
)


def find_tie(base: BaseModel) -> Tie | None:
    """Tell from configuration and tensors whether input and output embedding are one weight."""
    specs = base.source.specs
    if isinstance(base.source, MemorySource):
        for name, first in base.source.ties.items():
            return Tie(first, name, stored=True)
    architectures = base.config.get("architectures") or [""]
    if not isinstance(architectures, list) or not str(architectures[0]).endswith(_WITH_HEAD):
        return None
    embedding = next(
        (
            name
            for name in specs
            if name.endswith(".weight") and name.split(".")[-2:-1] and name.split(".")[-2] in _EMBEDDINGS
        ),
        None,
    )
    if embedding is None or base.says_tied is False:
        return None
    module = _HEADS.get(str(base.config.get("model_type")), "lm_head")
    head = f"{module}.weight"
    stored = head in specs
    if stored and base.says_tied is None:
        return None
    outer = f"{module.rpartition('.')[0]}.bias"
    bias = (f"{module}.bias", outer) if outer in specs and f"{module}.bias" not in specs else None
    return Tie(embedding, head, stored, bias)


def open_base(base: str | os.PathLike[str] | Mapping[str, Any]) -> BaseModel:
    """Open a folder, a single safetensors file, or a state dict of numpy arrays or torch tensors.

    Raises:
        Unsupported: neither a path nor a state dict, or a path to what is not here.
        NotFound: no such path.
        UnknownFormat: no safetensors weights there.
        AmbiguousFormat: several weight files and no index.
        CorruptFile: a header, an index or ``config.json`` breaks the rules.
    """
    if isinstance(base, (str, os.PathLike)):
        return open_weights(local_path(base))
    if not isinstance(base, Mapping):
        raise Unsupported(
            f"the base is a {type(base).__name__}, not a path or a state dict", hint="pass model.state_dict()"
        )
    source = MemorySource(base)
    return BaseModel(None, "memory", source, {"": tuple(source.specs)})


def open_weights(path: Path) -> BaseModel:
    """Open the weights at a path; see :func:`open_base`."""
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise NotFound(f"{path}: no such file or folder")
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        raise UnknownFormat(
            f"{path} is a pickle; a base model is read from safetensors",
            hint="save it with save_pretrained, which writes safetensors",
        )
    source = SafetensorsFile(path)
    return BaseModel(path, "file", source, {path.name: tuple(source.specs)})


class PipelineSource:
    """The components of a pipeline as one source: ``folder/name``, whichever file of the folder a tensor lies in."""

    def __init__(self, components: Mapping[str, BaseModel]) -> None:
        self.components = components
        self.specs: Mapping[str, TensorSpec] = {
            f"{folder}/{name}": spec
            for folder, model in components.items()
            for name, spec in model.source.specs.items()
        }
        self.metadata: Mapping[str, str] = {}
        self.shards: dict[str, SafetensorsFile] = {}
        for folder, model in components.items():
            single = {next(iter(model.files)): model.source}
            for name, file in getattr(model.source, "shards", single).items():
                self.shards[f"{folder}/{name}"] = file

    def _inner(self, name: str) -> tuple[TensorSource, str]:
        folder, _, inner = name.partition("/")
        return self.components[folder].source, inner

    def read(self, name: str, start: int = 0, stop: int | None = None, *, out: Array | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        source, inner = self._inner(name)
        return source.read(inner, start, stop, out=out)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        source, inner = self._inner(name)
        return source.read_bytes(inner, start, stop)

    def extent(self, name: str) -> Extent | None:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        source, inner = self._inner(name)
        return source.extent(inner)

    def identity(self) -> tuple[Any, ...]:
        """See :class:`~loratools.tensors.base.TensorSource`."""
        return tuple(model.source.identity() for model in self.components.values())


def _open_pipeline(path: Path) -> BaseModel:
    """A diffusers pipeline: the components that adapters are for. Everything else lies beside them."""
    listed = _read_config(path / PIPELINE_NAME)
    components = {
        name: _open_component(path / name)
        for name in listed
        if _ADAPTED.fullmatch(name) and (path / name).is_dir() and any((path / name).glob("*.safetensors"))
    }
    if not components:
        raise UnknownFormat(
            f"{path} is a diffusers pipeline without safetensors weights of a denoiser or a text encoder",
            hint="save it with save_pretrained, which writes safetensors",
        )
    files = {
        f"{folder}/{file}": tuple(f"{folder}/{name}" for name in names)
        for folder, model in components.items()
        for file, names in model.files.items()
    }
    return BaseModel(path, "folder", PipelineSource(components), files, components=components)


def _open_component(path: Path) -> BaseModel:
    """A component's folder, which may hold its weights in several variants: the plain one, or the only one."""
    config = _read_config(path / CONFIG_NAME)
    indexes = {_variant(one.name): one for one in sorted(path.glob("*.safetensors.index*.json"))}
    shards = {name: read_index(index) for name, index in indexes.items()}
    belonging = {file for weight_map in shards.values() for file in weight_map.values()}
    singles = {
        _variant(one.name): one for one in sorted(path.glob("*.safetensors")) if one.name not in belonging
    }
    variants = sorted({*indexes, *singles})
    if "" not in variants and len(variants) > 1:
        raise AmbiguousFormat(
            f"{path} has its weights in several variants: {', '.join(variants)}",
            hint="keep one of them in the folder",
        )
    variant = variants[0]
    if variant in indexes:
        source = ShardedCheckpoint(path, shards[variant], indexes[variant])
        files = {name: tuple(shard.specs) for name, shard in source.shards.items()}
        return BaseModel(path, "folder", source, files, indexes[variant].name, config)
    file = SafetensorsFile(singles[variant])
    return BaseModel(path, "folder", file, {singles[variant].name: tuple(file.specs)}, None, config)


def _variant(name: str) -> str:
    """The variant a weight file or an index is of, such as ``fp16``; empty for the plain one.

    >>> _variant("model.safetensors"), _variant("model.fp16.safetensors"), _variant("model.safetensors.index.fp16.json")
    ('', 'fp16', 'fp16')
    """
    middle = name.removesuffix(".json").replace(".safetensors", "").replace(".index", "").split(".", 1)
    return middle[1] if len(middle) > 1 else ""


def _open_folder(path: Path) -> BaseModel:
    if (path / PIPELINE_NAME).exists():
        return _open_pipeline(path)
    config = _read_config(path / CONFIG_NAME)
    index = _find_index(path)
    if index is not None:
        source = ShardedCheckpoint(path, read_index(index), index)
        files = {name: tuple(shard.specs) for name, shard in source.shards.items()}
        return BaseModel(path, "folder", source, files, index.name, config)
    single = _find_single(path)
    file = SafetensorsFile(single)
    return BaseModel(path, "folder", file, {single.name: tuple(file.specs)}, None, config)


def _find_index(path: Path) -> Path | None:
    if (path / INDEX_NAME).exists():
        return path / INDEX_NAME
    if (path / SINGLE_NAME).exists():
        return None
    found = sorted(path.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise AmbiguousFormat(f"{path} has several indexes: {', '.join(p.name for p in found)}")
    return found[0] if found else None


def _find_single(path: Path) -> Path:
    if (path / SINGLE_NAME).exists():
        return path / SINGLE_NAME
    found = sorted(path.glob("*.safetensors"))
    if not found:
        others = sorted(
            p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".gguf", ".h5", ".msgpack"}
        )
        hint = f"{others[0]} is not safetensors: save the model with save_pretrained" if others else None
        raise UnknownFormat(f"{path} holds no safetensors weights", hint=hint)
    if len(found) > 1:
        raise AmbiguousFormat(
            f"{path} has several weight files and no index: {', '.join(p.name for p in found[:4])}",
            hint="name one of them, or add the index",
        )
    return found[0]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(read_whole(path, MAX_CONFIG))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptFile):
            raise
        raise CorruptFile(path, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptFile(path, "is not a JSON object")
    return config


# A quantised weight is recognised by the tensors beside it: the endings of a name, and what must be there
# too. "{}" stands for the name without its ending. The first of those that must be there holds the codes:
# integers, or floats of eight bits at most. Without that check a learnt scale (a weight with a gain beside
# it) would be mistaken for one. The first row that fits names the scheme.
_MARKS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "bitsandbytes 4-bit",
        (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
        ("{}",),
    ),
    ("bitsandbytes 8-bit", (".SCB", ".weight_format"), ("{}.weight",)),
    ("mxfp4", ("_blocks",), ("{}_blocks", "{}_scales")),
    ("nvfp4", (".weight_scale_2",), ("{}.weight",)),
    ("compressed-tensors", (".weight_packed",), ("{}.weight_packed",)),
    ("GPTQ or AWQ", (".qweight",), ("{}.qweight",)),
    ("AQLM", (".codebooks",), ("{}.codes", "{}.scales")),
    ("HQQ", (".W_q",), ("{}.W_q",)),
    ("quanto", (".weight._data",), ("{}.weight._data", "{}.weight._scale")),
    ("torchao", ("weight_qdata",), ("{}weight_qdata",)),
    ("MLX", (".scales",), ("{}.weight",)),
    ("fp8 blocks", ("_scale_inv",), ("{}",)),
    ("scaled integers or fp8", ("_scale", "_scales"), ("{}",)),
)
_ENDINGS = tuple(ending for _, endings, _ in _MARKS for ending in endings)
# Where configurations declare it: transformers, older compressed-tensors, MLX.
_DECLARATIONS = ("quantization_config", "compression_config", "quantization")


def quantisation_scheme(base: BaseModel) -> str | None:
    """By what scheme the weights are quantised, from configuration and tensors; None if they are not."""
    for component in base.components.values():
        if (scheme := quantisation_scheme(component)) is not None:
            return scheme
    text = base.config.get("text_config")
    for section in (base.config, text if isinstance(text, dict) else {}):
        for declared in (section.get(key) for key in _DECLARATIONS):
            if isinstance(declared, dict) and declared:
                return str(declared.get("quant_method") or declared.get("quant_algo") or "an unnamed scheme")
    specs = base.source.specs
    candidates = [name for name in specs if name.endswith(_ENDINGS)]
    for scheme, endings, needed in _MARKS:
        for name in candidates:
            ending = next((e for e in endings if name.endswith(e)), None)
            if ending is not None and _holds_codes(specs, name.removesuffix(ending), needed):
                return scheme
    for name, spec in specs.items():
        if spec.dtype.kind == "float" and spec.dtype.bits <= 8:
            return f"{spec.dtype} weights ({name})"
    return None


def _holds_codes(specs: Mapping[str, TensorSpec], stem: str, needed: tuple[str, ...]) -> bool:
    names = [template.replace("{}", stem) for template in needed]
    if not all(name in specs for name in names):
        return False
    codes = specs[names[0]].dtype
    return codes.kind == "int" or (codes.kind == "float" and codes.bits <= 8)


def require_unquantised(base: BaseModel) -> None:
    """Refuse a quantised base by the name of its scheme: adding a delta to codes would be silently wrong.

    Raises:
        Unsupported: it is quantised.
    """
    scheme = quantisation_scheme(base)
    if scheme is not None:
        raise Unsupported(
            f"{base.name} is quantised ({scheme}); a delta cannot be added to its codes",
            hint="merge into the original 16-bit checkpoint and quantise the result",
        )
