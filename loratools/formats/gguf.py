"""GGUF adapters of llama.cpp: pairs of factors under ggml's names, and one alpha.

llama.cpp scales by alpha over the rank of each pair; an alpha of 0 means a scale of 1. For models whose rotary
embedding turns neighbouring elements, the rows of q and k are stored in another order, and so are those of their
``lora_b``. Facts: llama.cpp of 2026-10.
"""

from __future__ import annotations

import math
import re
import struct
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, AdapterConfig, Extra, Module
from loratools.dtypes import DTYPES
from loratools.errors import BadConfig, InputError, Mismatch, ShapeMismatch, UnknownFormat, Unsupported
from loratools.formats.pairs import alike, as_type, commonest, folded, plain_pairs
from loratools.formats.refusals import why_broken
from loratools.formats.registry import Written
from loratools.metadata.translation import facts, say_facts
from loratools.tensors.base import TensorRef
from loratools.tensors.gguf import GgufFile, gguf_package
from loratools.tensors.memory import MemorySource, from_bytes
from loratools.tensors.pieces import slab
from loratools.tensors.views import permuted, placed, stacked, transposed

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from loratools.architectures.base import Architecture
    from loratools.dtypes import Dtype
    from loratools.formats.pairs import Pair
    from loratools.tensors.base import TensorSource

__all__ = ["MODELS", "Model", "read_gguf", "read_gguf_bytes", "with_base", "write_gguf"]

ARCHITECTURE, TYPE, ADAPTER_TYPE = "general.architecture", "general.type", "adapter.type"
ALPHA, BASE_NAME = "adapter.lora.alpha", "general.base_model.0.name"
_INVOCATION = "adapter.alora.invocation_tokens"
_SUFFIX = re.compile(r"(?P<tensor>.+)\.weight\.lora_(?P<word>[ab])")
_EMBEDDING = "token_embd"
_HEAD = "output"
_NORM = "a norm's weight that was trained as a whole, which llama.cpp passes over in an adapter"
_BASE_HINT = (
    "pass --base with the model's folder; where a verb has no --base, leave out --to gguf and then "
    "loratools convert OUT x.gguf --to gguf --base BASE"
)


@dataclass(frozen=True, slots=True)
class Model:
    """A family of models, as llama.cpp knows it.

    Attributes:
        architecture: its name in GGUF.
        types: Hugging Face's ``model_type``.
        modules: Hugging Face's names of the modules in a decoder layer.
        experts: those of the experts, with ``{i}`` for the number.
        interleaved: whether the rows of q and k are stored in another order.
        tied: whether input and output embedding are one weight where the configuration does not say.
    """

    architecture: str
    types: tuple[str, ...]
    modules: tuple[str, ...]
    experts: tuple[str, ...] = ()
    interleaved: bool = False
    tied: bool = False


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_USUAL = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_MIXTRAL = tuple(f"block_sparse_moe.experts.{{i}}.{part}" for part in ("w1", "w2", "w3"))
MODELS = (
    Model(
        "llama",
        ("llama", "mistral", "mixtral"),
        (*_USUAL, "block_sparse_moe.gate"),
        _MIXTRAL,
        interleaved=True,
    ),
    Model("qwen2", ("qwen2",), _USUAL),
    Model("qwen3", ("qwen3",), _USUAL),
    Model("gemma2", ("gemma2",), _USUAL, tied=True),
    Model("gemma3", ("gemma3", "gemma3_text"), _USUAL, tied=True),
    Model("phi3", ("phi3",), ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
)
_QUERY, _KEY = "self_attn.q_proj", "self_attn.k_proj"
# What stands before the decoder layers, in a language model of its own or as a part of a larger one.
_STEM = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|model\.)?(?=layers\.\d+\.|embed_tokens$)"
)
_OUTER = re.compile(r"(?:language_model\.)?(?=lm_head$)")
_LAYER = re.compile(r"model\.layers\.(?P<block>\d+)\.(?P<module>.+)")
_NUMBERED = re.compile(r"\.experts\.(\d+)\.")


# --- names ---------------------------------------------------------------------------------------------------


