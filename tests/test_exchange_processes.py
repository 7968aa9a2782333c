"""Every exchange between real processes over gloo gives what one process with n devices gives."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import cluster
from jaxcomm.collectives import all_gather, direct, exchange_mean, rounds
from jaxcomm.collectives.means import split_chunks
from jaxcomm.compressors import block_top_k, cast, quantize, sign
from jaxcomm.training import distributed
from tests import common

PAIR = ("fast", "slow")
WAYS = ("gather", "two_phase", "ring", "dense", "hierarchical")
CODECS = (sign(), cast("bf16"), quantize(4), block_top_k(0.1, block_size=64))
SIZE = 1003


def means(n: int) -> dict[str, np.ndarray]:
    """Of each way and codec, what the first of this process's n devices has."""
    mesh = common.mesh((n // 2, 2), PAIR)
    rows = np.random.default_rng(7).normal(size=(n, SIZE)).astype(np.float32)
    x = jax.make_array_from_callback(
        rows.shape, NamedSharding(mesh, P(PAIR)), lambda where: rows[where]
    )

    codecs = CODECS if n > 2 else CODECS[:1]  # two processes are the quick test

    def fn(x):
        run = lambda way, codec, **options: (
            exchange_mean(x[0], codec, PAIR, exchange=way, **options).mean
        )
        out = {f"{way} {codec}": run(way, codec) for way in WAYS for codec in codecs}
        out["buckets"] = run("two_phase", sign(), bucket_bytes=1024)
        out["empty"] = exchange_mean(x[0, :0], sign(), PAIR, exchange="ring").mean
        out["straight"] = direct.direct_sum(x[0], PAIR)
        out["everyone's"] = direct.direct_gather(x[0], PAIR)
        parts = rounds.all_to_all(split_chunks(x[0], n), PAIR)
        out["rounds"] = all_gather(parts.sum(0), PAIR)
        return out

    out = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(PAIR), out_specs=P()))(x)
    return {name: np.asarray(value.addressable_data(0)) for name, value in out.items()}


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_agree_with_one_process(n, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    job = cluster.Job(("-m", "tests.test_exchange_processes", str(tmp_path)), n, timeout=400)
    report = cluster.launch(job)
    assert report.outcome.exit_code == 0, report.outcome
    want = means(n)
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(n)]
    for name, value in want.items():
        for rank in ranks[1:]:
            np.testing.assert_array_equal(rank[name], ranks[0][name], err_msg=name)
        np.testing.assert_allclose(ranks[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def main(folder: str) -> None:
    """One process of the job."""
    jax.config.update("jax_num_cpu_devices", 1)
    assert distributed.initialize()
    found = means(jax.process_count())
    assert jnp.isfinite(jnp.asarray([abs(x).sum() for x in found.values()])).all()
    np.savez(Path(folder) / f"{jax.process_index()}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
