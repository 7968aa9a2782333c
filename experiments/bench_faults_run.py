"""One case of `bench_faults`: the run that is hit, its times, and what it must end like."""

import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.bench_faults_cases import Case, disk, hit, undo
from experiments.bench_faults_job import STEPS, Run, cache, command, uninterrupted
from jaxcomm.training._checkpoint_files import MARKER, read_marker


class TooLate(Exception):
    """The job had ended before the fault could matter."""


def measure(case: Case, workdir: Path, timeout: float, stuck: float) -> dict[str, Any]:
    """Runs a case; the row of the table, with what failed, if anything."""
    reference = uninterrupted(case.method, case.processes, workdir, timeout)
    folder = workdir / case.name
    row = {**dataclasses.asdict(case), "failure": None}
    while case.step:  # a busy machine may be late with the fault: then it comes earlier
        try:
            row |= attempt(case, folder, reference, timeout, stuck)
            break
        except TooLate as error:
            row["failure"] = str(error)
            case = dataclasses.replace(case, step=case.step // 2)
        except (TimeoutError, AssertionError) as error:
            row["failure"] = str(error)
            break
    if not row["failure"]:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def attempt(
    case: Case, folder: Path, reference: Path, timeout: float, stuck: float
) -> dict[str, Any]:
    """Runs a case once; what was measured.

    Raises:
      TooLate: the job ended before the fault.
      TimeoutError: it hung, or did not do what was expected next.
      AssertionError: it ended, but not as it should.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options: dict[str, Any] = {"timeout": timeout, "stuck": stuck, "restarts": 3}
    if case.kind == "continue":
        options |= {"on_failure": "continue", "losses": 1, "restarts": 0}
    if case.kind == "cut":
        options["rate"] = "1gbit"
    with disk(case, folder):
        words = command(case.method, case.processes, folder, options)
        run = Run(words, folder / "log", cache(reference))
        try:
            result = follow(case, run, folder, timeout)
            return {**result, **check(case, folder, reference), "step": case.step, "failure": None}
        except OSError as error:
            lines = [line for _, line in run.lines]
            ended = not any("cluster: " in line or "lost" in line for line in lines)
            if ended and any(f"step {STEPS}/" in line for line in lines):
                raise TooLate("the job ended before the fault") from None
            raise TimeoutError(str(error)) from error
        finally:
            run.end()


def follow(case: Case, run: Run, folder: Path, timeout: float) -> dict[str, Any]:
    """Waits for the moment, makes the fault happen, and times what becomes of it."""
    deadline = time.monotonic() + timeout + 30
    index, _, _ = run.wait_for(rf"\[0\] step {case.step}/", deadline)
    time.sleep(case.delay)
    at = [int(m[1]) for _, line in run.lines if (m := re.search(r"\[0\] step (\d+)/", line))][-1]
    begin = time.monotonic()
    hit(case, run, folder)
    if case.kind == "continue":
        index, when, match = run.wait_for(r"from step (\d+), (\d+) steps again", deadline, index)
        index, when, _ = run.wait_for(r"\[0\] .*going on after", deadline, index)
        result = {"lost_steps": int(match[2]), "attempts": 1}
    else:
        index, named, _ = run.wait_for(r"^cluster: .*attempt \d+ of", deadline, index)
        undo(case, run, folder)
        index, when, match = run.wait_for(r"\[0\] step (\d+)/", deadline, index)
        result = {"lost_steps": max(0, at - int(match[1]) + 1), "noticed_seconds": named - begin}
    left = deadline - time.monotonic()
    try:
        code = run.process.wait(max(left, 1))
    except subprocess.TimeoutExpired:
        raise TimeoutError("the job did not end") from None
    attempts = 1 + sum("cluster: " in line and "attempt" in line for _, line in run.lines)
    assert code == 0, f"the job ended with code {code}"
    return {**result, "recovery_seconds": when - begin, "attempts": attempts}


def check(case: Case, folder: Path, reference: Path) -> dict[str, Any]:
    """What an ended run must fulfil.

    Raises:
      AssertionError: it does not.
    """
    for path in (folder / "checkpoints").glob(f"*/{MARKER}"):
        _, problem = read_marker(path.parent)
        assert problem is None, f"corrupt checkpoint {path.parent.name}: {problem}"
    found, expected = metrics(folder), metrics(reference)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1)), "steps are missing"
    if case.kind == "continue":
        summary = json.loads((folder / "summary.json").read_text())
        assert summary.get("lost_processes") == 1, "nobody was lost"
        losses = [[row["loss"] for row in part] for part in (found[:10], found[-10:])]
        before, after = map(statistics.mean, losses)
        assert after < before, f"the loss went from {before:.4f} to {after:.4f}"
        whole = statistics.mean(row["loss"] for row in expected[-10:])
        return {"loss": after, "whole_loss": whole}
    assert found == expected, "the metrics differ from those of the uninterrupted run"
    state, whole = last_state(folder), last_state(reference)
    assert state.keys() == whole.keys(), "the last states have other leaves"
    other = [name for name in whole if state[name].tobytes() != whole[name].tobytes()]
    assert not other, f"the last states differ in {', '.join(other)}"
    return {"leaves": len(whole)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run but for the seconds."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """Every leaf of the last checkpoint, as it is stored."""
    path = max(
        (p.parent for p in (folder / "checkpoints").glob(f"*/{MARKER}")),
        key=lambda p: [int(part) for part in p.name.split("-")],
    )
    meta, _ = read_marker(path)
    abstract = {name: _empty(text) for name, text in meta["layout"].items()}
    return ocp.load(str(path), {name: x for name, x in abstract.items() if x.size})


def _empty(text: str) -> np.ndarray:
    """An array like a leaf of a layout, 'float32[8,4]' or 'key<threefry2x32>[]'."""
    name, _, shape = text.rstrip("]").partition("[")
    sizes = [int(size) for size in shape.split(",") if size]
    return np.empty([*sizes, 2], np.uint32) if name.startswith("key<") else np.empty(sizes, name)
