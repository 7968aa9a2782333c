"""Checkpoints: bit for bit, never hurt by a kill, every refusal in one sentence."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import two_processes
from absl import logging
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxcomm.training._checkpoint_files import CheckpointFiles
from jaxcomm.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
    StorageError,
)

ROOT = Path(__file__).parents[1]


class Memory(NamedTuple):
    error: jax.Array
    count: jax.Array


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    sync_state: tuple
    key: jax.Array
    extra: dict


def mesh_of(n: int):
    devices = jax.devices()[:n]
    return jax.make_mesh((n,), ("workers",), axis_types=(AxisType.Auto,), devices=devices)


def place(tree, spec, n=8):
    return jax.device_put(tree, NamedSharding(mesh_of(n), spec))


def make_state(seed=0, n=8) -> State:
    """Optax state, per-worker and replicated leaves, and everything that is awkward to store."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"a/b": draw(5, 3), "a": {"b": draw(3)}, "half": jnp.asarray(draw(7), jnp.bfloat16)}
    tx = optax.chain(optax.trace(0.9), optax.clip(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed + 1, x.dtype), tx.init(params))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32)
    special = np.concatenate([special, np.array([0x7FC00123], np.uint32).view(np.float32)])
    memory = Memory(place(draw(8, 33), P("workers"), n), place(np.arange(8), P("workers"), n))
    keys = jax.random.split(jax.random.key(seed), 8)
    return State(
        step=jnp.int32(seed + 3),
        params=place(params, P(), n),
        opt_state=(place(opt_state, P(), n), optax.EmptyState(), None),
        sync_state=(memory, place(draw(8, 4, 2), P(None, "workers"), min(n, 4))),
        key=place(jax.random.key(seed, impl="rbg"), P(), n),
        extra={
            "keys": place(keys, P("workers"), n),
            "empty": place(np.zeros((8, 0), np.float32), P("workers"), n),
            "no_keys": keys[:0],
            "special": jnp.asarray(special),
            "zeros": place(np.full((8, 2), -0.0, np.float32), P("workers"), n),
            "narrow": place(np.arange(8), P("workers"), n).astype(jnp.uint4),
            "fp4": jnp.asarray([0.5, -6.0], jnp.float4_e2m1fn),
            "fp8": place(draw(8), P("workers"), n).astype(jnp.float8_e4m3fn),
            "bool": jnp.asarray([True, False]),
            "numpy": rng.normal(size=3),
            "float": 0.1 + 0.2 + seed,
            "int": 7 + seed,
            "weak": jnp.asarray(0.5),
        },
    )


