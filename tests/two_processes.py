"""Two real processes of two CPU devices each that run one script, and a state they share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

HEAD = """
import sys, jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, address, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, rank)
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxcomm.training.checkpoint import Checkpointer
mesh = jax.make_mesh((4,), ("workers",), axis_types=(AxisType.Auto,))
def make(values, spec):
    return jax.make_array_from_callback(
        values.shape, NamedSharding(mesh, spec), lambda index: values[index])
rows = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
data = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 4)))
def state(scale):
    return {"sharded": make(rows * scale, P("workers")), "replicated": make(rows * scale, P()),
            "empty": make(rows[:, :0], P("workers")), "local": jnp.float32(2 * scale),
            "keys": jax.random.wrap_key_data(make(data * scale, P("workers"))),
            "key": jax.random.wrap_key_data(make(data[0] * scale, P()))}
def check(restored, scale):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(restored),
                            jax.tree.leaves(state(scale))):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding), path
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        for x, y in zip(a.addressable_shards, b.addressable_shards):
            assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes(), path
"""


def run(body: str, directory: Path) -> None:
    """Runs HEAD and the body in both, given rank, coordinator and directory; both must end well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    words = lambda rank: [sys.executable, "-c", HEAD + body, str(rank), address, str(directory)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(words(rank), cwd=ROOT, env=os.environ, **pipes) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
