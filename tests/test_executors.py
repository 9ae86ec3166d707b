"""Executors: the same bytes whatever runs the work, and nothing left behind when something ends it."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial

import ml_dtypes
import numpy as np
import pytest

import loratools as lt
from loratools import errors
from loratools.errors import Incomplete, LoratoolsError, NonFinite, OverBudget, Unsupported
from loratools.executors.base import make_executor, process_peak
from loratools.executors.processes import Processes
from loratools.models import open_base
from loratools.planning import CopyStep
from loratools.running import gather, run
from loratools.sinks import FileSink, FileWriter, MemorySink
from loratools.tensors.base import TensorRef
from loratools.verbs.combine import combine
from loratools.verbs.diff import diff
from loratools.verbs.extract import extract
from loratools.verbs.normalize import normalize
from loratools.verbs.reduce import reduce
from tests.executor_work import (
    ERRORS,
    blas_threads,
    die,
    fail,
    process_id,
    scaled,
    source_id,
    square,
    start_workers,
    unsendable,
)
from tests.small import SHAPES, base_tensors, contents, write_base, write_small_adapter

EXECUTORS = ["inline", "threads", "processes"]
posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals process groups, which only POSIX has")


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", shards=2)


@pytest.fixture
def adapter(tmp_path):
    return write_small_adapter(tmp_path / "lora")


@pytest.fixture
def expected(tmp_path, base, adapter):
    lt.merge(base, adapter, tmp_path / "expected", executor="inline")
    return contents(tmp_path / "expected")


@pytest.fixture(autouse=True)
def nobody_is_left():
    yield
    assert not [child.name for child in multiprocessing.active_children() if "loratools" in child.name]


# --- the seam -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_results_are_those_of_a_loop(name, count):
    executor = make_executor(name, 2)
    seen = []
    assert gather(square, range(count), executor, on_step=seen.append) == [n * n for n in range(count)]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("name", EXECUTORS)
def test_arrays_and_partials_travel(name):
    results = gather(partial(scaled, by=0.5), [1, 2, 3], make_executor(name, 2))
    for number, result in enumerate(results, 1):
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, np.full((3, number + 1), 0.5 * number, np.float32))


def test_processes_are_others_and_no_more_than_there_is_work_for():
    executor = make_executor("processes", 5)
    assert executor.remote
    found = set(gather(process_id, [0, 1], executor))
    assert os.getpid() not in found
    assert len(found) <= 2


def test_blas_is_held_to_one_thread_in_each_worker():
    found = gather(blas_threads, range(2), make_executor("processes", 2))
    assert all(found)
    assert {count for counts in found for count in counts} == {1}


def test_references_into_one_header_stay_one_object(base):
    source = open_base(base).source
    refs = [TensorRef(source, name) for name in source.specs]
    assert len(set(gather(source_id, refs, make_executor("processes", 1)))) == 1


@pytest.mark.parametrize("name", ["ray", "abacus", ""])
def test_an_executor_of_another_build_is_refused_by_name(name):
    with pytest.raises(Unsupported, match=repr(name)) as caught:
        make_executor(name, 2)
    assert "processes" in caught.value.hint


def test_the_command_line_refuses_ray_before_it_opens_anything(tmp_path):
    with pytest.raises(Unsupported, match="'ray'"):
        lt.merge(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "out", executor="ray")


# --- the same bytes -----------------------------------------------------------------------------------------

VARIATIONS = {
    "plain": {},
    "bf16": {"dtype": "bf16"},
    "resharded": {"shard_size": 500},
    "unsynced": {"sync": False},
}


@pytest.mark.parametrize("options", VARIATIONS.values(), ids=VARIATIONS)
def test_every_executor_writes_the_same_bytes(tmp_path, base, adapter, options):
    found = {}
    for name, jobs in (("inline", 1), ("threads", 2), ("processes", 1), ("processes", 2)):
        out = tmp_path / f"{name}-{jobs}"
        report = lt.merge(base, adapter, out, executor=name, jobs=jobs, **options)
        found[name, jobs] = contents(out), report.survival, report.tensors
    assert len(found["inline", 1][0]) > 2
    assert all(one == found["inline", 1] for one in found.values())


VERBS = {
    "reduce": lambda a, b, base, tuned, out, **how: reduce(a, out, rank=2, **how),
    "combine": lambda a, b, base, tuned, out, **how: combine([a, b], out, weights=[1.0, 0.5], rank=3, **how),
    "normalize": lambda a, b, base, tuned, out, **how: normalize(a, out, **how),
    "extract": lambda a, b, base, tuned, out, **how: extract(base, tuned, out, rank=2, **how),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_writes_an_adapter_writes_the_same_bytes(tmp_path, base, adapter, verb):
    other, tuned = write_small_adapter(tmp_path / "other", seed=5), tmp_path / "tuned"
    lt.merge(base, adapter, tuned)
    found = []
    for name in EXECUTORS:
        VERBS[verb](adapter, other, base, tuned, tmp_path / name, executor=name, jobs=2)
        found.append(contents(tmp_path / name))
    assert found[0] == found[1] == found[2]


def test_every_executor_finds_the_same_differences(tmp_path, adapter):
    other = write_small_adapter(tmp_path / "other", seed=5)
    reports = [diff(adapter, other, executor=name, jobs=2).to_dict() for name in EXECUTORS]
    for report in reports:
        report.pop("seconds", None)
    assert reports[0] == reports[1] == reports[2]
    assert not reports[0]["identical"]


def test_two_adapters_of_other_kinds_into_half_precision(tmp_path, adapter):
    base = write_base(tmp_path / "half", kind=np.dtype(ml_dtypes.bfloat16))
    rng = np.random.default_rng(1)
    extra = {
        f"base_model.model.{path}.lora_magnitude_vector": np.abs(rng.standard_normal(out, np.float32)) + 1
        for path, (out, _) in SHAPES.items()
    }
    dora = _with(write_small_adapter(tmp_path / "dora", seed=3, use_dora=True), extra)
    outs = []
    for name in EXECUTORS:
        lt.merge(base, [adapter, dora], tmp_path / name, weights=[0.5, 2.0], executor=name, jobs=2)
        outs.append(contents(tmp_path / name))
    assert outs[0] == outs[1] == outs[2]


def _with(folder, tensors):
    from safetensors.numpy import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("wrong", [False, True])
def test_every_executor_verifies_alike(tmp_path, base, adapter, wrong):
    merged = tmp_path / "merged"
    lt.merge(base, adapter, merged, weights=[2.0 if wrong else 1.0])
    reports = [lt.verify(base, adapter, merged, executor=name, jobs=2).to_dict() for name in EXECUTORS]
    for report in reports:
        report.pop("seconds", None)
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["ok"] is not wrong


def test_a_merge_that_is_verified_and_what_it_says_of_memory(tmp_path, base, adapter):
    report = lt.merge(base, adapter, tmp_path / "out", executor="processes", jobs=2, verify=True)
    assert report.verified
    if (own := process_peak()) is not None:
        assert report.peak_memory > own  # the workers' is added


def test_the_plan_counts_an_interpreter_for_each_worker(tmp_path, base, adapter):
    plan = lt.plan_merge(base, adapter, tmp_path / "out").plan
    together, apart = plan.peak_bytes(2), plan.peak_bytes(2, apart=True)
    assert apart > together
    with pytest.raises(OverBudget):
        lt.merge(base, adapter, tmp_path / "out", executor="processes", jobs=2, max_memory=together)
    assert not (tmp_path / "out.part").exists()
    lt.merge(base, adapter, tmp_path / "out", executor="threads", jobs=2, max_memory=together)


def test_a_writer_holds_one_file_open_for_each_direction(tmp_path, base, adapter):
    plan = lt.plan_merge(base, adapter, tmp_path / "out", shard_size=200).plan
    assert len(plan.files) > 3
    sink = FileSink(plan, tmp_path / "out")
    writer = pickle.loads(pickle.dumps(sink.writer()))
    assert isinstance(writer, FileWriter)
    opened = set()
    for step in plan.steps:
        if isinstance(step, CopyStep):
            writer.copy(step)
        else:
            writer.write(step, step.start, np.zeros(step.nbytes, np.uint8))
        opened |= set(writer._opened.values())
    assert len(opened) > 2
    assert sum(bool(file._opened) for file in opened) <= 2
    sink.abandon(keep=False)


# --- memory is not shared -----------------------------------------------------------------------------------


def test_a_result_in_memory_is_refused_by_name(base, adapter):
    with pytest.raises(Unsupported, match="executor 'processes' cannot make a result in memory") as caught:
        lt.merge(base, adapter, executor="processes")
    assert "threads" in caught.value.hint


def test_a_base_in_memory_is_refused_by_name(tmp_path, base, adapter):
    with pytest.raises(Unsupported, match="executor 'processes' cannot read the state dict"):
        lt.verify(base_tensors(), adapter, base, executor="processes")
    with pytest.raises(Unsupported, match="executor 'processes' cannot read the state dict"):
        lt.verify(base, adapter, base_tensors(), executor="processes")
    with pytest.raises(Unsupported, match="executor 'processes'"):
        lt.merge(base_tensors(), adapter, executor="processes")


def test_a_sink_in_memory_has_no_writer(base, adapter):
    plan = lt.plan_merge(base, adapter).plan
    with pytest.raises(Unsupported, match="in memory"):
        run(plan, MemorySink(plan, torch_out=False), make_executor("processes", 1))


def test_an_adapter_in_memory_travels(tmp_path, base, adapter, expected):
    from safetensors.numpy import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    given = lt.load(factors, config=adapter / "adapter_config.json")
    lt.merge(base, given, tmp_path / "out", executor="processes", jobs=2)
    weights = {name: value for name, value in contents(tmp_path / "out").items() if "safetensors" in name}
    assert weights == {name: value for name, value in expected.items() if "safetensors" in name}


@pytest.mark.parametrize("function", [lambda n: n, "local"])
def test_work_that_cannot_be_pickled_is_refused(function):
    def local(number):
        return number

    with pytest.raises(Unsupported, match="cannot be handed to another process") as caught:
        list(Processes(1).map(local if function == "local" else function, [1]))
    assert "threads" in caught.value.hint


# --- errors -------------------------------------------------------------------------------------------------

_ARGUMENTS = {
    "CorruptFile": ("a.safetensors", "ends early"),
    "ShapeMismatch": ("q_proj", (3, 4), (4, 3)),
    "UnmatchedModules": ("nothing answers", ("x", "y")),
    "OverBudget": (2_000_000, 1_000_000),
}
CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, LoratoolsError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("hint", [None, "do this"])
def test_every_error_survives_a_pickle(kind, hint):
    error = kind(*_ARGUMENTS.get(kind.__name__, ("a sentence with \x1b in it",)), hint=hint)
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert str(pickle.loads(pickle.dumps(again))) == str(error)


@pytest.mark.parametrize("what", [name for name in ERRORS if name != "stubborn"])
@pytest.mark.parametrize("name", EXECUTORS)
def test_errors_keep_their_type_and_their_sentence(name, what):
    given = ERRORS[what]()
    with pytest.raises(type(given)) as caught:
        gather(fail, [None, what, None], make_executor(name, 2))
    assert type(caught.value) is type(given)
    assert str(caught.value) == str(given)
    assert {k: v for k, v in vars(caught.value).items() if k != "__notes__"} == vars(given)


def test_a_bug_in_a_worker_shows_where_it_was():
    with pytest.raises(ValueError, match="not so") as caught:
        gather(fail, ["value"], make_executor("processes", 1))
    assert "executor_work.py" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("function", "item", "said"),
    [(fail, "stubborn", "Stubborn: this and that"), (unsendable, 1, "pickle")],
    ids=["error", "result"],
)
def test_what_cannot_come_back_is_an_error_that_says_so(function, item, said):
    with pytest.raises(Exception, match=said):
        gather(function, [item], make_executor("processes", 1))


def test_an_error_of_the_arithmetic_is_the_same_from_everywhere(tmp_path):
    base = write_base(tmp_path / "base", kind=np.float16)
    adapter = write_small_adapter(tmp_path / "lora")
    said = set()
    for name in EXECUTORS:
        with pytest.raises(NonFinite) as caught:
            lt.merge(base, adapter, tmp_path / "out", weights=[1e9], executor=name, jobs=1)
        said.add((str(caught.value), caught.value.hint))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora"]
    assert len(said) == 1


# --- ends that nobody planned -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param("kill", "SIGKILL", marks=pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")),
        ("exit", "exit code 3"),
    ],
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_that_dies_ends_the_run(how, said, jobs):
    with pytest.raises(Incomplete, match=said):
        gather(die, [how] * 3, make_executor("processes", jobs))


def test_a_killed_worker_leaves_a_part_to_go_on_from(tmp_path, base, adapter, expected):
    def kill(step):
        for child in multiprocessing.active_children():
            child.kill()

    out = tmp_path / "out"
    with pytest.raises(Incomplete, match="a worker process was killed"):
        lt.merge(base, adapter, out, executor="processes", jobs=1, on_step=kill)
    assert not out.exists()
    report = lt.merge(base, adapter, out, executor="processes", jobs=2, resume=True)
    assert report.resumed >= 1
    assert contents(out) == expected


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError])
def test_interrupted_then_resumed(tmp_path, base, adapter, expected, error):
    def stop(step):
        raise error

    out = tmp_path / "out"
    with pytest.raises(error):
        lt.merge(base, adapter, out, executor="processes", jobs=2, on_step=stop)
    assert not multiprocessing.active_children()
    assert not out.exists()
    report = lt.merge(base, adapter, out, executor="threads", resume=True)
    assert report.resumed >= 1
    assert contents(out) == expected


_SLOW = """
import signal, sys, time
import loratools as lt

