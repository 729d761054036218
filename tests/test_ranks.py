"""Ranks of any number and speed, joining late, dying, restarted, on several nodes: one ledger and one result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
TORCHRUN = (str(Path(sys.executable).parent / "torchrun"),)
RUN = ("run", "-m", "demo-vit", "-m", "demo-clip", "--precision", "fp32")
Call = Callable[..., Any]

# Every rank of a launch runs this with the commands to run, one after the other, in one process.
SEVERAL_RUNS = """
import json, os, sys, time
rank = int(os.environ["RANK"])
from vitscore.system.launcher import end_with_launcher
end_with_launcher()
{before}
from vitscore.cli.main import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    if code:
        sys.exit(code)
"""


def rows(folder: Path) -> dict[str, list[Any]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "parts").glob("*.parquet"))}


def launch_all(
    script: Path, commands: Sequence[Sequence[object]], *, num_ranks: int, before: str = "", options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other on `num_ranks` ranks; `before` is Python that each rank runs first."""
    script.write_text(SEVERAL_RUNS.format(before=before))
    words = json.dumps([[str(word) for word in command] for command in commands])
    return subprocess.run(
        [*TORCHRUN, "--nproc-per-node", str(num_ranks), *options, str(script), words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )


def top1_where_sure(folder: Path, model: str) -> dict[tuple[str, str], int]:
    """Read predictions by (shard, key) if the margin of the logits exceeds 1e-3, as the rule of equality requires."""
    answers = {}
    for part in rows(folder).values():
        for row in part:
            first, second = row[f"{model}.topk_prob"][:2]
            if np.log(first) - np.log(max(second, 1e-30)) > 1e-3:
                answers[row["shard"], row["key"]] = row[f"{model}.pred"]
    return answers


def test_ranks_and_batch_sizes_change_nothing(make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path) -> None:
    """1, 2 and 4 ranks (more than shards; one joins late, one is slow) by batches of 1, 7 and 64."""
    shards = make_shards(digits[:90], digits[90:95], digits[95:140])
    late = "import vitscore.engine.loop as e\nif rank == 1: time.sleep(6)\n"
    slow = "real = e.Engine._compute\nif rank == 0: e.Engine._compute = lambda *a: (time.sleep(0.05), real(*a))[1]\n"
    sizes = (1, 7, 64)
    for size in sizes:
        assert vitscore(*RUN, shards, "-b", size, "-o", tmp_path / f"1-{size}").code == 0
    for num_ranks, before in ((2, late + slow), (4, "")):
        commands = [(*RUN, shards, "-b", size, "-o", tmp_path / f"{num_ranks}-{size}") for size in sizes]
        done = launch_all(tmp_path / "main.py", commands, num_ranks=num_ranks, before=before)
        assert done.returncode == 0, done.stderr
    for size in sizes:
        alone = rows(tmp_path / f"1-{size}")
        for num_ranks in (2, 4):
            assert rows(tmp_path / f"{num_ranks}-{size}") == alone
            same = [(tmp_path / f"{n}-{size}" / "metrics.json").read_bytes() for n in (1, num_ranks)]
            assert same[0] == same[1]
    for model in ("demo-vit", "demo-clip"):
        by_size = [top1_where_sure(tmp_path / f"1-{size}", model) for size in sizes]
        assert len(by_size[0]) > 130
        for other in by_size[1:]:
            common = by_size[0].keys() & other.keys()
            assert len(common) > 130
            assert [key for key in common if by_size[0][key] != other[key]] == []


COUNTS_PLANNING = """
import atexit, pathlib
import vitscore.plan.plan as p, vitscore.run.join as j, vitscore.run.run as r, vitscore.shards.locate as l
calls = []
def counted(name, real):
    return lambda *a, **k: (calls.append(name), real(*a, **k))[1]
for module, name in ((p, "locate"), (p, "make_plan"), (j, "make_plan"), (r, "make_plan"), (p, "look"), (l, "locate")):
    setattr(module, name, counted(name, getattr(module, name)))
atexit.register(lambda: pathlib.Path(sys.argv[0]).with_name(f"calls-{rank}").write_text(" ".join(calls)))
"""


def test_a_rank_that_joins_neither_lists_shards_nor_plans(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[number * 10 :][:10] for number in range(8)))
    names = [text.strip() for text in (shards / "classes.txt").read_text().split()]
    (tmp_path / "groups.json").write_text(json.dumps({"low": names[:5], "high": names[5:]}))
    (tmp_path / "labels.csv").write_text("key,label\n" + "".join(f"{key},3\n" for key, _ in digits[:10]))
    options = ("--labels", tmp_path / "labels.csv", "--groups", tmp_path / "groups.json", "--limit", 75)
    command = (*RUN, shards, "-b", "8", *options, "-o")
    done = launch_all(tmp_path / "main.py", [(*command, tmp_path / "out")], num_ranks=2, before=COUNTS_PLANNING)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls-1").read_text() == ""
    assert set((tmp_path / "calls-0").read_text().split()) >= {"make_plan", "locate"}
    assert vitscore(*command, tmp_path / "alone").code == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "alone")
    assert (tmp_path / "out" / "metrics.json").read_bytes() == (tmp_path / "alone" / "metrics.json").read_bytes()


