"""Checkpoints on every host's own disk, in two real processes: whose rows, which step, what if."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import two_processes

from jaxcomm.training.checkpoint import Checkpointer, CheckpointError
from jaxcomm.training.local_checkpoint import LocalCheckpointer

TWO = """
import shutil
from pathlib import Path
from jax.experimental.multihost_utils import sync_global_devices
from jaxcomm.training.local_checkpoint import LocalCheckpointer
local = Path(directory) / f"disk-{rank}"  # of this host alone
def meet(name):
    sync_global_devices(name)
with LocalCheckpointer(local, None, keep=3) as only:
    assert only.latest() is None
    for step in (1, 2, 3):
        only.save(step, state(step), data_state=[rank, step], extra={"a": step})
    only.wait(); meet("saved")
    assert only.latest() == 3
    restored, position, extra = only.restore(state(0))
    check(restored, 3)
    assert (position, extra) == ([rank, 3], {"a": 3})
    if rank == 1:  # another host is as far as this one
        shutil.rmtree(local / "process-1" / "3")
    meet("one is behind")
    assert only.latest() == 2
    check(only.restore(state(0))[0], 2)
    if rank == 0:  # damage there counts here as well
        big = local / "process-0" / "2" / "state.msgpack"
        big.write_bytes(b"0" * big.stat().st_size)
    meet("damaged")
    check(only.restore(state(0))[0], 1)
shared = Checkpointer(Path(directory) / "shared", workers=4)
with LocalCheckpointer(local, shared, workers=4) as both:
    both.save(4, state(4), data_state=[rank, 4])
    both.wait(); meet("both")
    if rank == 1:  # a new machine in its place
        shutil.rmtree(local / "process-1")
        (local / "process-1").mkdir()
    meet("replaced")
    restored, position, _ = both.restore(state(0))
    check(restored, 4)
    assert position == [rank, 4]
    if rank == 1:  # again, and what it saved last is gone from the shared path as well
        shutil.rmtree(local / "process-1")
    meet("replaced again")
others = Path(directory) / "others"
with LocalCheckpointer(local, Checkpointer(others, workers=4), workers=4) as both:
    assert both.latest() is None  # rank 0 alone has local steps: the run starts at 0
    for step in (3, 4):
        assert both.save(step, state(10 * step), data_state=[rank, 0])
    both.wait(); meet("begun")
    assert both.latest() == 4
    check(both.restore(state(0))[0], 40)
shutil.rmtree(others) if rank == 0 else None; meet("only local")
with LocalCheckpointer(local, None, workers=4) as only:
    check(only.restore(state(0))[0], 40)
with Checkpointer(Path(directory) / "first", workers=4, writers="first") as first:
    for step in (1, 2):
        first.save(step, state(step), data_state=[0, step])
    first.wait(); meet("first")
    restored, position, _ = first.restore(state(0))
    check(restored, 2)
    assert position == [0, 2]
print("good", rank)
"""


def test_two_hosts_with_disks_of_their_own(tmp_path):
    two_processes.run(TWO, tmp_path)


def test_one_process(tmp_path):
    state = {"w": jnp.arange(3.0), "n": np.int32(4)}
    like = {"w": jnp.zeros(3), "n": np.int32(0)}
    with LocalCheckpointer(tmp_path / "own", Checkpointer(tmp_path / "shared")) as checkpointer:
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            checkpointer.restore(like)
        checkpointer.save(5, state, data_state={"index": 7})
        checkpointer.wait()
        restored, position, extra = checkpointer.restore(like)
    assert (restored["w"].tolist(), int(restored["n"])) == ([0.0, 1.0, 2.0], 4)
    assert (position, extra) == ({"index": 7}, None)
    for path in ("own/process-0/5", "shared/5"):
        assert (tmp_path / path / "jaxcomm.json").exists()


def test_a_run_that_goes_back_to_the_shared_path_saves_again(tmp_path, caplog):
    """Killed before the shared save of step 10 was whole; the local ones are damaged."""
    state, like = {"w": jnp.arange(3.0)}, {"w": jnp.zeros(3)}

    def both():
        return LocalCheckpointer(tmp_path / "own", Checkpointer(tmp_path / "shared"))

    with both() as checkpointer:
        for step in (5, 10):
            checkpointer.save(step, state, data_state=step)
    (tmp_path / "shared/10/jaxcomm.json").unlink()
    for step in (5, 10):
        (tmp_path / f"own/process-0/{step}/state.msgpack").write_bytes(b"")
    with both() as checkpointer:
        assert checkpointer.restore(like)[1] == 5
        assert checkpointer.save(6, state, data_state=6)
        checkpointer.wait()
        assert checkpointer.latest() == 6
        shutil.rmtree(tmp_path / "own")  # a disk that was replaced
        assert checkpointer.restore(like)[1] == 6


def test_unknown_writers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="writers must be one of all, first, own, got 'everybody'"):
        Checkpointer(tmp_path, writers="everybody")
