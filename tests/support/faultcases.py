"""Repeat the file operations of `vitscore run` on its folder, without computing, in milliseconds.

The steps are those of `vitscore.run.run`, in order, on the plan of two demo shards; predictions are drawn from a seed.
One part is written in several row groups. Run as a program below the shim of faultinject.c, it interrupts the command
at every file operation, starts it again, and prints the results as JSON:

    python -m support.faultcases errors|kills|losses EVERY FOLDER

EVERY is 1 for all calls, n for every n-th call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import powerloss
from vitscore.errors import SetupError
from vitscore.metrics.fold import refold, write_metrics
from vitscore.plan.options import make_options
from vitscore.plan.plan import Plan, make_plan
from vitscore.run import sessions
from vitscore.rundir import parts
from vitscore.rundir.folder import RunFolder
from vitscore.rundir.parts import Footer, ModelColumns, Predictions, ShardRows, finished_parts, part_schema
from vitscore.system.durable import TEMPORARY_SUFFIX, writing

DEMO_SHARDS = Path(__file__).parent.parent.parent / "vitscore" / "demo" / "shards"
NUM_ROWS, NUM_CLASSES, BATCH = 24, 10, 5


@dataclass(frozen=True)
class Command:
    """One command, which can be run repeatedly."""

    plan: Plan
    overwrites: bool = False

    def __call__(self) -> None:
        """What `run.open_run`, the engine's writes and `finish.finish_run` do to the folder."""
        plan, folder, done = self.plan, RunFolder(self.plan.options.output), set()
        session = sessions.make_session(world_size=1)
        is_resumed = not self.overwrites and sessions.check_folder(folder, plan)
        if not is_resumed:
            sessions.check_foreign(folder)
            sessions.clear(folder)
            sessions.start(folder, plan, session=session, costs={})
        else:
            plan = sessions.resume(folder, plan)
            done = set(finished_parts(folder.parts, plan.identity_hash))
            sessions.begin_session(folder, session)
        for shard in plan.shards:
            if shard.ordinal not in done:
                with writing(folder.parts):
                    write_part(folder.parts, plan, shard.ordinal, shard.name)
        folded = refold(folder.path)
        with writing(folder.path):
            write_metrics(folder.path, folded)
            sessions.end_session(folder, session["id"], {"images": 2 * NUM_ROWS})


def make_command(root: Path, *, overwrites: bool = False) -> Command:
    """Return the command whose folder is `root`/new/out, on shards outside it."""
    shards = sorted(str(path) for path in DEMO_SHARDS.glob("*.tar"))[:2]
    options = make_options({"shards": shards, "model": ["demo-vit"], "output": root / "new" / "out"})
    return Command(make_plan(options, kept={}), overwrites)


def write_part(folder: Path, plan: Plan, ordinal: int, name: str) -> None:
    """Write a part; every second one has long outputs, in four row groups."""
    num_logits = NUM_CLASSES if ordinal % 2 else 0
    columns = [ModelColumns("demo-vit", top_k=5, num_logits=num_logits)]
    footer = Footer(plan.identity_hash, ordinal, name, num_bytes=1000, expected=NUM_ROWS, bad=0)
    parts.GROUP_BYTES = 4 * NUM_CLASSES * 7
    work = ShardRows(folder, part_schema(columns), columns, footer, [f"k{row}" for row in range(NUM_ROWS)])
    given = make_predictions(ordinal, num_logits)
    work.set_labels(np.arange(NUM_ROWS), given.pred[::-1].copy())
    for start in range(0, NUM_ROWS, BATCH):
        rows = np.arange(start, min(start + BATCH, NUM_ROWS))
        work.set_predictions(rows, {"demo-vit": given.take(rows)})
        if work.num_open:
            work.flush_full_groups()
    work.commit()