ONE_GPU = """
import torch
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.get_device_name = lambda: True, lambda: 1, str
"""


def test_more_ranks_than_gpus_are_refused_once_and_in_words(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    """torch is patched to report one GPU; only the number of GPUs is checked."""
    command = (*RUN, make_shards(digits[:40], digits[40:80]), "-o", tmp_path / "out")
    done = launch_all(tmp_path / "main.py", [command], num_ranks=2, before=ONE_GPU)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "more ranks than GPUs" in line]
    assert lines == [
        "more ranks than GPUs: local rank 1 - expected at most 1 rank on this node (1 CUDA device), got 2. "
        "Start with --nproc-per-node 1, or --device cpu."
    ]
    assert "exitcode  : 4 " in done.stderr
    assert "MASTER_ADDR" not in done.stderr and "Traceback" not in done.stderr.split(lines[0])[0]
    assert not (tmp_path / "out").exists()
    done = launch_all(tmp_path / "main.py", [(*command, "--device", "cpu")], num_ranks=2, before=ONE_GPU)
    assert done.returncode == 0, done.stderr


DIES_ONCE = """
import signal
import vitscore.engine.loop as e
if rank == 0:
    compute = e.Engine._compute
    e.Engine._compute = lambda *a: (time.sleep(0.1), compute(*a))[1]
if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import vitscore.rundir.open_parts as o
    real = o.OpenParts._finish_write
    def die(self):
        real(self)
        if self.num_written == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    o.OpenParts._finish_write = die
"""


def test_an_elastic_restart_goes_on_from_the_parts_even_under_overwrite(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[number * 10 :][:10] for number in range(40)))
    command = (*RUN, shards, "-b", "8", "--overwrite", "-o")
    assert vitscore(*command, tmp_path / "alone").code == 0
    assert vitscore(*command, tmp_path / "out", "--limit", "20").code == 0  # results for --overwrite to remove
    options = ("--max-restarts", "1", "--monitor-interval", "0.2")
    done = launch_all(
        tmp_path / "main.py", [(*command, tmp_path / "out")], num_ranks=2, before=DIES_ONCE, options=options
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert len(record["sessions"]) == 2, "the restart did not go on with what was there"
    assert 0 < record["sessions"][-1]["images"] < 400
    assert rows(tmp_path / "out") == rows(tmp_path / "alone")
    assert (tmp_path / "out" / "metrics.json").read_bytes() == (tmp_path / "alone" / "metrics.json").read_bytes()


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def start_two(
    command: Sequence[object], script: Path, *, before: str = "", errors: Path
) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """Start two ranks, and wait until both run and parts appear; return the launcher and the ranks."""
    script.write_text(SEVERAL_RUNS.format(before=before))
    words = json.dumps([[str(word) for word in command]])
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [*TORCHRUN, "--nproc-per-node", "2", str(script), words], stdout=file, stderr=file, cwd=ROOT
        )
    parts = Path(str(command[-1])) / "parts"
    wait_until(lambda: len(list(parts.glob("*.parquet"))) >= 2 or process.poll() is not None)
    assert process.poll() is None, errors.read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    return process, [child for child in children if str(script) in child.cmdline()]


SLOW = """
import vitscore.engine.loop as e
real = e.Engine._compute
e.Engine._compute = lambda *a: (time.sleep(0.2), real(*a))[1]
"""


def test_ranks_end_with_their_launcher_and_the_same_command_goes_on(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[number * 12 :][:12] for number in range(40)))
    command, out = (*RUN, shards, "-b", "8", "-o"), tmp_path / "out"
    launcher, ranks = start_two((*command, out), tmp_path / "main.py", before=SLOW, errors=tmp_path / "err")
    assert len(ranks) == 2
    assert vitscore("status", out).out.startswith("state    running")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert (len(gone), alive) == (2, [])
    assert not [name for name in os.listdir(out / "parts") if name.startswith(".")]
    errors = (tmp_path / "err").read_text()
    assert "Traceback" not in errors and "frame #" not in errors, errors
    assert vitscore("status", out).out.startswith("state    stopped")
    assert vitscore(*command, out).code == 0
    assert vitscore(*command, tmp_path / "alone").code == 0
    assert rows(out) == rows(tmp_path / "alone")
    assert vitscore("status", out).out.startswith("state    finished")


