"""The package as a whole: what importing it costs, what its names mean, that its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from tests.small import write_base, write_small_adapter

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lt.__path__, "loratools.")
    if not module.name.endswith("__main__")
)
# Only the command line needs these.
_SKIN = {"click", "rich"}


def in_a_process(program, *arguments):
    """Run a program; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


_SHUFFLED = """
import importlib, inspect, sys
import loratools as lt
order = sys.argv[1:]
for name in order:
    importlib.import_module(name)
for name in ("inspect", "load", "merge", "plan_merge", "validate", "verify"):
    value = getattr(lt, name)
    assert inspect.isfunction(value), f"lt.{name} is {value!r}"
    assert value.__name__ == name
    assert value.__module__ == f"loratools.verbs.{'merge' if name == 'plan_merge' else name}", value.__module__
for name in lt.__all__:
    assert not inspect.ismodule(getattr(lt, name)), name
"""


@pytest.mark.parametrize("seed", range(4))
def test_names_mean_the_same_in_any_order_of_imports(seed):
    order = MODULES.copy()
    random.Random(seed).shuffle(order)
    in_a_process(_SHUFFLED, *order)


@pytest.mark.parametrize("first", ["merge", "inspect", "validate", "verify", "load"])
def test_names_survive_the_import_of_the_verb_itself(first):
    in_a_process(_SHUFFLED, f"loratools.verbs.{first}")
    in_a_process("import loratools.verbs.merge\n" + _SHUFFLED, f"loratools.verbs.{first}")


def test_public_names_are_there():
    assert set(lt.__all__) <= set(dir(lt))
    assert lt.__version__
    with pytest.raises(AttributeError, match="has no attribute 'ghost'"):
        lt.ghost  # noqa: B018 - the attribute error is the point


def test_no_public_function_shares_its_name_with_a_module():
    top = {name.split(".")[1] for name in MODULES}
    assert not top & set(lt.__all__)


# --- what is loaded when ------------------------------------------------------------------------------------


def loaded(program, *arguments):
    """The top-level packages that a program has loaded at its end."""
    listing = "\nimport sys\nprint('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    return set(in_a_process(program + listing, *arguments).rpartition("LOADED ")[2].split())


@pytest.fixture
def files(tmp_path):
    base = write_base(tmp_path / "base", shards=2)
    save_file({"layers.0.mlp.weight": np.zeros((2, 2), np.float16)}, tmp_path / "single.safetensors")
    return base, write_small_adapter(tmp_path / "lora"), tmp_path / "out"


def test_importing_the_package_loads_next_to_nothing():
    found = loaded("import loratools, loratools.errors")
    assert not found & {"numpy", "torch", "ml_dtypes", "huggingface_hub", "safetensors", *_SKIN}


def test_headers_are_read_without_numpy(files):
    base, adapter, _ = files
    program = """
import sys
from loratools.models import open_base
import loratools as lt
assert open_base(sys.argv[1]).source.specs
assert lt.load(sys.argv[2]).modules
report = lt.inspect(sys.argv[2])
assert report.to_dict()["modules"]
"""
    found = loaded(program, base, adapter)
    assert not found & {"numpy", "torch", "ml_dtypes", "huggingface_hub", *_SKIN}


@pytest.mark.parametrize(
    "call",
    [
        "lt.plan_merge(base, adapter, out)",
        "lt.merge(base, adapter, out, verify=True)",
        "lt.merge(base, adapter)",
        "lt.verify(base, adapter, base)",
        "lt.validate(adapter, base=base)",
        "lt.merge(base, adapter, out, dtype='bf16', jobs=2)",
    ],
)
def test_torch_stays_away_from_the_processor(files, call):
    base, adapter, out = files
    program = f"""
import sys
import loratools as lt
base, adapter, out = sys.argv[1:4]
{call}
"""
    found = loaded(program, base, adapter, out)
    assert not found & {"torch", "transformers", "peft", "huggingface_hub", *_SKIN}


# --- documentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = sum(
        len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name), name)
    )
    assert examples > 15


def test_the_packages_own_examples_run():
    assert not doctest.testmod(lt).failed


def _public(module):
    """Public functions, classes and their public methods that a module defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        made_here = getattr(value, "__qualname__", None) == name  # not by a factory, which has its own
        if made_here and (inspect.isfunction(value) or inspect.isclass(value)):
            yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for method, function in vars(value).items():
                documented = inspect.isfunction(function) or isinstance(function, property)
                if documented and not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", function


@pytest.mark.parametrize("name", ["loratools", *MODULES])
def test_everything_public_is_described(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    for where, value in _public(module):
        assert inspect.getdoc(value), where


@pytest.mark.parametrize("name", MODULES)
def test_declared_names_exist(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), public


def test_the_types_ship():
    root = Path(lt.__file__).parent
    assert (root / "py.typed").is_file()
    pyproject = (root.parent / "pyproject.toml").read_text()
    assert 'packages = ["loratools"]' in pyproject  # the whole folder goes into the wheel, py.typed with it


def test_the_library_never_prints(files, capfd):
    base, adapter, out = files
    lt.merge(base, adapter, out, verify=True)
    lt.inspect(adapter)
    lt.validate(adapter, base=base)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