def _model(architecture: str) -> Model | None:
    return next((model for model in MODELS if model.architecture == architecture), None)


def _known() -> str:
    return ", ".join(model.architecture for model in MODELS)


def _tensor_names(model: Model, blocks: int) -> dict[str, str]:
    """The tensor, in ggml's terms, of each of a model's modules; ``{i}`` stands for the number of an expert."""
    package = gguf_package()
    by_name = {name: arch for arch, name in package.MODEL_ARCH_NAMES.items()}
    table = package.get_tensor_name_map(by_name[model.architecture], blocks)
    names = {"model.embed_tokens": _EMBEDDING}
    if (head := table.get_name("lm_head")) is not None:
        names["lm_head"] = head
    for block in range(blocks):
        for module in (*model.modules, *model.experts):
            full = f"model.layers.{block}.{module}"
            found = table.get_name(full.replace(".{i}.", "."))
            if found is not None:
                names[full] = found
    return names


def _plain(name: str) -> str:
    """A module's name as in a language model of its own.

    >>> _plain("model.language_model.layers.0.mlp.up_proj"), _plain("layers.0.mlp.up_proj")
    ('model.layers.0.mlp.up_proj', 'model.layers.0.mlp.up_proj')
    """
    if (found := _STEM.match(name)) is not None:
        return f"model.{name[found.end() :]}"
    return _OUTER.sub("", name, count=1)


# --- heads ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """How many heads q and k have."""

    query: int
    key: int

    def of(self, module: str) -> int | None:
        """The heads whose rows are interleaved in a module; None where its rows keep their order."""
        return {_QUERY: self.query, _KEY: self.key}.get(module)