# A shell starts what runs in its background with interrupts ignored, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(step):
    print("step", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    lt.merge(*sys.argv[1:4], executor="processes", jobs=2, on_step=slow)
"""


@posix
@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
def test_the_terminals_interrupt_and_a_killed_parent_leave_no_process_behind(tmp_path, base, adapter, number):
    script = tmp_path / "slow.py"
    script.write_text(_SLOW)
    arguments = [sys.executable, script, base, adapter, tmp_path / "out"]
    process = subprocess.Popen(
        list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "step\n"
        if number == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everybody gets it
        else:
            process.kill()
        _, said = process.communicate(timeout=60)
        assert process.returncode == -getattr(signal, number)
        assert _is_gone(process.pid)
    finally:
        process.kill()
        process.wait()
    assert "loratools-worker" not in said
    assert said.count("Traceback") == (number == "SIGINT")  # the parent's own
    assert (tmp_path / "out.part").exists()
    assert lt.merge(base, adapter, tmp_path / "out", resume=True).resumed >= 1


def _is_gone(group):
    """Whether the processes of a group end soon."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# --- scripts ------------------------------------------------------------------------------------------------

_CALL = "lt.merge(*sys.argv[1:4], executor='processes', jobs=2)"
SCRIPTS = {
    "guarded": f"import sys\nimport loratools as lt\nif __name__ == '__main__':\n    {_CALL}\n",
    "unguarded": f"import sys\nimport loratools as lt\n{_CALL}\n",
}


def _script(tmp_path, text, *arguments):
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, script, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)


