"""The steps of `make gpu`: who runs which test, where NVVM is, what a trace says, what counts as a refusal."""

import gzip
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitscore.bench.gpu import figures, nvvm, parts, prepare, probe, profiled, refusals, testing
from vitscore.bench.gpu.day import TINY, Day
from vitscore.bench.harness import watch


def day(out: Path, part: int = 1, step: str = "step") -> Day:
    return Day(part, step, out, out, is_rehearsal=True, ends=time.time() + 60)


def test_the_tests_marked_gpu_are_shared_out_over_the_parts() -> None:
    found = Counter(
        testing.step_of(f"{path.name}::{name}") for path, names in testing.gpu_tests().items() for name in names
    )
    steps = [step.name for part in parts.PARTS.values() for step in part.steps]
    assert set(found) <= set(steps) and len(found) == 4
    assert steps.index("twins") < min(number for number, name in enumerate(steps) if "compiled" in name)
    for step, count in found.items():
        files = testing.files_of(step)
        names = [f"{path.name}::{name}" for path in files for name in testing.gpu_tests()[path]]
        assert sum(testing.step_of(name) == step for name in names) == count
    assert testing.step_of("test_forward_cuda.py::test_a_run[dali]") == "tests"
    assert testing.step_of("test_forward_cuda.py::test_a_run[torchvision]") == "forward tests"
    assert testing.step_of("test_forward_cuda.py::test_a_compiled_run[dali]") == "compiled tests"


def test_a_file_of_tests_that_lacks_a_package_is_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "import pytest\n\n\n@pytest.mark.gpu\ndef test_{}() -> None:\n    assert {}\n"
    (tmp_path / "test_here.py").write_text(marked.format("good", True) + "\n\ndef test_unmarked() -> None:\n    pass\n")
    (tmp_path / "test_there.py").write_text("import not_to_be_had\n" + marked.format("other", True))
    monkeypatch.setattr(testing, "files_of", lambda step: sorted(tmp_path.glob("test_*.py")))
    assert testing.missing_packages(tmp_path / "test_there.py") == ["not_to_be_had"]
    code = (
        "from pathlib import Path\nfrom vitscore.bench.gpu import testing\nfrom vitscore.bench.gpu.day import Day\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "testing.files_of = lambda step: sorted(folder.glob('test_*.py'))\n"
        "testing.run(Day(2, 'tests', folder, folder / 'work', True, 0.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in figures.read(tmp_path)}
    assert lines["test test_here.py::test_good"]["value"] == "passed"
    assert lines["file test_there.py"]["note"] == "not measured: no package not_to_be_had"
    assert len(lines) == 2


# NVVM.


def toolkit(root: Path, library: str = "nvvm/lib64/libnvvm.so") -> Path:
    for name in (library, nvvm.LIBDEVICE, "bin/nvcc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "bin" / "nvcc").chmod(0o755)
    return root


def found_in(tmp_path: Path, *, packages: tuple[str, ...] = (), **variables: str) -> nvvm.Nvvm | None:
    usual = tmp_path / "usual" / "cuda"
    return nvvm.find({"PATH": "", **variables}, packages=packages, usual=usual, asks_loader=False)


def test_nvvm_is_found_in_a_variables_folder_in_the_usual_one_and_beside_nvcc(tmp_path: Path) -> None:
    assert found_in(tmp_path) is None
    root = toolkit(tmp_path / "opt" / "toolkit")
    elsewhere = tmp_path / "bin"
    elsewhere.mkdir()
    (elsewhere / "nvcc").symlink_to(root / "bin" / "nvcc")
    for variables in ({"CUDA_HOME": str(root)}, {"CUDA_PATH": str(root)}, {"PATH": str(elsewhere)}):
        found = found_in(tmp_path, **variables)
        assert found is not None and found.root == root
        assert found.variables(tmp_path) == {"CUDA_HOME": str(root), "CUDA_PATH": str(root)}
    found = found_in(tmp_path, CUDA_HOME=str(tmp_path / "without"), PATH=str(elsewhere))
    assert found is not None and (found.root, found.source) == (root, "nvcc")
    usual = toolkit(tmp_path / "usual" / "cuda")
    assert (found := found_in(tmp_path)) is not None and found.root == usual


def test_nvvm_is_found_through_a_script_that_calls_nvcc(tmp_path: Path) -> None:
    root = toolkit(tmp_path / "opt" / "cuda-13.0")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    found = found_in(tmp_path, PATH=str(script.parent))
    assert found is not None and found.root == root


def test_a_library_where_no_variable_leads_gets_a_folder_of_links(tmp_path: Path) -> None:
    """As a toolkit made of pip's packages has it."""
    root = toolkit(tmp_path / "opt" / "cuda", library="lib/libnvvm.so.4")
    found = found_in(tmp_path, CUDA_HOME=str(root))
    assert found is not None
    home = Path(found.variables(tmp_path / "work")["CUDA_HOME"])
    assert (home / "nvvm/lib64/libnvvm.so").resolve() == root / "lib/libnvvm.so.4"
    assert (home / nvvm.LIBDEVICE).resolve() == root / nvvm.LIBDEVICE


def test_a_package_that_brings_nvvm_needs_no_variable(tmp_path: Path) -> None:
    toolkit(tmp_path / "site" / "nvidia" / "cu13", library="lib/libnvvm.so.4")
    other = toolkit(tmp_path / "other")
    found = found_in(tmp_path, packages=(str(tmp_path / "site"),), CUDA_HOME=str(other))
    assert found is not None and found.source == "package" and found.variables(tmp_path) == {}


# The trace.


def kernel(name: str, begins: float, lasts: float, stream: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": begins, "dur": lasts, "args": {"stream": stream}}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    kernel("b", 50, 100, stream=13),
    kernel("a", 0, 100),
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaMalloc", "ts": 160, "dur": 400},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900},
    kernel("c", 600, 100),
    kernel("a", 700, 300),
]


def test_the_busy_share_counts_overlapping_kernels_once_and_gaps_name_their_neighbours() -> None:
    busy = profiled.on_gpu(EVENTS)
    assert [event["name"] for event in busy] == ["a", "b", "c", "a"]
    assert profiled.busy_share(busy) == (550 / 1000, 0, 1000)
    (gap,) = profiled.gaps(busy, EVENTS)
    assert (gap.after, gap.before, gap.host) == ("b", "c", "cudaMalloc")
    assert gap.seconds == pytest.approx(450e-6)
    assert list(profiled.by_stream(busy)) == ["7", "13"]
    assert profiled.longest_kernels(busy).most_common(1)[0] == ("a", pytest.approx(400e-6))


def test_a_trace_too_large_to_be_carried_loses_the_hosts_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"traceEvents": [*EVENTS, *({**EVENTS[4], "ts": number, "id": number**7} for number in range(2000))]}
    for most, kept in ((1 << 20, {"kernel", "cuda_runtime", "cpu_op"}), (4096, {"kernel", "cuda_runtime"})):
        monkeypatch.setattr(profiled, "MOST_BYTES", most)
        profiled.write_trace(document, tmp_path / "trace.json.gz")
        events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
        assert {event["cat"] for event in events if "cat" in event} == kept


def test_a_run_is_recorded_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real, on the demo's model: the profiler is told of every batch, and leaves a window of some."""
    from vitscore.bench.harness.corpus import photos, write
    from vitscore.bench.memory import NAMES

    write(tmp_path / "photos", photos(TINY.photos), per_shard=TINY.photos, classes=NAMES)
    monkeypatch.setattr(profiled, "SKIPPED", 1)
    monkeypatch.setattr(Day, "checkpoint", lambda self, model: "demo-vit")
    recorded = profiled.record_run(day(tmp_path, step="profile"))
    assert sum(str(event.get("name", "")).startswith("ProfilerStep") for event in recorded) >= TINY.profiled


# The rest.


def test_what_is_made_for_the_steps_is_made_once_and_whole(tmp_path: Path) -> None:
    made: list[Path] = []

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        prepare.once(tmp_path / "a" / "b", fail)
    assert not (tmp_path / "a" / "b").exists()
    for _ in range(2):
        prepare.once(tmp_path / "a" / "b", lambda folder: (folder.mkdir(), made.append(folder)) and None)
    assert len(made) == 1 and (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(
    ("code", "said", "found"),
    [
        (4, "out of GPU memory: a batch of 256. Name -b 128.\n", "refused"),
        (4, "Traceback (most recent call last):\nRuntimeError: CUDA error\n", "not in words"),
        (1, "a bug: RuntimeError\n", "not in words"),
        (0, "", "not in words"),
    ],
)
def test_a_refusal_is_one_line_and_exit_4(code: int, said: str, found: str) -> None:
    assert refusals.refused(subprocess.CompletedProcess([], code, "", said)) == found


def test_what_nvidia_smi_says_becomes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "does not answer" in probe.smi()["nvidia-smi"]
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31, 5, 16'\n")
    script.chmod(0o755)
    assert probe.smi()["largest SM clock"] == "1980 MHz" and len(probe.smi()) == len(probe.SMI)


def test_a_watch_takes_what_the_driver_tells_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gpu: str) -> list[int]:
        raise RuntimeError("not supported")

    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=91),
        nvmlDeviceGetJpgUtilization=refuse,
        nvmlDeviceGetClockInfo=lambda gpu, clock: 1980,
        nvmlDeviceGetPowerUsage=lambda gpu: 650_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type, unused-ignore]
    monkeypatch.setattr(watch, "INTERVAL_S", 0.001)
    with watch.watching() as seen:
        while len(seen.samples.get("W", ())) < 3:
            time.sleep(0.01)
    assert seen.highest == {"GPU %": 91, "SM MHz": 1980, "W": 650}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with watch.watching() as seen:
        pass
    assert seen.highest == {}