def raw(leaf) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(a, b):
    """Same structure, types, dtypes, devices, and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        assert type(x) is type(y), path
        assert raw(x) == raw(y), path
        if isinstance(x, jax.Array):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), path
            assert getattr(x, "weak_type", False) == getattr(y, "weak_type", False), path
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), path
            assert x.committed == y.committed, path


def abstract(state):
    spec = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(lambda x: spec(x) if isinstance(x, jax.Array) else x, state)


def saved(directory, *steps, **options):
    """A directory with a small checkpoint of each step."""
    with Checkpointer(
        directory, **{"keep": 9, "config": {"lr": 0.1}, "workers": 8, **options}
    ) as c:
        for step in steps:
            c.save(step, small(step), data_state=step)
    return directory


def small(step):
    values = np.random.default_rng(step).normal(size=(8, 1000)).astype(np.float32)
    return {"w": place(values, P("workers")), "n": jnp.int32(step)}


def test_every_leaf_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    position = {"index": 2**60, "iterator": b"\x00\xff", "nested": [1, {"x": None}]}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, state, data_state=position, extra={"seconds": 0.1 + 0.2})
        restored, data, extra = checkpointer.restore(make_state(seed=1))
    assert_same(restored, state)
    assert type(restored.sync_state[0]) is Memory
    assert data == position
    assert extra == {"seconds": 0.1 + 0.2}


def test_restores_onto_an_abstract_state_and_another_mesh(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, data_state=None)
        other = abstract(make_state(n=4))
        restored, *_ = checkpointer.restore(other)
    assert list(map(raw, jax.tree.leaves(restored))) == list(map(raw, jax.tree.leaves(state)))
    assert restored.sync_state[0].error.sharding == other.sync_state[0].error.sharding
    assert jax.random.key_impl(restored.key) == "rbg"


def test_save_returns_before_the_arrays_may_be_donated(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * -2.0, tree), donate_argnums=0)
    values = np.random.default_rng(0).normal(size=(8, 200_000)).astype(np.float32)
    state = {"sharded": place(values, P("workers")), "replicated": place(values[0], P())}
    state["single"] = jnp.array(values)
    host = values.copy()
    like = abstract(state) | {"host": host}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state | {"host": host}, data_state=None)
        host[:] = 0
        for _ in range(5):
            state = step(state)
        restored, *_ = checkpointer.restore(like)
    np.testing.assert_array_equal(restored["sharded"], values)
    np.testing.assert_array_equal(restored["replicated"], values[0])
    np.testing.assert_array_equal(restored["single"], values)
    np.testing.assert_array_equal(restored["host"], values)


def test_a_restored_state_does_not_compile_the_step_again(tmp_path):
    state = {"w": place(np.ones(8, np.float32), P("workers")), "n": jnp.int32(1)}
    step = jax.jit(lambda s: {"w": s["w"] * s["n"], "n": s["n"] + 1})
    state = step(step(state))
    compiled = step._cache_size()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, data_state=None)
        step(checkpointer.restore(state)[0])
    assert step._cache_size() == compiled


def test_a_state_without_stored_leaves(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, (), data_state=1)
        assert checkpointer.restore(()) == ((), 1, None)


def test_the_last_ones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 5, 9, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest() == 9
        assert checkpointer.steps() == [5, 9]
        assert int(checkpointer.restore(small(0), step=5)[0]["n"]) == 5


def test_a_step_is_saved_once_unless_forced(tmp_path):
    with Checkpointer(tmp_path, async_save=False) as checkpointer:
        assert checkpointer.save(1, small(1), data_state="a")
        assert not checkpointer.save(1, small(2), data_state="b")
        assert checkpointer.restore(small(0))[1] == "a"
        assert checkpointer.save(1, small(2), data_state="b", force=True)
        assert checkpointer.restore(small(0))[1] == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["1-1"]


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path):
    saved(tmp_path, 1, 2, 3)
    with Checkpointer(tmp_path, async_save=False) as checkpointer:
        with pytest.raises(
            CheckpointError, match=r"holds a checkpoint of step 3, later than step 2"
        ):
            checkpointer.save(2, small(2), data_state=None, force=True)
        checkpointer.restore(small(0), step=1)
        assert checkpointer.steps() == [1, 2, 3]
        checkpointer.save(2, small(7), data_state="new")
        assert checkpointer.steps() == [1, 2]
        assert checkpointer.restore(small(0))[1] == "new"
    assert len(list(tmp_path.glob("*.set-aside-*"))) == 2


# Interrupted saves.

KILLED = """
import sys, jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from jaxcomm.training.checkpoint import Checkpointer
state = {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=(40_000_000,)), "float32")}
checkpointer = Checkpointer(sys.argv[1], keep=1)
checkpointer.save(2, state, data_state="big")
checkpointer.wait()
print("saved", flush=True)
"""


def test_a_kill_during_a_save_leaves_the_last_one(tmp_path):
    saved(tmp_path, 1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        written = lambda: sum(f.stat().st_size for f in tmp_path.glob("2.*/**/*") if f.is_file())
        while process.poll() is None and time.monotonic() < deadline and written() < 1_000_000:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it had not finished
    finally:
        process.kill()
    assert list(tmp_path.glob("2.orbax-checkpoint-tmp*"))  # what the kill left behind
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.latest() == 1
        restored, data, _ = checkpointer.restore(small(0))
        assert_same(restored, small(1))
        assert data == 1
        checkpointer.save(2, small(2), data_state=2)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_directory_without_its_marker_is_no_checkpoint(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "jaxcomm.json").unlink()
    (tmp_path / "3").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(small(0))[1] == 1
        checkpointer.save(2, small(5), data_state="again")
        assert checkpointer.restore(small(0))[1] == "again"
        later = ["3", "4.orbax-checkpoint-tmp"]  # perhaps another run's, still at work
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2-1", *later]
        checkpointer.save(4, small(4), data_state=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2-1", "4"]


def test_what_others_keep_in_the_directory_stays(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).write_text("a file")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine").write_text("not a checkpoint")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest() is None
        checkpointer.save(2, small(2), data_state=2)
        assert checkpointer.restore(small(0))[1] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "2-1"]


def test_a_save_of_another_run_is_not_pruned(tmp_path, monkeypatch):
    """Complete right after this one has looked which are."""
    saved(tmp_path, 1)
    files, list_ = CheckpointFiles(tmp_path), CheckpointFiles._dirs

    def then_saved(self):
        found = list_(self)
        monkeypatch.undo()
        saved(tmp_path, 2)
        return found

    monkeypatch.setattr(CheckpointFiles, "_dirs", then_saved)
    files.prune(1)
    assert list(files.found()) == [1, 2]
    files.prune(1)
    assert list(files.found()) == [2]


@pytest.mark.parametrize("step", [np.int64(3), jnp.int32(3)])
def test_a_step_is_a_whole_number(tmp_path, step):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(step, small(3), data_state=None)
        checkpointer.restore(small(0), step=step)
        assert checkpointer.steps() == [3]
        for wrong in (5.0, -1, True, "3"):
            message = f"step must be a whole number of at least 0, got {wrong!r}"
            with pytest.raises(ValueError, match=message):
                checkpointer.save(wrong, small(3), data_state=None)
            with pytest.raises(ValueError, match=message):
                checkpointer.restore(small(0), step=wrong)


def test_a_directory_that_has_gone(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpointer:
        (tmp_path / "c").rmdir()
        for call in (checkpointer.latest, checkpointer.steps, lambda: checkpointer.restore({})):
            with pytest.raises(StorageError, match=r"could not be read: .*No such file"):
                call()


# Damaged files.


def damage(file: Path, how: str):
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 0x10
    elif how == "truncate":
        del content[len(content) // 2 :]
    file.write_bytes(content)
    if how == "remove":
        file.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how, caplog):
    saved(tmp_path, 10, 20)
    big = max((tmp_path / "20").rglob("d/*"), key=lambda f: f.stat().st_size)
    damage(big, how)
    with Checkpointer(tmp_path, async_save=False) as checkpointer:
        with pytest.raises(
            CorruptCheckpointError, match=r"checkpoint of step 20 in .* is corrupt: "
        ):
            checkpointer.restore(small(0), step=20)
        restored, data, _ = checkpointer.restore(small(0))
        assert_same(restored, small(10))
        assert data == 10
        assert "step 20" in caplog.text
        assert "trying the one before it" in caplog.text
        checkpointer.save(20, small(20), data_state="again")
        assert checkpointer.restore(small(0))[1] == "again"


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    saved(tmp_path, 10)
    with Checkpointer(tmp_path) as checkpointer:
        for file in sorted(
            f for f in (tmp_path / "10").rglob("*") if f.is_file() and f.stat().st_size
        ):
            good = file.read_bytes()
            damage(file, "flip")
            with pytest.raises(CheckpointError, match="corrupt"):
                checkpointer.restore(small(0))
            file.write_bytes(good)
        assert_same(checkpointer.restore(small(0))[0], small(10))


def test_a_changed_data_position_is_noticed(tmp_path):
    saved(tmp_path, 10)
    marker = tmp_path / "10" / "jaxcomm.json"
    text = marker.read_text()
    assert '"data_state": [10]' in text
    marker.write_text(text.replace('"data_state": [10]', '"data_state": [18]'))
    assert refusal(tmp_path, step=10).endswith("jaxcomm.json does not match its checksum")


def test_when_all_are_damaged_nothing_is_used(tmp_path):
    saved(tmp_path, 10, 20)
    for step in ("10", "20"):
        damage(tmp_path / step / "jaxcomm.json", "truncate")
    message = r"^every checkpoint in .* is corrupt: steps 10, 20$"
    with Checkpointer(tmp_path) as c, pytest.raises(CorruptCheckpointError, match=message):
        c.restore(small(0))


# Refusals.


def refusal(directory, state_like=None, step=None, **options) -> str:
    with Checkpointer(directory, **options) as checkpointer, pytest.raises(CheckpointError) as info:
        checkpointer.restore(small(0) if state_like is None else state_like, step)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_no_checkpoint(tmp_path):
    assert refusal(tmp_path) == f"there is no checkpoint in {tmp_path}"
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest() is None
    saved(tmp_path, 1, 2)
    said = refusal(tmp_path, step=7)
    assert said == f"there is no checkpoint of step 7 in {tmp_path}, only of 1, 2"


def test_another_configuration(tmp_path):
    config = {"learning_rate": 0.1, "model": {"width": 32, "layers": (1, 2)}, "name": "a"}
    saved(tmp_path, 1, config=config)
    where = f"checkpoint of step 1 in {tmp_path} was written with"
    said = refusal(tmp_path, config={**config, "learning_rate": 0.2})
    assert said == f"{where} learning_rate=0.1, this run has 0.2"
    other = {"model": {"width": 64, "layers": [1, 2]}, "learning_rate": 0.1, "clip": 1.0}
    said = refusal(tmp_path, config=other)
    assert said == (
        f"{where} model.width=32, this run has 64; name=a, this run has absent; "
        "clip=absent, this run has 1.0"
    )
    with Checkpointer(tmp_path, config=config, workers=8) as checkpointer:
        checkpointer.restore(small(0))


def test_another_number_of_workers(tmp_path):
    saved(tmp_path, 1)
    said = refusal(tmp_path, workers=4)
    assert "was written by 8 workers, this run has 4" in said
    assert "resize_workers(state, 4)" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"w": np.zeros((8, 7), np.float32)},
            r"\['w'\] is float32\[8,1000\] there and float32\[8,7\]",
        ),
        ({"n": np.zeros((), np.int8)}, r"\['n'\] is int32\[\] there and int8\[\] in this run"),
        ({"new": np.zeros(3)}, r"\['new'\] is absent there and float64\[3\] in this run"),
        ({"n": None}, r"\['n'\] is int32\[\] there and absent in this run"),
    ],
)
def test_another_state(tmp_path, change, message):
    saved(tmp_path, 1)
    assert re.search(message, refusal(tmp_path, {**small(0), **change}))


def test_an_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^cannot write checkpoints to .*: Not a directory$"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"^cannot write checkpoints to .*file: File exists$"):
        Checkpointer(tmp_path / "file")
    with pytest.raises(CheckpointError, match="mounted file system, got gs://bucket"):
        Checkpointer("gs://bucket/run")
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path):
    with Checkpointer(tmp_path / "c", async_save=False) as checkpointer:
        checkpointer.save(1, small(1), data_state=None)
        (tmp_path / "c").rename(tmp_path / "gone")
        (tmp_path / "c").write_text("in the way")
        message = r"^checkpoint of step 2 could not be written to "
        with pytest.raises(CheckpointError, match=message):
            checkpointer.save(2, small(2), data_state=None)
        (tmp_path / "c").unlink()
        (tmp_path / "gone").rename(tmp_path / "c")
        checkpointer.save(3, small(3), data_state=None)
        assert checkpointer.steps() == [1, 3]


def test_what_cannot_be_json_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="JSON values"):
        checkpointer.save(1, small(1), data_state=object())


# What others see.

QUIET = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from absl import logging
logging.set_verbosity(logging.INFO)
from jaxcomm.training.checkpoint import Checkpointer
for _ in range(2):
    with Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(1, {"w": jax.numpy.ones(3)}, data_state=None)
        print(checkpointer.restore({"w": jax.numpy.ones(3)})[0]["w"][0])
"""