def test_a_script_with_a_guard_runs(tmp_path, base, adapter, expected):
    done = _script(tmp_path, SCRIPTS["guarded"], base, adapter, tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert contents(tmp_path / "out") == expected


def test_a_script_without_one_is_told_of_it(tmp_path, base, adapter):
    done = _script(tmp_path, SCRIPTS["unguarded"], base, adapter, tmp_path / "out")
    assert done.returncode == 1
    assert "a worker process was asked to start workers of its own" in done.stderr
    assert "Incomplete: a worker process ended before its work" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_worker_starts_no_workers():
    with pytest.raises(Unsupported, match="asked to start workers") as caught:
        gather(start_workers, [1], make_executor("processes", 1))
    assert "__main__" in caught.value.hint


@pytest.mark.parametrize("how", ["-c", "-m"])
def test_the_command_line_and_one_liners_need_no_guard(tmp_path, base, adapter, expected, how):
    places = list(map(str, (base, adapter, tmp_path / "out")))
    command = {
        "-c": ["-c", SCRIPTS["unguarded"], *places],
        "-m": [
            "-m",
            "loratools",
            "merge",
            *places,
            "--executor",
            "processes",
            "--jobs",
            "2",
            "--verify",
            "-q",
        ],
    }[how]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "program",
    [
        "import loratools as lt; lt.merge(*sys.argv[1:4], jobs=2, verify=True)",
        "import loratools as lt; lt.inspect(sys.argv[2]); lt.plan_merge(*sys.argv[1:4])",
        "from loratools.cli.app import app; app(['merge', '--help'], standalone_mode=False)",
    ],
)
def test_only_who_asks_for_processes_loads_them(tmp_path, base, adapter, program):
    listing = "\nprint('LOADED', *sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}{listing}", *map(str, (base, adapter, tmp_path / "out"))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = set(done.stdout.rpartition("LOADED ")[2].split())
    assert "sys" in found
    assert not found & {"multiprocessing.context", "loratools.executors.processes", "torch"}


@pytest.mark.parametrize("name", ["inline", "threads", "processes"])
@pytest.mark.parametrize("jobs", [0, -1])
def test_no_worker_at_all_is_refused(name, jobs):
    with pytest.raises(Unsupported, match="one worker at least"):
        make_executor(name, jobs)


def test_the_peak_of_reduce_and_combine_counts_the_workers(tmp_path):
    path = write_small_adapter(tmp_path / "lora")
    for report in (
        reduce(path, rank=2, executor="processes", jobs=2),
        combine([path, path], executor="processes", jobs=2),
    ):
        own = process_peak()
        if own is None:
            pytest.skip("this system does not say what a process has held")
        assert report.peak_memory > own + 20_000_000  # an interpreter with numpy, at least one