def make_predictions(seed: int, num_logits: int) -> Predictions:
    random = np.random.default_rng(seed)
    topk = np.stack([random.permutation(NUM_CLASSES)[:5] for _ in range(NUM_ROWS)]).astype(np.int32)
    return Predictions(
        pred=topk[:, 0].copy(),
        prob=random.random(NUM_ROWS, np.float32),
        topk=topk,
        topk_prob=random.random((NUM_ROWS, 5), np.float32),
        label_logprob=-random.random(NUM_ROWS, np.float32),
        sum_sq_prob=random.random(NUM_ROWS, np.float32),
        logits=random.random((NUM_ROWS, num_logits), np.float32) if num_logits else None,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below `folder`, including dotfiles; run.json without its sessions."""
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with contextlib.suppress(KeyError, ValueError):
        record = json.loads(contents["run.json"])
        del record["sessions"]
        contents["run.json"] = json.dumps(record).encode()
    return contents


def disagreements(out: Path, calm: dict[str, bytes], identity: str) -> Iterator[str]:
    """Yield the files of an interrupted folder that are neither whole nor absent.

    Args:
        out: the folder.
        calm: the files of an undisturbed run.
        identity: the hash of the run's identity.
    """
    for name, content in files(out).items() if out.is_dir() else ():
        if not is_temporary(name) and content != calm[name]:
            yield f"{name} is not whole"
    named = {path.name for path in (out / "parts").glob("*.parquet") if not is_temporary(path.name)}
    done = {path.name for path, _ in finished_parts(out / "parts", identity).values()}
    if named != done:
        yield f"not taken for a part: {sorted(named - done)}"


def is_temporary(name: str) -> bool:
    return Path(name).name.startswith(".") or name.endswith(TEMPORARY_SUFFIX)


def fresh(root: Path) -> Path:
    shutil.rmtree(root / "new", ignore_errors=True)
    return root / "new" / "out"


class Trial:
    """Runs the command undisturbed, then repeatedly with one fault per run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arm: Callable[[bytes, int, int], int] = ctypes.CDLL(None).fi_arm
        self.starts = {"first start": make_command(root), "overwrite": make_command(root, overwrites=True)}
        self.identity = self.starts["first start"].plan.identity_hash
        out = fresh(root)
        self.starts["first start"]()
        self.calm = files(out)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def prepare(self, name: str) -> Path:
        """Prepare the folder for the start `name`: absent, or with an older run."""
        out = fresh(self.root)
        if name == "overwrite":
            self.starts["first start"]()
        return out

    def num_calls(self, name: str) -> int:
        self.prepare(name)
        self.arm(b"log", 0, 0)
        self.starts[name]()
        return self.arm(b"off", 0, 0)

    def blame(self, what: str, problems: Iterator[str] | list[str]) -> None:
        self.wrong.extend(f"{what}: {problem}" for problem in problems)

    def again(self, what: str, name: str, out: Path) -> None:
        """Run the command again, and check that the folder equals that of an undisturbed run."""
        try:
            self.starts[name]()
        except Exception as error:
            self.blame(what, [f"started again: {error!r}"])
            return
        now = files(out)
        self.blame(what, [f"{key} differs" for key in now.keys() | self.calm if now.get(key) != self.calm.get(key)])

    def break_with(self, name: str, mode: str, at: int, number: int) -> None:
        what, out = f"{name}, call {at}, {mode} {errno.errorcode.get(number, '')}", self.prepare(name)
        self.arm(mode.encode(), at, number)
        try:
            self.starts[name]()
            ended = "went on"
        except SetupError as error:
            ended = f"exit {error.exit_code}"
            if "\n" in str(error) or "the same command goes on" not in str(error):
                self.blame(what, [f"said {error}"])
        except Exception as error:
            ended = repr(error)
            self.blame(what, [ended])
        finally:
            self.arm(b"off", 0, 0)
        self.seen[f"{mode} {errno.errorcode.get(number, '')}: {ended}".replace(" :", ":")] += 1
        if number == errno.EINTR and ended != "went on":
            self.blame(what, ["an interrupted call was not made again"])
        if out.is_dir():
            self.blame(what, [f"{key} was left" for key in files(out) if is_temporary(key)])
        self.blame(what, disagreements(out, self.calm, self.identity))
        self.again(what, name, out)

    def kill_at(self, name: str, mode: str, at: int) -> None:
        what, out = f"{name}, {mode} at call {at}", self.prepare(name)
        child = os.fork()
        if child == 0:
            self.arm(mode.encode(), at, 0)
            self.starts[name]()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            self.blame(what, [f"ended with {status}"])
        left = [key for key in files(out) if is_temporary(key)] if out.is_dir() else []
        self.seen["left a temporary file" if left else "left none"] += 1
        self.blame(what, disagreements(out, self.calm, self.identity))
        self.again(what, name, out)

    def losses(self, name: str, every: int) -> int:
        """Simulate a power loss after every call of the command, and return the number of calls."""
        out, log = self.prepare(name), self.root / "calls.log"
        disk = powerloss.Disk(self.root / "new")
        if out.is_dir():
            _take_over(disk, self.root / "new")
        else:
            (self.root / "new").mkdir(exist_ok=True)
        log.write_bytes(b"")
        child = os.fork()
        if child == 0:
            self.arm(b"log", 0, 0)
            self.starts[name]()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        lines = log.read_text().splitlines()
        for at, line in enumerate(lines):
            disk.follow(line)
            if at % every and at != len(lines) - 1:
                continue
            for kind in powerloss.DISKS:
                what = f"{name}, power lost after call {at + 1}, disk {kind}"
                shutil.rmtree(self.root / "new")
                for path, content in {"": None, **disk.after_loss(kind, at)}.items():
                    target = self.root / "new" / path
                    target.mkdir() if content is None else target.write_bytes(content)
                self.blame(what, disagreements(out, self.calm, self.identity))
                self.again(what, name, out)
                self.seen[f"disk {kind}"] += 1
        return len(lines)


def _take_over(disk: powerloss.Disk, root: Path) -> None:
    """Copy the content of a real folder to `disk`, all of it flushed."""
    for path in sorted(root.rglob("*")):
        parent = disk.folder(str(path.parent))
        entry = (
            powerloss.Folder() if path.is_dir() else powerloss.Inode(bytearray(path.read_bytes()), path.read_bytes())
        )
        parent.change(**{path.name: entry})
        parent.flush()


def main(what: str, every: int, root: Path) -> None:
    trial = Trial(root)
    if what == "losses":
        calls = {name: trial.losses(name, every) for name in trial.starts}
    else:
        calls = {name: trial.num_calls(name) for name in trial.starts}
        for name, count in calls.items():
            for at in range(1, count + 1, every):
                break_at(trial, what, name, at)
    sys.stdout.write(json.dumps({"calls": calls, "seen": trial.seen, "wrong": trial.wrong}) + "\n")


def break_at(trial: Trial, what: str, name: str, at: int) -> None:
    if what == "kills":
        for mode in ("kill", "cut"):
            trial.kill_at(name, mode, at)
        return
    for number in (errno.ENOSPC, errno.EIO, errno.EINTR):
        trial.break_with(name, "fail", at, number)
    for mode in ("short", "full"):
        trial.break_with(name, mode, at, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
