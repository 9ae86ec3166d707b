"""``adapter_config.json`` of PEFT: its fields checked, and its scaling resolved.

:func:`effective_scaling` is the only place where an alpha becomes a factor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from loratools.errors import BadConfig, CorruptFile, NotFound
from loratools.formats.patterns import MAX_PATTERN, Names, Patterns

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "COMPUTED",
    "CONFIG_NAME",
    "PeftConfig",
    "effective_scaling",
    "first_match",
    "parse_config",
    "read_config",
    "require_regular",
]

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG = 8_000_000  # bytes
MAX_PATTERNS = 50_000
DEFAULT_RANK = 8  # of PEFT's dataclass, which a file without the field means
DEFAULT_ALPHA = 8
MAX_RANK = 1_000_000

# The types whose rank and alpha this build computes with; in others, r may well be 0.
COMPUTED = ("LORA", "ADALORA", "LOHA", "LOKR")
_ALPHA_FIELDS = {"LOHA": "alpha", "LOKR": "alpha"}


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that change what a merge computes; ``raw`` has the rest."""

    peft_type: str
    base_model: str | None = None
    rank: int = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init: object = True  # init_lora_weights
    rank_pattern: Patterns = field(default_factory=Patterns)
    alpha_pattern: Patterns = field(default_factory=Patterns)
    modules_to_save: tuple[str, ...] = ()
    target_modules: Names = field(default_factory=lambda: Names(None))
    exclude_modules: Names = field(default_factory=lambda: Names(None))
    target_parameters: tuple[str, ...] = ()
    feedforward_modules: Names = field(default_factory=lambda: Names(None))
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    block_diagonal: Mapping[str, Any] | None = None  # use_bdlora
    tie_weights: bool = False  # ensure_weight_tying
    raw: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def require_regular(path: Path) -> None:
    """Refuse a pipe or a device, which may keep whoever opens it waiting for ever. What is not there may pass.

    Raises:
        CorruptFile: it is there, and is no file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CorruptFile(path, "not a regular file", hint="save its content to a file and name that")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a configuration file.

    Raises:
        NotFound: no such file.
        CorruptFile: not a JSON object.
    """
    require_regular(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such file") from error
    if data.startswith(b"version https://git-lfs"):
        raise CorruptFile(
            path, "is a Git LFS pointer, not the configuration", hint="fetch the real file: git lfs pull"
        )
    if len(data) > MAX_CONFIG:
        raise CorruptFile(path, f"{len(data):,} bytes; {MAX_CONFIG:,} are allowed")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CorruptFile(path, "is not a JSON object")
    return raw


def parse_config(
    raw: Mapping[str, Any], where: object = CONFIG_NAME, faults: list[BadConfig] | None = None
) -> PeftConfig:
    """Check the fields that decide what is computed.

    Args:
        raw: the JSON object.
        where: what a message calls it.
        faults: collects every fault, and the field counts as absent; by default the first one is raised.

    Raises:
        BadConfig: a field of the wrong type or out of range, named.
    """
    check = _Checker(raw, where, faults)
    kind = check.peft_type()
    alpha_field = _ALPHA_FIELDS.get(kind, "lora_alpha")
    computed = kind in COMPUTED
    warnings = []
    if kind in COMPUTED and kind != "ADALORA":
        defaults = {"r": DEFAULT_RANK, alpha_field: DEFAULT_ALPHA}
        warnings += [
            f"the configuration has no {name}; PEFT takes {value}"
            for name, value in defaults.items()
            if raw.get(name) is None
        ]
    # AdaLoRA's rank_pattern says which ranks survived, as booleans; its ranks are read from the tensors.
    rank_field = "init_r" if kind == "ADALORA" else "r"
    return PeftConfig(
        peft_type=kind,
        base_model=check.text("base_model_name_or_path"),
        rank=check.count(rank_field, DEFAULT_RANK) if computed else DEFAULT_RANK,
        alpha=check.number(alpha_field, DEFAULT_ALPHA) if computed else DEFAULT_ALPHA,
        use_rslora=check.flag("use_rslora"),
        use_dora=check.flag("use_dora"),
        bias=(check.text("bias") if computed else None) or "none",
        init=raw.get("init_lora_weights", True),
        rank_pattern=check.patterns("rank_pattern") if computed and kind != "ADALORA" else Patterns(),
        alpha_pattern=check.patterns("alpha_pattern") if computed else Patterns(),
        modules_to_save=check.names("modules_to_save"),
        target_modules=check.names_or_pattern("target_modules"),
        exclude_modules=check.names_or_pattern("exclude_modules"),
        target_parameters=check.names("target_parameters") if computed else (),
        feedforward_modules=check.names_or_pattern("feedforward_modules"),
        token_indices=check.token_indices(kind),
        block_diagonal=check.block_diagonal(),
        tie_weights=check.flag("ensure_weight_tying"),
        raw=raw,
        warnings=tuple(warnings),
    )


class _Checker:
    """Typed reads of a JSON object, with the field's name in every complaint."""

    def __init__(self, raw: Mapping[str, Any], where: object, faults: list[BadConfig] | None) -> None:
        self.raw = raw
        self.where = where
        self.faults = faults

    def fault(self, message: str, default: T, hint: str | None = None) -> T:
        """Raise, or collect and go on with ``default``."""
        error = BadConfig(f"{self.where}: {message}", hint=hint)
        if self.faults is None:
            raise error
        self.faults.append(error)
        return default

    def wrong(self, name: str, wanted: str, default: T) -> T:
        value = self.raw.get(name)
        shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
        return self.fault(f"{name} is {shown[:60]}, expected {wanted}", default)

    def peft_type(self) -> str:
        value = self.raw.get("peft_type")
        if value is None:
            hint = "is this the configuration of an adapter?"
            return self.fault("no peft_type", "LORA", hint)
        if not isinstance(value, str):
            return self.wrong("peft_type", "a name such as LORA", "LORA")
        return value.upper().removeprefix("PEFTTYPE.")

    def text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            return self.wrong(name, "a string", None)
        return value

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            return self.wrong(name, "true or false", False)
        return bool(value)

    def count(self, name: str, default: int) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            return self.wrong(name, f"a whole number from 1 to {MAX_RANK:,}", default)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            return self.wrong(name, "a number", default)
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return self.wrong(name, "a list of names", ())
        return tuple(value)

    def names_or_pattern(self, name: str) -> Names:
        value = self.raw.get(name)
        if isinstance(value, str) and len(value) > MAX_PATTERN * 100:
            return self.wrong(name, "a shorter pattern", Names(None))
        found = value if value is None or isinstance(value, str) else self.names(name)
        return Names(found, f"{self.where}: {name}", self.faults)

    def patterns(self, name: str) -> Patterns:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            return self.wrong(name, f"an object of at most {MAX_PATTERNS:,} patterns", Patterns())
        kept = {}
        for pattern, number in value.items():
            entry = f"{name}[{pattern[:60]!r}]"
            if len(pattern) > MAX_PATTERN:
                self.fault(f"a pattern of {len(pattern):,} characters in {name}", None)
            elif type(number) not in (int, float) or not math.isfinite(number):
                self.fault(f"{entry} is not a number", None)
            elif name == "rank_pattern" and (type(number) is not int or not 1 <= number <= MAX_RANK):
                self.fault(f"{entry} is {number}, expected a rank", None)
            else:
                kept[pattern] = number
        return Patterns(kept, f"{self.where}: {name}", self.faults)

    def token_indices(self, kind: str) -> dict[str, tuple[int, ...]]:
        name = "token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
        value = self.raw.get(name)
        if value is None:
            return {}
        if isinstance(value, list):  # of the model's input embedding, whatever it is called
            targets = self.raw.get("target_modules") if kind == "TRAINABLE_TOKENS" else None
            value = dict.fromkeys([targets] if isinstance(targets, str) else (targets or [""]), value)
        ok = isinstance(value, dict) and all(
            isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
            for rows in value.values()
        )
        if not ok:
            return self.wrong(name, "lists of token indices", {})
        return {embedding: tuple(rows) for embedding, rows in value.items()}

    def block_diagonal(self) -> Mapping[str, Any] | None:
        """``use_bdlora``, with its lists of names and its count checked: they decide how factors are read."""
        value = self.raw.get("use_bdlora")
        if not value:
            return None
        lists = ("target_modules_bd_a", "target_modules_bd_b")
        blocks = value.get("nblocks", 1) if isinstance(value, dict) else 0
        named = isinstance(value, dict) and all(
            isinstance(value.get(key) or [], list) and all(isinstance(n, str) for n in value.get(key) or [])
            for key in lists
        )
        if not named or type(blocks) is not int or not 1 <= blocks <= MAX_RANK:
            return self.wrong("use_bdlora", "an object with nblocks and lists of module names", None)
        return value  # type: ignore[no-any-return]


def effective_scaling(config: PeftConfig, name: str) -> tuple[int, float, float]:
    """Rank, alpha and scaling of one module, as PEFT resolves them: each by its own first matching pattern.

    >>> effective_scaling(PeftConfig("LORA", rank=16, alpha=16, use_rslora=True), "model.layers.0.q_proj")
    (16, 16, 4.0)

    Args:
        config: the adapter's.
        name: of the module, relative to the base model.

    Returns:
        The rank and alpha the configuration gives it, and alpha / rank (alpha / sqrt(rank) with rsLoRA).

    Raises:
        BadConfig: a pattern takes too long, or is no regular expression.
    """
    rank = config.rank_pattern.first(name, config.rank)
    alpha = config.alpha_pattern.first(name, config.alpha)
    return rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    r"""The value of the first pattern, in the file's order, that ends ``name`` at a dot.

    >>> first_match({"q_proj": 4, r"layers\.0\.q_proj": 8}, "model.layers.0.q_proj", 16)
    4

    Raises:
        BadConfig: a pattern takes too long, or is no regular expression.
    """
    return Patterns(patterns).first(name, default)
