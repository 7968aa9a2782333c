"""N steps equal k steps, a kill, and N - k more: every leaf and every line, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits_dense
from experiments.tasks import make_task
from experiments.train import make_step
from jaxcomm.training.checkpoint import Checkpointer

ROOT = Path(__file__).parent.parent
TX = "optax.chain(optax.trace(0.9), ef21(top_k(0.01), axis_name), optax.adamw(learning_rate))"
SYNC = "diloco(axis_name, 7, total_steps=steps)"
EAGER = "eager_diloco(axis_name, 7, total_steps=steps)"


def start(workdir: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.train", "--config=configs/digits_dense.py:smoke"]
    command += [f"--workdir={workdir}", "--config.steps=60", "--config.checkpoint_every=5"]
    command += ["--config.log_every=1", *(f"--config.{o}" for o in overrides)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen, code: int = 0) -> None:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output.decode()[-2000:]


def stop_after(process: subprocess.Popen, workdir: Path, step: int, sign: signal.Signals) -> None:
    """Sends the signal once a checkpoint of a step up to `step` is complete."""
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / str(step) / "jaxcomm.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        time.sleep(0.01)
    process.send_signal(sign)


def lines(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def leaves(workdir: Path, overrides: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every leaf of the last checkpoint's state."""
    config = digits_dense.get_config("smoke")
    fields = {k: v == "True" or v for k, v in (o.split("=", 1) for o in overrides)}
    config.update_from_flattened_dict(fields)
    task = make_task(config)
    step = make_step(config, task.loss_fn)
    like = step.init(task.init(jax.random.key(7)), jax.random.key(8))
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        state, position, extra = checkpointer.restore(like, 60)
    found = {jax.tree_util.keystr(k): _bits(v) for k, v in jax.tree.leaves_with_path(state)}
    assert len(found) > 20
    return {**found, "position": position, "sent": extra["sent_bytes"]}


def _bits(x) -> np.ndarray:
    typed = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if typed else x)


@pytest.mark.parametrize(
    ("overrides", "sign", "code"),
    [
        (("task.model.kind=mlp", f"tx={TX}"), signal.SIGKILL, -signal.SIGKILL),
        pytest.param(
            ("tx=optax.adamw(learning_rate)", f"sync={SYNC}"),
            signal.SIGTERM,
            128 + 15,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("tx=optax.adamw(learning_rate)", f"sync={EAGER}", "background=True"),
            signal.SIGKILL,
            -signal.SIGKILL,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["error memory, SIGKILL", "in mid-round, SIGTERM", "a transfer in flight, SIGKILL"],
)
def test_killed_run_goes_on_bit_for_bit(overrides, sign, code, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}  # all run one program
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    kept["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    finish(start(whole, *overrides, **kept))
    process = start(parts, *overrides, **kept)
    stop_after(process, parts, 10, sign)
    finish(process, code)
    assert not (parts / "summary.json").exists(), "the run ended before the signal"
    finish(start(parts, *overrides, **kept))
    assert lines(parts) == lines(whole)
    expected, found = leaves(whole, overrides), leaves(parts, overrides)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["sent_bytes"] == json.loads((whole / "summary.json").read_text())["sent_bytes"]
