"""``adapter_config.json`` of PEFT: its fields checked, its patterns matched as PEFT matches them, its scaling resolved.

:func:`effective_scaling` is the only place where an alpha becomes a factor. A pattern is a regular expression from a
file of unknown origin, so its size is bounded, and so is the time it may take.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loratools.errors import BadConfig, CorruptFile, NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["CONFIG_NAME", "PeftConfig", "effective_scaling", "first_match", "read_config"]

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG = 8_000_000  # bytes
MAX_PATTERN = 1_000  # characters
MAX_PATTERNS = 50_000
PATTERN_SECONDS = 0.2
DEFAULT_RANK = 8  # of PEFT's dataclass, which a file without the field means
DEFAULT_ALPHA = 8
MAX_RANK = 1_000_000

_LITERAL = re.compile(r"(\^?)((?:[\w-]|\\[.\-])+)(\$?)")
_WILDCARDS_ONLY = re.compile(r"\^?(?:[\w.-]|\\[.\-dw])+\$?")


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
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] | str = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    block_diagonal: Mapping[str, Any] | None = None  # use_bdlora
    tie_weights: bool = False  # ensure_weight_tying
    raw: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_config(path: Path) -> dict[str, Any]:
    """The JSON of a configuration file.

    Raises:
        NotFound: no such file.
        CorruptFile: not a JSON object.
    """
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


def parse_config(raw: Mapping[str, Any], where: object = CONFIG_NAME) -> PeftConfig:
    """Check the fields that decide what is computed.

    Raises:
        BadConfig: a field of the wrong type or out of range, named.
    """
    check = _Checker(raw, where)
    peft_type = check.text("peft_type")
    if peft_type is None:
        raise BadConfig(f"{where}: no peft_type", hint="is this the configuration of an adapter?")
    kind = peft_type.upper()
    warnings = []
    if kind == "LORA" and raw.get("r") is None:
        warnings.append(f"the configuration has no r; PEFT takes {DEFAULT_RANK}")
    alpha_field = "alpha" if kind in {"LOHA", "LOKR"} else "lora_alpha"
    if kind in {"LORA", "LOHA", "LOKR"} and raw.get(alpha_field) is None:
        warnings.append(f"the configuration has no {alpha_field}; PEFT takes {DEFAULT_ALPHA}")
    # AdaLoRA's rank_pattern says which ranks survived, as booleans; its ranks are read from the tensors.
    patterns = {} if kind == "ADALORA" else check.patterns("rank_pattern")
    return PeftConfig(
        peft_type=kind,
        base_model=check.text("base_model_name_or_path"),
        rank=check.count("init_r" if kind == "ADALORA" else "r", DEFAULT_RANK),
        alpha=check.number(alpha_field, DEFAULT_ALPHA),
        use_rslora=check.flag("use_rslora"),
        use_dora=check.flag("use_dora"),
        bias=check.text("bias") or "none",
        init=raw.get("init_lora_weights", True),
        rank_pattern=patterns,
        alpha_pattern=check.patterns("alpha_pattern"),
        modules_to_save=check.names("modules_to_save"),
        target_modules=check.names_or_pattern("target_modules"),
        target_parameters=check.names("target_parameters"),
        feedforward_modules=check.names_or_pattern("feedforward_modules") or (),
        token_indices=check.token_indices(kind),
        block_diagonal=raw.get("use_bdlora") if isinstance(raw.get("use_bdlora"), dict) else None,
        tie_weights=check.flag("ensure_weight_tying"),
        raw=raw,
        warnings=tuple(warnings),
    )


class _Checker:
    """Typed reads of a JSON object, with the field's name in every complaint."""

    def __init__(self, raw: Mapping[str, Any], where: object) -> None:
        self.raw = raw
        self.where = where

    def fail(self, name: str, wanted: str) -> BadConfig:
        return BadConfig(f"{self.where}: {name} is {str(self.raw.get(name))[:60]!r}, expected {wanted}")

    def text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return bool(value)

    def count(self, name: str, default: int) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self.fail(name, f"a whole number from 1 to {MAX_RANK:,}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.fail(name, "a number")
        return value  # type: ignore[no-any-return]

    def names(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(name, "a list of names")
        return tuple(value)

    def names_or_pattern(self, name: str) -> tuple[str, ...] | str | None:
        value = self.raw.get(name)
        if isinstance(value, str) and len(value) > MAX_PATTERN * 100:
            raise self.fail(name, "a shorter pattern")
        return value if value is None or isinstance(value, str) else self.names(name)

    def patterns(self, name: str) -> dict[str, Any]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise self.fail(name, f"an object of at most {MAX_PATTERNS:,} patterns")
        for pattern, number in value.items():
            if len(pattern) > MAX_PATTERN:
                raise BadConfig(f"{self.where}: a pattern of {len(pattern):,} characters in {name}")
            if type(number) not in (int, float) or not math.isfinite(number):
                raise BadConfig(f"{self.where}: {name}[{pattern[:60]!r}] is not a number")
            if name == "rank_pattern" and (type(number) is not int or not 1 <= number <= MAX_RANK):
                raise BadConfig(f"{self.where}: {name}[{pattern[:60]!r}] is {number}, expected a rank")
        return dict(value)

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
            raise self.fail(name, "lists of token indices")
        return {embedding: tuple(rows) for embedding, rows in value.items()}


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
    rank = first_match(config.rank_pattern, name, config.rank)
    alpha = first_match(config.alpha_pattern, name, config.alpha)
    return rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern, in the file's order, that ends ``name`` at a dot.

    PEFT's rule (``get_pattern_key``): ``re.match(rf"(.*\\.)?({key})$", name)``.

    >>> first_match({"q_proj": 4, r"layers\\.0\\.q_proj": 8}, "model.layers.0.q_proj", 16)
    4
    """
    for pattern, value in patterns.items():
        if _matches(pattern, name):
            return value
    return default


def _matches(pattern: str, name: str) -> bool:
    if literal := _LITERAL.fullmatch(pattern):
        text = literal[2].replace("\\", "")
        return name == text or (not literal[1] and name.endswith("." + text))
    return _compiled(pattern)(name)


@lru_cache(maxsize=MAX_PATTERNS)
def _compiled(pattern: str) -> Any:
    """A function from a name to whether it matches, which stops in bounded time."""
    whole = rf"(.*\.)?({pattern})$"
    try:
        if _WILDCARDS_ONLY.fullmatch(pattern):  # no repetition or choice: nothing to run away with
            return re.compile(whole).match
        import regex

        compiled = regex.compile(whole)
    except (re.error, ValueError) as error:
        raise BadConfig(f"pattern {pattern[:60]!r} is no regular expression: {error}") from error
    except Exception as error:  # regex.error has its own tree
        raise BadConfig(f"pattern {pattern[:60]!r} is no regular expression: {error}") from error

    def match(name: str) -> Any:
        try:
            return compiled.match(name, timeout=PATTERN_SECONDS)
        except TimeoutError as error:
            raise BadConfig(
                f"pattern {pattern[:60]!r} takes too long to match {name}",
                hint="such a pattern can be written to stall whoever loads the file",
            ) from error

    return match