def test_a_rank_that_froze_is_named(make_shards: Call, digits: Any, tmp_path: Path) -> None:
    shards = make_shards(*(digits[number * 12 :][:12] for number in range(40)))
    quick = "import vitscore.ranks.ranks as r\nr.BEAT_S, r.SILENCE_S = 0.2, 3.0\n"
    errors = tmp_path / "err"
    command = (*RUN, shards, "-b", "8", "-o", tmp_path / "out")
    launcher, ranks = start_two(command, tmp_path / "main.py", before=quick + SLOW, errors=errors)
    frozen = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    frozen.suspend()
    wait_until(lambda: "a rank died: rank 1 - got no heartbeat" in errors.read_text(), timeout_s=30)
    frozen.kill()  # the launcher would do it half a minute later
    assert launcher.wait(timeout=60) != 0
    assert errors.read_text().count("a rank died") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start_agents(
    folders: Sequence[Path], command: Sequence[object], *, before: str, options: Sequence[str] = ()
) -> list[tuple[int, str]]:
    """Run two torchrun agents with one rank each, as on two nodes, in separate folders; return codes and output."""
    port, agents = free_port(), []
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "main.py").write_text(SEVERAL_RUNS.format(before=before))
        words = json.dumps([[str(word) for word in command]])
        agents.append(
            subprocess.Popen(
                [
                    *TORCHRUN,
                    "--nnodes",
                    "2",
                    "--nproc-per-node",
                    "1",
                    "--rdzv-backend",
                    "c10d",
                    "--rdzv-endpoint",
                    f"127.0.0.1:{port}",
                    "--rdzv-id",
                    "7",
                    *options,
                    "main.py",
                    words,
                ],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return [(agent.wait(timeout=240), agent.communicate()[0]) for agent in agents]


def test_two_nodes_that_share_the_folder_are_one_run(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[number * 12 :][:12] for number in range(20)))
    command, out = (*RUN, shards, "-b", "8", "-o"), tmp_path / "out"
    ended = start_agents([tmp_path / "a", tmp_path / "b"], (*command, out), before=SLOW)
    assert [code for code, _ in ended] == [0, 0], ended
    session = json.loads((out / "run.json").read_bytes())["sessions"][-1]
    assert min(session["images_by_rank"]) > 0
    assert vitscore(*command, tmp_path / "alone").code == 0
    assert rows(out) == rows(tmp_path / "alone")


def test_a_restart_on_two_nodes_goes_on_though_each_counts_its_own_restarts(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[number * 12 :][:12] for number in range(40)))
    command, out = (*RUN, shards, "-b", "8", "-o"), tmp_path / "out"
    dies_once = DIES_ONCE + (
        "import pathlib\npathlib.Path(f'restarts-{rank}').write_text(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
    )
    options = ("--max-restarts", "1", "--monitor-interval", "0.2")
    nodes = [tmp_path / "a", tmp_path / "b"]
    ended = start_agents(nodes, (*command, out), before=dies_once, options=options)
    assert [code for code, _ in ended] == [0, 0], ended
    assert len(json.loads((out / "run.json").read_bytes())["sessions"]) == 2
    assert sorted(path.read_text() for node in nodes for path in node.glob("restarts-*"))[-1] == "1"
    assert vitscore(*command, tmp_path / "alone").code == 0
    assert rows(out) == rows(tmp_path / "alone")


def test_two_nodes_that_do_not_share_the_folder_are_refused(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    """Even if the other folder holds the same run, finished earlier."""
    shards = make_shards(digits[:30], digits[30:60])
    command = (*RUN, shards, "-b", "8", "-o", "out")
    nodes = [tmp_path / "a", tmp_path / "b"]
    for node in nodes:
        assert vitscore(*command[:-1], node / "out").code == 0
        (node / "out" / "parts" / "0000001-s-1.parquet").unlink()
    told_code = "import vitscore.run.join as v\nv.SHARED_S = 2.0\n" + (
        "import vitscore.cli.main as cli\nreal = cli.print_error\n"
        "cli.print_error = lambda line, code, **k: real(f'{line} [{code}]', code, **k)\n"
    )
    ended = start_agents(nodes, command, before=told_code)
    assert all(code != 0 for code, _ in ended)
    lines = [
        line for _, output in ended for line in output.splitlines() if line.startswith("output folder is not shared")
    ]
    assert len(lines) == 1, ended
    assert lines[0].endswith("[4]")