def test_of_what_torchrun_prints_only_our_lines_count() -> None:
    line = "more ranks than GPUs: local rank 1 - expected at most 1 rank on this node (1 CUDA device), got 2."
    said = f"""

*****************************************
Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, to avoid your system being overloaded
*****************************************
{line}
W1128 00:42:06.673000 14123 torch/distributed/elastic/multiprocessing/api.py:1012] Sending process 14295 closing signal
E0101 00:42:06.681000 14123 torch/distributed/elastic/multiprocessing/api.py:986] failed (exitcode: 4) local_rank: 0
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
           ^^^^^^^^^^^^^^^^^^
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
vitscore FAILED
------------------------------------------------------------
Failures:
[1]:
  exitcode  : 4 (pid: 14295)
Root Cause (first observed failure):
"""
    assert refusals.own_lines(said) == [line]


def test_the_tests_helpers_are_no_missing_packages() -> None:
    folder = Path(__file__).parent
    assert testing.missing_packages(folder / "test_forward_cuda.py") == []


def test_the_files_of_the_checkout_that_steps_run_are_there() -> None:
    """Steps name them as text, so that moving one would be noticed on a GPU only."""
    sources = "".join(path.read_text() for path in (Path(__file__).parent.parent / "bench" / "gpu").glob("*.py"))
    named = re.findall(r'(?:ROOT / "tests"|TESTS) / "support" / "(\w+\.py)"', sources)
    assert sorted(named) == ["cudatwins.py", "pictures.py"]
    assert all((Path(__file__).parent.parent / "tests" / "support" / name).is_file() for name in named)