def _heads(config: Mapping[str, Any], query: str, key: str) -> _Heads | None:
    """From a configuration's fields; None where it has none."""
    counts = [config.get(query), config.get(key) or config.get(query)]
    if counts[0] is None:
        return None
    for field, count in zip((query, key), counts, strict=True):
        if type(count) is not int or count < 1:
            raise BadConfig(f"{field} is {count!r}, expected a number of heads")
    return _Heads(*counts)  # type: ignore[arg-type]


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a vision model's configuration, the language model's part."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _interleaved(name: str, up: TensorRef, heads: int, *, back: bool) -> TensorRef:
    """The rows of q's or k's factor in ggml's order, or back in Hugging Face's: two halves of a head, or pairs."""
    rows, rank = up.shape
    if rows % (2 * heads):
        raise ShapeMismatch(
            name, up.shape, (heads, rows // heads), hint=f"{heads} heads cannot share {rows} rows"
        )
    half = rows // heads // 2
    inner = (heads, half, 2, rank) if back else (heads, 2, half, rank)
    return permuted(up, inner, (0, 2, 1, 3), up.shape)


# --- reading -------------------------------------------------------------------------------------------------


def read_gguf(
    name: str, path: str | os.PathLike[str], *, base_config: Mapping[str, Any] | None = None
) -> Adapter:
    """Turn ggml's names into Hugging Face's; reads no values.

    Args:
        name: what to call it in messages.
        path: of the file.
        base_config: the base's ``config.json``, for the heads of llama and mistral, where the file does not say them.

    Raises:
        UnknownFormat: it is no adapter but a model.
        BadConfig: its alpha is no number.
        CorruptFile: it breaks a rule of GGUF.
        Unsupported: the ``gguf`` package is not installed.
    """
    source = GgufFile(path)
    return _adapter(name, source, source.fields, base_config)


def read_gguf_bytes(name: str, raw: bytes) -> Adapter:
    """The same for a file in memory, such as :func:`write_gguf` makes; its values are read. Errors are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        path.write_bytes(raw)
        file = GgufFile(path)
        values = {
            key: from_bytes(file.read_bytes(key), spec, torch_out=False) for key, spec in file.specs.items()
        }
        file.file.close()
    return _adapter(name, MemorySource(values, file.metadata), file.fields, None)


def _adapter(
    name: str, source: TensorSource, fields: Mapping[str, Any], base_config: Mapping[str, Any] | None
) -> Adapter:
    if fields.get(TYPE) != "adapter":
        kind = fields.get(TYPE, "model")
        raise UnknownFormat(f"{name} is a GGUF {kind}, not a LoRA adapter ({TYPE})")
    if fields.get(ADAPTER_TYPE, "lora") != "lora":
        raise UnknownFormat(f"{name} is a GGUF adapter of {ADAPTER_TYPE} {fields[ADAPTER_TYPE]!r}, not lora")
    alpha = _alpha(name, fields)
    reading = _Reading(name, str(fields.get(ARCHITECTURE)), fields, base_config)
    groups, extras = _grouped(source)
    modules: dict[str, Module] = {}
    broken: dict[str, str] = {}
    names = reading.names(groups)
    for tensor, roles in groups.items():
        problem = _problem(tensor, roles)
        if problem is None and tensor not in names and reading.model is not None:
            problem = f"{tensor} is no module of {reading.model.architecture} that this build knows"
        if problem is not None:
            broken[tensor] = problem
            extras |= {ref.name: Extra(ref, tensor, "unclaimed", problem) for ref in roles.values()}
            continue
        for full, module in reading.modules(tensor, names.get(tensor, tensor), roles):
            rank = module.rank or 1
            said = alpha or float(rank)
            modules[full] = replace(module, alpha=said, scaling=said / rank)
    base = fields.get(BASE_NAME)
    return Adapter(
        name=name,
        format="gguf",
        modules=modules,
        config=AdapterConfig(None, base if isinstance(base, str) else None, _without_counts(fields)),
        metadata=source.metadata,
        extras=extras,
        evidence="general.type is adapter",
        kinds=("lora",),
        warnings=_doubts(fields) if alpha == 0 else (),
        refusal=_why_activated(fields) or reading.refusal(modules) or why_broken(broken),
        tensors=tuple(TensorRef(source, key) for key in source.specs),
    )


def with_base(adapter: Adapter, base_config: Mapping[str, Any]) -> Adapter:
    """A GGUF adapter whose file does not say the heads, read with the base's ``config.json``; any other as it is.

    Raises:
        BadConfig: the configuration's heads are no numbers.
        ShapeMismatch: q or k does not consist of so many.
    """
    source = adapter.tensors[0].source if adapter.tensors else None
    if adapter.refusal is None or not isinstance(source, GgufFile):
        return adapter
    return read_gguf(adapter.name, source.path, base_config=base_config)


def _why_activated(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    if fields.get(_INVOCATION):
        return (
            f"is an activated LoRA ({_INVOCATION}): it applies to some tokens only",
            "keep it as an adapter",
        )
    return None


def _without_counts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without what the package counts itself."""
    return {name: value for name, value in fields.items() if not name.startswith("GGUF.")}


def _alpha(name: str, fields: Mapping[str, Any]) -> float:
    alpha = fields.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise BadConfig(f"{name}: {ALPHA} is {alpha!r}, expected a number")
    return float(alpha)


def _doubts(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a file whose alpha says nothing."""
    how = "is 0" if ALPHA in fields else "is missing"
    return (f"{ALPHA} {how}, which llama.cpp takes as a scale of 1",)


def _grouped(source: TensorSource) -> tuple[dict[str, dict[str, TensorRef]], dict[str, Extra]]:
    groups: dict[str, dict[str, TensorRef]] = {}
    extras: dict[str, Extra] = {}
    for key in source.specs:
        ref, found = TensorRef(source, key), _SUFFIX.fullmatch(key)
        if found is not None:
            groups.setdefault(found["tensor"], {})[found["word"]] = ref
        elif key.endswith("_norm.weight"):
            extras[key] = Extra(ref, key, "unclaimed", _NORM)
        else:
            extras[key] = Extra(ref, key, "unclaimed", "neither lora_a nor lora_b")
    return groups, extras


def _problem(tensor: str, roles: Mapping[str, TensorRef]) -> str | None:
    """Why these make no module; None where they do."""
    if roles.keys() != {"a", "b"}:
        return f"{', '.join(ref.name for ref in roles.values())} without the factor it belongs to"
    a, b = roles["a"].shape, roles["b"].shape
    if 0 in (*a, *b) or len(a) != len(b) or len(a) not in {2, 3} or (len(a) == 3 and a[0] != b[0]):
        return f"lora_a {list(a)} and lora_b {list(b)} do not fit"
    rank = a[-1] if tensor == _EMBEDDING else a[-2]
    return None if rank == b[-1] else f"lora_a {list(a)} and lora_b {list(b)} have different ranks"


class _Reading:
    """What the names and shapes of one file mean."""

    def __init__(
        self, name: str, architecture: str, fields: Mapping[str, Any], config: Mapping[str, Any] | None
    ) -> None:
        self.name = name
        self.architecture = architecture
        self.model = _model(architecture)
        keys = (f"{architecture}.attention.head_count", f"{architecture}.attention.head_count_kv")
        self.heads = _heads(fields, *keys)
        if self.heads is None and config:
            self.heads = _heads(_text(config), "num_attention_heads", "num_key_value_heads")

    def names(self, groups: Mapping[str, object]) -> dict[str, str]:
        """Hugging Face's name of each tensor; ``{i}`` stands for the number of an expert."""
        if self.model is None:
            return {}
        blocks = [int(found[1]) for tensor in groups if (found := re.match(r"blk\.(\d{1,5})\.", tensor))]
        return {ggml: full for full, ggml in _tensor_names(self.model, max(blocks, default=-1) + 1).items()}

    def modules(self, tensor: str, full: str, roles: Mapping[str, TensorRef]) -> Iterator[tuple[str, Module]]:
        a, b = roles["a"], roles["b"]
        if len(a.shape) == 3:
            for index in range(a.shape[0]):
                path = full.replace("{i}", str(index)) if "{i}" in full else f"{full}.{index}"
                yield path, _module(slab(a, index, a.shape[1:]), slab(b, index, b.shape[1:]))
            return
        if tensor == _EMBEDDING:
            yield full, _module(transposed(a), b, embedding=True)
            return
        heads = self._heads_of(full)
        yield full, _module(a, b if heads is None else _interleaved(full, b, heads, back=True))

    def _heads_of(self, full: str) -> int | None:
        found = _LAYER.fullmatch(full)
        if self.model is None or not self.model.interleaved or self.heads is None or found is None:
            return None
        return self.heads.of(found["module"])

    def refusal(self, modules: Mapping[str, Module]) -> tuple[str, str] | None:
        if self.model is None:
            return (
                f"is an adapter for {self.architecture}, whose tensors this build cannot name",
                f"it knows {_known()}",
            )
        turned = [path for path in modules if path.endswith((_QUERY, _KEY))]
        if self.model.interleaved and self.heads is None and turned:
            return (
                f"{turned[0]}: its rows are in llama.cpp's order, and nothing says how many heads there are",
                "pass --base with the model's folder, or --config with its config.json",
            )
        return None


def _module(down: TensorRef, up: TensorRef, *, embedding: bool = False) -> Module:
    options: dict[str, Any] = {"embedding": True} if embedding else {}
    return Module(
        "lora", {"down": down, "up": up}, down.shape[0], None, None, (up.shape[0], down.shape[1]), options
    )


# --- writing -------------------------------------------------------------------------------------------------


def write_gguf(
    adapter: Adapter,
    architecture: Architecture | None = None,
    *,
    base_config: Mapping[str, Any] | None = None,
    dtype: Dtype | None = None,
) -> Written:
    """An adapter as llama.cpp loads it: the bytes of one file, ``Written.files[Written.weights]``.

    The alpha is the one that most modules need for their scale; what others need besides is folded into ``lora_b``,
    exactly where the ratio is a power of two.

    Args:
        adapter: of a language model, under Hugging Face's names.
        architecture: not needed.
        base_config: the base's ``config.json``: its family and its heads.
        dtype: of the factors: F32 (the default), F16 or BF16.

    Raises:
        Unsupported: nothing says the base's family, this build does not know it, or no module can be written.
        NonFinite: a value does not fit the type.
        ShapeMismatch: q or k does not consist of so many heads.
    """
    del architecture
    wanted = DTYPES["F32"] if dtype is None else dtype
    if wanted.name not in {"F32", "F16", "BF16"}:
        raise Unsupported(
            f"a GGUF adapter cannot be written in {wanted}", hint="f32, f16 and bf16 are possible"
        )
    model, heads, tied = _base(adapter, base_config)
    pairs, lost = plain_pairs(adapter, dora=False)
    named, unknown = _named(model, pairs, tied=tied)
    lost |= unknown
    _require_heads(adapter.name, model, heads, [name for stack in named.values() for name in stack])
    if not named:
        first = next((f"{name}: {reason}" for name, reason in lost.items()), None)
        raise Unsupported(f"{adapter.name}: none of its modules can be written as GGUF", hint=first)
    alpha = _shared_alpha(pairs[name] for stack in named.values() for name in stack)
    tensors: dict[str, TensorRef] = {}
    turned = heads if model.interleaved else None
    for tensor, stack in named.items():
        rank = max(pairs[name].rank for name in stack)
        a, b = _factors(tensor, [_scaled(name, pairs[name], alpha, turned, rank) for name in stack])
        tensors[f"{tensor}.weight.lora_a"], tensors[f"{tensor}.weight.lora_b"] = a, b
    name = "adapter.gguf"
    return Written({}, {}, {name: _file(adapter, model, heads, alpha, tensors, wanted)}, name, lost)


def _base(adapter: Adapter, config: Mapping[str, Any] | None) -> tuple[Model, _Heads | None, bool]:
    """The family, the heads, and whether the embeddings are tied."""
    raw = adapter.config.raw
    if config:
        text = _text(config)
        kind = str(text.get("model_type") or config.get("model_type"))
        model = next((model for model in MODELS if kind in model.types), None)
        if model is None:
            raise Unsupported(f"GGUF adapters for {kind} are not in this build", hint=f"it knows {_known()}")
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        heads = _heads(text, "num_attention_heads", "num_key_value_heads")
        return model, heads, model.tied if tied is None else bool(tied)
    named = raw.get(ARCHITECTURE)  # it was read from GGUF
    if isinstance(named, str) and (found := _model(named)) is not None:
        keys = (f"{named}.attention.head_count", f"{named}.attention.head_count_kv")
        return found, _heads(raw, *keys), found.tied
    raise Unsupported(
        f"{adapter.name}: a GGUF adapter names its base's family, and nothing here says it", hint=_BASE_HINT
    )


def _require_heads(adapter: str, model: Model, heads: _Heads | None, names: list[str]) -> None:
    turned = next((name for name in names if name.endswith((_QUERY, _KEY))), None)
    if model.interleaved and heads is None and turned is not None:
        raise Unsupported(
            f"{adapter}: {turned} needs the base's number of heads (num_attention_heads)", hint=_BASE_HINT
        )


def _named(
    model: Model, pairs: Mapping[str, Pair], *, tied: bool
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Module names by ggml's tensor, several where experts are stacked; and those it has no tensor for."""
    plain = {name: _plain(name) for name in pairs}
    found = (_LAYER.fullmatch(path) for path in plain.values())
    table = _tensor_names(model, max((int(one["block"]) for one in found if one), default=-1) + 1)
    named: dict[str, list[str]] = {}
    experts: dict[str, dict[int, str]] = {}
    lost: dict[str, str] = {}
    for name, path in plain.items():
        index = _NUMBERED.search(path)
        tensor = table.get(path if index is None else _NUMBERED.sub(".experts.{i}.", path, count=1))
        if path == "lm_head" and (tensor is None or tied):
            lost[name] = (
                "the base's output embedding is its input embedding, where llama.cpp ignores an lm_head"
            )
        elif tensor is None:
            lost[name] = f"llama.cpp's {model.architecture} has no tensor for it"
        elif index is not None:
            experts.setdefault(tensor, {})[int(index[1])] = name
        elif tensor in named:
            raise Mismatch(f"{named[tensor][0]} and {name} are both {tensor}")
        else:
            named[tensor] = [name]
    for tensor, members in experts.items():
        reason = _why_not_stacked([pairs[name] for name in members.values()], members)
        if reason is None:
            named[tensor] = [members[index] for index in sorted(members)]
        else:
            lost |= dict.fromkeys(members.values(), reason)
    return named, lost


def _why_not_stacked(pairs: list[Pair], members: Mapping[int, str]) -> str | None:
    missing = next((index for index in range(len(members)) if index not in members), None)
    if missing is not None:
        return f"llama.cpp stacks all experts, and expert {missing} has no factors"
    if len({(pair.down.shape[1], pair.up.shape[0]) for pair in pairs}) > 1:
        return "llama.cpp stacks all experts, and they have different shapes"
    return None


def _single(value: float) -> float:
    """A number as float32 has it."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError as error:
        raise Unsupported(f"an alpha of {value:g} does not fit float32") from error


def _shared_alpha(pairs: Iterator[Pair]) -> float:
    """The alpha that most modules need. Never 0, which would mean a scale of 1."""
    return commonest(_single(pair.scaling * pair.rank) for pair in pairs) or 1.0


def _scaled(name: str, pair: Pair, alpha: float, heads: _Heads | None, rank: int) -> Pair:
    """A pair of a given rank whose scale is alpha over it, with the rows of its upper factor in ggml's order."""
    down, up = pair.down, pair.up
    if _single(pair.scaling * rank) != alpha:
        up = folded(up, pair.scaling * rank / alpha)
    if pair.rank != rank:
        down = placed([down], [(0, 0)], (rank, down.shape[1]))
        up = placed([up], [(0, 0)], (up.shape[0], rank))
    found = _LAYER.fullmatch(_plain(name))
    count = None if heads is None or found is None else heads.of(found["module"])
    return replace(pair, down=down, up=up if count is None else _interleaved(name, up, count, back=False))


def _factors(tensor: str, members: list[Pair]) -> tuple[TensorRef, TensorRef]:
    """The two tensors of one weight."""
    if tensor.endswith("_exps"):
        return stacked(alike(pair.down for pair in members)), stacked(alike(pair.up for pair in members))
    (pair,) = members
    return (transposed(pair.down) if tensor == _EMBEDDING else pair.down), pair.up


def _file(
    adapter: Adapter,
    model: Model,
    heads: _Heads | None,
    alpha: float,
    tensors: Mapping[str, TensorRef],
    wanted: Dtype,
) -> bytes:
    """A whole file's bytes. The factors pass through memory one by one; the file is put together on the disk."""
    package = gguf_package()
    import numpy as np

    writer = package.GGUFWriter(None, model.architecture)
    writer.add_type(package.GGUFType.ADAPTER)
    writer.add_string(ADAPTER_TYPE, "lora")
    writer.add_float32(ALPHA, alpha)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_string("loratools", version("loratools"))  # whose file it is, so that it may be replaced
    said = facts({**adapter.config.raw, **adapter.metadata})
    if adapter.config.base_model:
        said["base_model"] = adapter.config.base_model
    for name, text in say_facts(said, "gguf").items():
        writer.add_string(name, text)
    if "base_model" in said:
        writer.add_base_model_count(1)
    if (
        model.interleaved and heads is not None
    ):  # for whoever turns the rows back; llama.cpp does not read them
        writer.add_head_count(heads.query)
        writer.add_head_count_kv(heads.key)
    kind = getattr(package.GGMLQuantizationType, wanted.name)
    for name, ref in tensors.items():
        writer.add_tensor_info(name, ref.shape, np.dtype(np.float32), wanted.nbytes(ref.spec.count), kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for ref in tensors.values():
                rounded = as_type(ref, wanted)
                writer.write_tensor_data(rounded.source.read_bytes(rounded.name), package.GGUFEndian.LITTLE)
        except OSError as error:
            raise InputError(f"{folder}: a GGUF file could not be put together ({error})") from error
        finally:
            writer.close()
        return path.read_bytes()
