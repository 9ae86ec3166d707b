"""``validate``: everything that is wrong with an adapter, or worth knowing, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.formats.gguf import with_base
from loratools.formats.opening import evidence, explain, interpret, open_parts
from loratools.formats.peft import read_peft
from loratools.models import open_base
from loratools.verbs.checking.base import check_base
from loratools.verbs.checking.configuration import check_configuration
from loratools.verbs.checking.engines import answers, check_engines, verdicts
from loratools.verbs.checking.structure import check_format, check_siblings, check_structure
from loratools.verbs.checking.subject import Subject, error
from loratools.verbs.checking.values import check_values
from loratools.verbs.reports import ValidationReport

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from loratools.errors import BadConfig
    from loratools.formats.opening import Opened
    from loratools.models import BaseModel
    from loratools.verbs.reports import Finding

__all__ = ["validate"]


def validate(
    ref: str | os.PathLike[str] | Mapping[str, Any],
    *,
    base: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    engines: str | Sequence[str] = (),
    strict: bool = False,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> ValidationReport:
    """Check an adapter: structure, configuration against tensors, values, and its fit to a base and to engines.

    >>> import numpy as np
    >>> factors = {"fc.lora_A.weight": np.ones((2, 8), "f4"), "fc.lora_B.weight": np.zeros((4, 2), "f4")}
    >>> report = validate(factors, config={"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    >>> report.ok, [finding.code for finding in report.findings if finding.severity == "error"]
    (False, ['rank-mismatch'])

    Args:
        ref: a folder, a weight file, or a state dict.
        base: the model it is meant for: every module must be found there and fit.
        engines: the programs that are to load it, such as ``"vllm"``: whether each does, whether it computes the same,
            and what to set.
        strict: warnings count as errors.
        config: the configuration, where it does not lie beside the weights: a path, or the parsed JSON.
        allow_pickle: read ``.bin`` and ``.pt`` files.

    Returns:
        Every finding, with a stable code. ``ok`` means that none is an error (nor a warning, if ``strict``).

    Raises:
        NotFound: no such file, or a folder without adapter weights.
        CorruptFile: the weights cannot be read at all. (A configuration that cannot be read is a finding.)
        Unsupported: a pickle, without leave to read it; an engine that is not known.
    """
    opened = open_parts(ref, config=config, allow_pickle=allow_pickle, tolerant=True)
    model = None if base is None else open_base(base)
    subject = _subject(opened, model)
    asked = (engines,) if isinstance(engines, str) else engines
    own = list(_findings(subject, model))
    beyond_half = tuple(finding.where for finding in own if finding.code == "overflows-fp16")
    found = verdicts(opened, subject.adapter, model, asked, beyond_half=beyond_half)
    findings = [*own, *check_engines(found, model)]
    counted = {"error", "warning"} if strict else {"error"}
    return ValidationReport(
        path=opened.name,
        ok=not any(finding.severity in counted for finding in findings),
        findings=tuple(findings),
        modules=tuple(subject.adapter.modules),
        engines=answers(found),
    )


def _subject(opened: Opened, base: BaseModel | None) -> Subject:
    faults: list[BadConfig] = []
    config = explain(opened, faults=faults)
    if config is None:
        read = interpret(opened)
        adapter = read if base is None else with_base(read, base.config)
    else:
        adapter = read_peft(opened.name, opened.source, config, evidence(opened))
    return Subject(opened, config, adapter, faults)


def _findings(subject: Subject, base: BaseModel | None) -> Iterator[Finding]:
    for fault in subject.opened.faults:
        yield error("config-unreadable", Path(fault.path).name, fault.problem, fault.hint)
    yield from check_format(subject)
    checked = [*check_structure(subject), *check_configuration(subject), *check_siblings(subject)]
    # Only now are all patterns matched, and those that cannot be known.
    for problem in subject.faults:
        yield error("config-invalid", Path(str(subject.opened.where)).name, str(problem), problem.hint)
    yield from checked
    yield from check_values(subject)
    if base is not None:
        yield from check_base(subject, base)
