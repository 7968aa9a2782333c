"""Rules that meet rarely between real processes: equal replicas, silent wires, hidden transfers."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

import jaxcomm
from experiments import cluster, netns
from jaxcomm.training import distributed
from jaxcomm.training.loop import put_batch

ROOT = Path(__file__).parent.parent
STEPS, EVERY, ELEMENTS = 12, 4, 50_000
QUIET = 4_000  # bytes of the coordination service in a few steps


def loss_fn(params, batch, key):
    del key
    return ((params["w"] - batch["x"].mean()) ** 2).mean()


def run(folder: Path) -> None:
    """One process of the job: what it found, as FOLDER/<rank>.json."""
    distributed.initialize()
    counter = network_counter()
    rank, n = jax.process_index(), jax.process_count()
    devices = [jax.local_devices(process_index=i)[0] for i in range(n)]
    mesh = Mesh(devices, ("workers",), axis_types=(AxisType.Auto,))
    rules = {
        "local": (jaxcomm.local_sgd("workers", EVERY, total_steps=STEPS), False),
        "eager": (jaxcomm.eager_diloco("workers", EVERY, total_steps=STEPS), False),
        "eager, background": (jaxcomm.eager_diloco("workers", EVERY, total_steps=STEPS), True),
        "gradients": (None, False),
        "gradients, background": (None, True),
    }
    found = {}
    for name, (rule, background) in rules.items():
        mean = () if rule else (jaxcomm.average("workers"),)
        tx = optax.chain(*mean, optax.sgd(0.3, momentum=0.9))
        step = jaxcomm.make_train_step(
            loss_fn, tx, axis_name="workers", sync=rule, mesh=mesh, background=background
        )
        state = step.init({"w": np.ones(ELEMENTS, np.float32)}, jax.random.key(0))
        hashes, sent = [], []
        for i in range(STEPS):
            batch = put_batch(step, {"x": np.full((1, 3), rank + i, np.float32)})
            before = counter()
            state, _ = step(state, batch)
            jax.block_until_ready(state)
            time.sleep(0.05)  # others may still be receiving
            sent.append(counter() - before)
            hashes.append(hashlib.sha256(local(state.params)).hexdigest())
            multihost_utils.sync_global_devices("step")
        found[name] = {"hashes": hashes, "sent": sent}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def local(params) -> bytes:
    return np.asarray(params["w"].addressable_data(0)).tobytes()


def network_counter():
    """What this host's interface has transmitted; always 0 on the loopback that all share."""
    path = os.environ.get(cluster.COUNTER)
    return (lambda: int(Path(path).read_text())) if path else (lambda: 0)


def throttled() -> bool:
    try:
        with netns.Network(1, "1gbit"):
            return True
    except netns.NetworkError:
        return False


@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_after_every_meeting_and_silent_between(hosts, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rate = "1gbit" if throttled() else None
    words = ("-m", "tests.test_meeting_processes", str(tmp_path))
    job = cluster.Job(words, hosts, rate=rate, devices_per_host=2, timeout=400)
    report = cluster.launch(job)
    assert report.outcome.exit_code == 0, report.outcome
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(hosts)]
    meetings = [i for i in range(STEPS) if (i + 1) % EVERY == 0]
    for i in range(STEPS):
        different = {rank["local"]["hashes"][i] for rank in ranks}
        assert len(different) == (1 if i in meetings else hosts), i
    for name in ("eager", "eager, background", "gradients", "gradients, background"):
        assert len({rank[name]["hashes"][-1] for rank in ranks}) == 1, name
    for rank in ranks:
        assert rank["eager, background"]["hashes"] == rank["eager"]["hashes"]
        assert rank["gradients, background"]["hashes"] == rank["gradients"]["hashes"]
    if rate is None:
        pytest.skip("equal everywhere; bytes were not read: they need root and iproute2")
    payload = 4 * ELEMENTS * 2 * (hosts - 1) / hosts
    for rank in ranks:
        for i, sent in enumerate(rank["local"]["sent"]):
            if i in meetings:
                assert payload <= sent < 1.1 * payload + QUIET
            else:
                assert sent < QUIET


if __name__ == "__main__":
    run(Path(sys.argv[1]))
