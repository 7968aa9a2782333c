"""LoRA and other subsets: what is frozen neither moves nor travels; sparse uploads of LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import AXIS

import jaxcomm
from jaxcomm import leaves_named, lora_init, lora_merge, trainable
from jaxcomm.compressors import identity, top_k
from jaxcomm.sync import flasc, local_sgd, periodic, streaming
from jaxcomm.traffic import traffic
from jaxcomm.transforms import average, ef21, one_bit_adam, power_sgd
from jaxcomm.transforms.common import Communication

N = 4
RNG = np.random.default_rng(0)
BASE = {
    "first": {"kernel": jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32), "bias": jnp.zeros(8)},
    "head": {"kernel": jnp.asarray(RNG.normal(size=(8, 2, 3)), jnp.float32), "bias": jnp.zeros(6)},
}
TARGET = jnp.asarray(RNG.normal(size=(12, 6)), jnp.float32)


def model(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] / 4 + params["first"]["bias"])
    return hidden @ params["head"]["kernel"].reshape(8, 6) + params["head"]["bias"]


def batch(seed):
    x = np.random.default_rng(seed).normal(size=(16, 12)).astype(np.float32)
    return x, np.tanh(x @ np.asarray(TARGET) / 4)


def whole_loss(params, batch, key):
    del key
    return jnp.mean((model(params, batch[0]) - batch[1]) ** 2)


def lora_loss(lora, batch, key):
    return whole_loss(lora_merge(BASE, lora, alpha=4.0), batch, key)


def train(loss_fn, params, tx, steps=30, **options):
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, simulate=N, donate=False, **options)
    state, losses = step.init(params, jax.random.key(0)), []
    for i in range(steps):
        state, metrics = step(state, batch(i % 4))
        losses.append(float(metrics["loss"]))
    return step, state, losses


def payload(step, state):
    """Bytes of the largest step without the metrics'."""
    report = traffic(step, state, batch(0))
    return report.largest_step_bytes - report.by("part").get("metrics", 0.0)


def test_lora_starts_as_the_base_with_r_times_a_plus_b_parameters():
    lora = lora_init(BASE, 2, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(lora)) == 2 * (12 + 8) + 2 * (8 + 6)
    merged = lora_merge(BASE, lora, alpha=4.0)
    jax.tree.map(np.testing.assert_array_equal, merged, BASE)
    lora["first"]["kernel"] = lora["first"]["kernel"]._replace(b=jnp.ones((2, 8)))
    merged = lora_merge(BASE, lora, alpha=4.0)
    change = merged["first"]["kernel"] - BASE["first"]["kernel"]
    expected = 2.0 * lora["first"]["kernel"].a.sum(1, keepdims=True) * np.ones(8)
    np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-6)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    assert lora_merge(narrow, lora, 4.0)["first"]["kernel"].dtype == jnp.bfloat16
    only = lora_init(BASE, 1, jax.random.key(0), leaves_named("first/kernel"))
    assert sum(x.size for x in jax.tree.leaves(only)) == 20
    keys = [lora_init(BASE, 2, jax.random.key(s))["first"]["kernel"].a for s in (0, 1)]
    assert (keys[0] != keys[1]).any()
    with jax.enable_x64(True):
        wide = lora_init(BASE, 2, jax.random.key(0))["first"]["kernel"]
    assert wide.a.dtype == wide.b.dtype == jnp.float32
    np.testing.assert_array_equal(wide.a, keys[0])


@pytest.mark.parametrize("where", ["lora tree alone", "one tree"])
def test_lora_trains_and_only_its_own_bytes_travel(where):
    """The same training and bytes with the base closed over, and in the parameters but frozen."""
    lora = lora_init(BASE, 2, jax.random.key(1))
    tx = optax.chain(average(AXIS), optax.adamw(0.02, weight_decay=0.1))
    step, state, losses = train(lora_loss, lora, tx)
    if where == "one tree":
        alone = state.params
        joint = lambda p, batch, key: whole_loss(lora_merge(p["base"], p["lora"], 4.0), batch, key)
        mask = {"base": False, "lora": True}
        step, state, losses = train(joint, {"base": BASE, "lora": lora}, trainable(tx, mask))
        jax.tree.map(np.testing.assert_array_equal, state.params["base"], BASE)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, state.params["lora"], alone)
        sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
        assert sum(sizes) < 3 * sum(x.size for x in jax.tree.leaves(lora))
    assert losses[-1] < 0.5 * losses[0]
    assert payload(step, state) == 2 * (N - 1) / N * 4 * (2 * (12 + 8) + 2 * (8 + 6))