def test_orbax_says_nothing(tmp_path):
    command = [sys.executable, "-W", "error", "-c", QUIET, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0\n1.0\n", "")
    assert not any(type(f).__name__ == "_Quiet" for f in logging.get_absl_logger().filters)


TWO = """
with Checkpointer(directory, workers=4, keep=2) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, state(step), data_state=[rank, step])
    restored, data_state, _ = checkpointer.restore(state(0))
    check(restored, 3)
    assert data_state == [rank, 3]
    assert checkpointer.steps() == [2, 3]
    if rank == 0:  # damage it
        import pathlib
        big = max(pathlib.Path(directory, "3").rglob("d/*"), key=lambda f: f.stat().st_size)
        content = bytearray(big.read_bytes())
        content[len(content) // 2] ^= 1
        big.write_bytes(content)
    from jax.experimental.multihost_utils import sync_global_devices
    sync_global_devices("damaged")
    restored, data_state, _ = checkpointer.restore(state(0))
    check(restored, 2)
    assert data_state == [rank, 2]
    checkpointer.save(3, state(4), data_state=[rank, 4])
    check(checkpointer.restore(state(0))[0], 4)
print("good", rank)
"""


def test_two_processes(tmp_path):
    two_processes.run(TWO, tmp_path)
    marker = json.loads((tmp_path / "3" / "jaxcomm.json").read_text())
    assert marker["meta"]["data_state"] == [[0, 4], [1, 4]]
    with Checkpointer(tmp_path) as checkpointer:  # one process reads what two wrote
        message = "holds 2 data positions, this run has 1 processes"
        with pytest.raises(CheckpointError, match=message):
            checkpointer.restore({})


def test_another_mesh_is_not_needed_for_one_device(tmp_path):
    """Workers simulated on one device continue from a run on eight, and back."""
    state = small(5)
    one = SingleDeviceSharding(jax.devices()[0])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, data_state=None)
        restored, *_ = checkpointer.restore(jax.device_put(small(0), one))
        assert restored["w"].sharding == one
        checkpointer.save(2, restored, data_state=None)
        assert_same(checkpointer.restore(small(0))[0], state)