@pytest.mark.slow
def test_any_transform_on_any_part():
    """FedPEFT by bias and head; error memories exist for the trained leaves only."""
    mask = leaves_named("bias|head")
    for tx in (
        optax.chain(ef21(top_k(0.25), AXIS), optax.sgd(0.1)),
        optax.chain(power_sgd(1, AXIS, min_compression_rate=0), optax.sgd(0.1)),
        one_bit_adam(0.01, AXIS, freeze_step=5),
    ):
        step, state, losses = train(whole_loss, BASE, trainable(tx, mask), steps=12)
        assert losses[-1] < losses[3]  # the same batch
        np.testing.assert_array_equal(state.params["first"]["kernel"], BASE["first"]["kernel"])
        assert (state.params["first"]["bias"] != 0).any()
        assert not any(x.shape[-2:] == (12, 8) for x in jax.tree.leaves(state.opt_state))
        assert payload(step, state) <= 2 * (N - 1) / N * 4 * (8 + 6 + 48)


def test_local_sgd_of_a_part_meets_with_its_bytes_only():
    mask = leaves_named("head")
    inner = trainable(optax.sgd(0.1), mask)
    outer = trainable(average(AXIS), mask)
    assert isinstance(outer, Communication)
    step, state, losses = train(whole_loss, BASE, inner, sync=periodic(outer, 4), steps=12)
    assert payload(step, state) == 2 * (N - 1) / N * 4 * (6 + 48)
    assert losses[-1] < losses[0]
    params = step.consensus(state)
    np.testing.assert_array_equal(params["first"]["kernel"], BASE["first"]["kernel"])
    own = state.params["head"]["kernel"]
    np.testing.assert_array_equal(own[0], own[-1])
    plain = train(whole_loss, BASE, inner, sync=local_sgd(AXIS, 4), steps=12)[1]
    np.testing.assert_allclose(own, plain.params["head"]["kernel"], rtol=1e-5, atol=1e-6)


def test_streaming_of_a_part_meets_with_its_bytes_only():
    """A fragment in which nothing matches has nothing to send; a name in no fragment is refused."""
    named = lambda pattern: streaming(trainable(average(AXIS), leaves_named(pattern)), 4, 2)
    inner = trainable(optax.sgd(0.1), leaves_named("head"))
    step, state, _ = train(whole_loss, BASE, inner, sync=named("head"), steps=4)
    assert payload(step, state) == 2 * (N - 1) / N * 4 * (6 + 48)
    with pytest.raises(ValueError, match="no leaf matches 'tail'; there are first/bias"):
        train(whole_loss, BASE, inner, sync=named("tail"), steps=0)


def lora_run(sync, steps=24):
    lora = lora_init(BASE, 2, jax.random.key(1))
    return train(lora_loss, lora, optax.sgd(0.5), steps=steps, sync=sync)


def test_flasc_with_full_densities_is_fedavg():
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    dense = lora_run(local_sgd(AXIS, 4))[1]
    for rule in (
        flasc(identity(), AXIS, 4, download=identity()),
        flasc(top_k(1.0), AXIS, 4),
    ):
        jax.tree.map(close, lora_run(rule)[1].params, dense.params)


@pytest.mark.slow
def test_flasc_uploads_and_downloads_sparse_and_keeps_the_server_dense():
    size = 2 * (12 + 8) + 2 * (8 + 6)
    rule = flasc(top_k(0.25), AXIS, 4, download=top_k(0.5), outer=optax.sgd(1.0))
    step, state, losses = lora_run(rule, 48)
    assert losses[-1] < 0.7 * losses[0]
    anchor = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(state.sync_state.anchor)])
    own = jnp.concatenate([x.reshape(N, -1) for x in jax.tree.leaves(state.params)], 1)
    assert int((own[0] != 0).sum()) == round(0.5 * size)
    assert int((anchor != 0).sum()) > 0.9 * size
    np.testing.assert_array_equal(own[0], own[-1])
    kept = np.asarray(own[0] != 0)
    np.testing.assert_array_equal(own[0][kept], anchor[kept])
    assert payload(step, state) == (N - 1) * top_k(0.25).payload_bytes(size)


@pytest.mark.slow
def test_flasc_displaces_from_what_was_downloaded():
    """With a local learning rate of zero nothing is uploaded and the server stays where it is."""
    lora = jax.tree.map(lambda x: x + 0.1, lora_init(BASE, 2, jax.random.key(1)))
    rule = flasc(top_k(0.25), AXIS, 2, download=top_k(0.5))
    _, state, _ = train(lora_loss, lora, optax.sgd(0.0), steps=6, sync=rule)
    jax.tree.map(
        lambda z, x: np.testing.assert_allclose(z, x, atol=1e-6), state.sync_state.anchor, lora
    )


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora_init(BASE, 0, jax.random.key(0))
    with pytest.raises(ValueError, match=r"\['head'\]\['kernel'\] of shape \(8, 2, 3\) cannot"):
        lora_init(BASE, 7, jax.random.key(0))
    with pytest.raises(ValueError, match="no leaf matches 'attention'; there are first/bias"):
        lora_init(BASE, 1, jax.random.key(0), leaves_named("attention"))
    with pytest.raises(ValueError, match="cannot have"):
        lora_init(BASE, 1, jax.random.key(0), leaves_named("bias"))
    with pytest.raises(TypeError, match="flasc: compressor must be"):
        flasc(0.25, AXIS, 4)
