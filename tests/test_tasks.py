"""The tasks: deterministic, resumable data; fixed splits; models that learn; errors that help."""

import doctest
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.tasks import cifar10, corpus, digits, make_task, pipeline, task_config
from experiments.tasks.transformer import Transformer

TINY_LM = {"seq_len": 16, "model": {"num_layers": 1, "width": 16, "num_heads": 2}}
TINY_IMAGES = {"model": {"channels": (4,), "hidden": 8}}


def make(name, changes=None):
    """The task `name` in its smoke size, with `changes` (nested dicts) to its section."""
    section = task_config(name, "smoke")
    section.update(changes or {})
    return make_task(ml_collections.ConfigDict({"task": section}))


def write_cifar10(
    directory, files=(("data_batch_1", 40), ("data_batch_2", 20), ("test_batch", 30))
):
    """Records whose label is the position and whose pixels are bright where the label says."""
    for file, count in files:
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.random.RandomState(count).randint(0, 100, (count, 3, 32, 32)).astype(np.uint8)
        pixels[np.arange(count), labels % 3, labels] = 255
        records = np.concatenate([labels[:, None], pixels.reshape(count, -1)], axis=1)
        records.tofile(directory / f"{file}.bin")
    return str(directory)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = write_cifar10(tmp_path_factory.mktemp("cifar10"))
    return {
        "digits": make("digits", TINY_IMAGES),
        "cifar10": make("cifar10", TINY_IMAGES | {"data_path": path}),
        "lm": make("lm", TINY_LM | {"max_bytes": 100_000, "validation_windows": 45}),
    }


NAMES = ("digits", "cifar10", "lm")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


# Data: the iterator.


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_deterministic_and_resume_in_mid_epoch(tasks, name):
    task = tasks[name]
    one, two, other = (task.train_iterator(24, seed) for seed in (7, 7, 8))
    batches = [next(one) for _ in range(5)]
    for batch in batches:
        same(batch, next(two))
        assert all(isinstance(x, np.ndarray) and len(x) == 24 for x in batch.values())
    first, different = batches[0], next(other)
    assert any(np.any(first[k] != different[k]) for k in first)

    state = json.loads(json.dumps(one.get_state()))
    expected = [next(one) for _ in range(4)]
    restored = task.train_iterator(24, 7)
    next(restored)  # a used iterator goes to the position as well
    restored.set_state(state)
    for batch in expected:
        same(batch, next(restored))
    assert restored.get_state() == {"next_index": 9}


@pytest.mark.parametrize("name", NAMES)
def test_processes_share_one_global_batch(tasks, name):
    task = tasks[name]
    whole = task.train_iterator(24, 3)
    parts = [task.train_iterator(24, 3, i, 4) for i in range(4)]
    for _ in range(4):
        pieces = [next(p) for p in parts]
        same(next(whole), {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]})


def test_every_epoch_is_another_permutation():
    batches = pipeline.train_iterator(10, lambda i: {"i": i}, 4, seed=5)
    epochs = np.concatenate([next(batches)["i"] for _ in range(10)]).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(e) for e in epochs.tolist()}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "batch_size must be at least 1, got 0"),
        ((8, -1), r"seed must be in \[0, 2\*\*32\), got -1"),
        ((8, 0, 2, 2), "process_index must be in .* got 2 of 2"),
        ((8, 0, 0, 3), "batch_size must be divisible by process_count, got 8 and 3"),
    ],
)
def test_iterator_errors(tasks, arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks["digits"].train_iterator(*arguments)


# Data: the sources and their splits.


def test_digits_split_is_every_image_once():
    from sklearn.datasets import load_digits

    data = digits.load_digits()
    train = data.fetch(np.arange(data.num_train))
    images = np.concatenate([train["image"], data.validation["image"]]).reshape(1797, 64) * 16
    labels = np.concatenate([train["label"], data.validation["label"]])
    pixels, classes = load_digits(return_X_y=True)
    rows = np.column_stack([images, labels])
    expected = np.column_stack([pixels, classes])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert (data.num_train, len(data.validation["label"])) == (1437, 360)
    # The split of every published figure: it must never change.
    assert data.validation["label"][:10].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1]


def test_cifar10_layout_and_split(tmp_path):
    data = cifar10.load_cifar10(Path(write_cifar10(tmp_path)))
    train = data.fetch(np.arange(data.num_train))
    assert data.num_train == 60
    assert len(data.validation["label"]) == 30
    assert train["label"].tolist() == [*range(10)] * 6
    assert train["image"].shape == (60, 32, 32, 3)
    assert train["image"].dtype == np.float32
    for image, label in zip(train["image"], train["label"]):
        row = image[label, :, label % 3] * cifar10.STD[label % 3] + cifar10.MEAN[label % 3]
        np.testing.assert_allclose(row, 1.0, rtol=1e-5)  # channel and row are where they belong


def test_windows_of_the_split_share_no_token(tmp_path):
    tokens = np.arange(5_000, dtype="<u4")  # every token is its own position
    tokens.tofile(tmp_path / "positions.bin")
    text = corpus.load_corpus(str(tmp_path / "positions.bin"), "uint32", 5_000, 0)
    split = corpus.split_windows(5_000, 10, split_block=100)
    train, validation = (
        corpus.gather_windows(text, s, 10) for s in (split.train, split.validation)
    )
    assert not np.intersect1d(train, validation).size
    assert np.unique(validation // 100).tolist() == [19, 39]
    np.testing.assert_array_equal(np.diff(train, axis=1), 1)
    targets = train[:, 1:].ravel()
    assert len(np.unique(targets)) == len(targets) == 48 * 9 * 10
    small = corpus.split_windows(500, 10, split_block=100)
    assert (small.block, len(small.train), len(small.validation)) == (25, 38, 2)


def test_text_and_token_files_are_read_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello " * 50)
    (tmp_path / "b.txt").write_bytes("wörld".encode() * 50)
    text = corpus.load_corpus(f"{tmp_path}/a.txt, {tmp_path}/b.txt", "uint16", 0, 0)
    assert bytes(text.tokens) == b"hello " * 50 + "wörld".encode() * 50
    (np.arange(600, dtype="<u2") % 300).tofile(tmp_path / "t.bin")
    task = make(
        "lm", TINY_LM | {"data_path": f"{tmp_path}/t.bin", "vocab_size": 300, "max_bytes": 1000}
    )
    assert task.metadata["tokens"] == 500
    batch = next(task.train_iterator(4, 0))["tokens"]
    assert batch.shape == (4, 17)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(np.diff(batch, axis=1) % 300, 1)


def test_standard_library_is_the_default_corpus():
    text = corpus.standard_library()
    assert len(text) > 5_000_000
    assert b"class OrderedDict" in text
    assert b"_sysconfigdata" not in text[:1000]
    task = make("lm", TINY_LM)
    assert task.metadata["vocab_size"] == 256
    assert 3.0 < task.metadata["unigram_entropy"] < 3.6  # nats a byte


def test_unigram_entropy_is_the_cross_entropy_of_the_validation_targets(tmp_path):
    rng = np.random.RandomState(0)
    letters = rng.choice(list(b"abcd"), size=20_000, p=[0.5, 0.25, 0.125, 0.125]).astype(np.uint8)
    (tmp_path / "letters.txt").write_bytes(letters.tobytes())
    task = make("lm", TINY_LM | {"data_path": str(tmp_path / "letters.txt")})
    assert task.metadata["unigram_entropy"] == pytest.approx(1.75 * np.log(2), abs=0.05)
    count = (
        np.bincount(letters[: 19 * 1000], minlength=256) + 1
    )  # blocks of 1000; nr. 20 is held out
    starts = 19_000 + 16 * np.linspace(0, 61, 62).astype(int)
    targets = letters[starts[:, None] + np.arange(1, 17)]
    expected = -np.log(count / count.sum())[targets].mean()
    assert task.metadata["unigram_entropy"] == pytest.approx(expected, rel=1e-9)


# Models.


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_finite_and_the_loss_falls(tasks, name):
    task = tasks[name]
    params = task.init(jax.random.key(0))
    assert all(type(node) is dict for node in _inner_nodes(params))
    assert task.metadata["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    json.dumps(task.metadata)
    tx = optax.adam(1e-2)
    state, batch = tx.init(params), next(task.train_iterator(32, 0))

    @jax.jit
    def step(params, state):
        (loss, aux), grads = jax.value_and_grad(task.loss_fn, has_aux=True)(
            params, batch, jax.random.key(0)
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, aux, grads

    losses = []
    for _ in range(15):
        params, state, loss, aux, grads = step(params, state)
        losses.append(float(loss))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert aux["accuracy"].shape == ()
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads))
    assert losses[-1] < 0.9 * losses[0]


def _inner_nodes(tree):
    if not isinstance(tree, jax.Array):
        yield tree
        for child in tree.values():
            yield from _inner_nodes(child)


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_is_the_loss_of_the_whole_validation_set(tasks, name, tmp_path):
    task = tasks[name]
    params = task.init(jax.random.key(1))
    if name == "digits":
        whole = digits.load_digits().validation
    elif name == "cifar10":
        whole = cifar10.load_cifar10(Path(write_cifar10(tmp_path))).validation
    else:  # 45 windows, evaluated 32 at a time: the last chunk is filled up
        text = corpus.load_corpus("", "uint16", 0, 100_000)
        starts = corpus.split_windows(100_000, 16, 65_536).validation
        starts = starts[np.linspace(0, len(starts) - 1, 45).astype(int)]
        whole = {"tokens": corpus.gather_windows(text, starts, 16)}
    loss, aux = jax.jit(task.loss_fn)(params, whole, None)
    got = task.evaluate(params)
    assert got["validation_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert got["validation_accuracy"] == pytest.approx(float(aux["accuracy"]), rel=1e-5)
    mesh = jax.make_mesh((8,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.device_put(params, jax.NamedSharding(mesh, P()))
    assert task.evaluate(replicated) == got


@pytest.mark.parametrize("name", ["digits", "lm"])
def test_gradients_over_eight_devices_average_to_the_global_gradient(tasks, name):
    task = tasks[name]
    params, batch = task.init(jax.random.key(0)), next(task.train_iterator(16, 0))
    mesh = jax.make_mesh((8,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params, batch):
        varying = jax.tree.map(lambda x: jax.lax.pcast(x, "w", to="varying"), params)
        grads = jax.grad(task.loss_fn, has_aux=True)(varying, batch, None)[0]
        return jax.tree.map(lambda g: jax.lax.pmean(g, "w"), grads)

    step = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("w")), out_specs=P())
    got = jax.jit(step)(params, batch)
    expected = jax.jit(jax.grad(task.loss_fn, has_aux=True))(params, batch, None)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, expected)


def test_mlp_and_tied_models(tasks):
    mlp = make("digits", {"model": {"kind": "mlp", "hidden": 16}})
    assert mlp.metadata["parameters"] == (64 * 16 + 16) + (16 * 16 + 16) + (16 * 10 + 10)
    tied = make("lm", {"max_bytes": 100_000, "model": TINY_LM["model"] | {"tie": True}})
    untied = make("lm", {"max_bytes": 100_000, "model": TINY_LM["model"]})
    assert untied.metadata["parameters"] - tied.metadata["parameters"] == 16 * 256
    for task in (mlp, tied):
        params, batch = task.init(jax.random.key(0)), next(task.train_iterator(8, 0))
        assert np.isfinite(jax.jit(task.loss_fn)(params, batch, None)[0])


def test_default_sizes():
    assert (
        make_task(ml_collections.ConfigDict({"task": {"name": "digits"}})).metadata["parameters"]
        == 38_282
    )
    section = {"name": "lm", "max_bytes": 1_000_000}
    lm = make_task(ml_collections.ConfigDict({"task": section}))
    assert lm.metadata["parameters"] == 869_504


@pytest.mark.parametrize("name", ["digits", "lm"])
def test_bfloat16_computes_near_float32(tasks, name):
    full, model = tasks[name], (TINY_LM if name == "lm" else TINY_IMAGES)["model"]
    short = {"lm": TINY_LM | {"max_bytes": 100_000}, "digits": {}}[name]
    half = make(name, short | {"model": model | {"dtype": "bfloat16"}})
    params, batch = full.init(jax.random.key(0)), next(full.train_iterator(16, 0))
    loss, half_loss = (jax.jit(t.loss_fn)(params, batch, None)[0] for t in (full, half))
    assert half_loss.dtype == jnp.float32
    assert loss != half_loss
    np.testing.assert_allclose(half_loss, loss, rtol=0.02)
    # Both types are options of their own: bfloat16 storage with float32 arithmetic.
    stored = make(name, short | {"model": model | {"param_dtype": "bfloat16"}})
    for task, dtype in ((half, "float32"), (stored, "bfloat16")):
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    np.testing.assert_allclose(jax.jit(stored.loss_fn)(low, batch, None)[0], loss, rtol=0.02)


def test_transformer_sees_no_later_token():
    model = Transformer(11, 8, 2, 16, 2, False, jnp.float32, jnp.float32, rngs=nnx.Rngs(params=0))
    tokens = jnp.arange(8)[None] % 11
    forward = nnx.jit(lambda model, tokens: model(tokens))
    before, after = forward(model, tokens), forward(model, tokens.at[0, 5].set(10))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


def train(task, steps, batch_size, learning_rate):
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps))
    params = task.init(jax.random.key(0))
    state, batches = tx.init(params), task.train_iterator(batch_size, 0)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(task.loss_fn, has_aux=True)(params, batch, None)[0]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state, next(batches))
    return task.evaluate(params)


@pytest.mark.slow
def test_digits_reach_97_percent():
    task = make_task(ml_collections.ConfigDict({"task": task_config("digits")}))
    assert train(task, 300, 128, 3e-3)["validation_accuracy"] >= 0.97


@pytest.mark.slow
def test_smoke_lm_learns_more_than_unigrams():
    task = make("lm")
    got = train(task, 60, 32, 1e-2)
    assert got["validation_loss"] < task.metadata["unigram_entropy"] - 0.6


# Errors: each one sentence that says what was looked for.


def _file(path, content):
    path.write_bytes(content)
    return str(path)


BIN = {"vocab_size": 300}
ERRORS = [
    ("digits", lambda d: {"data_path": "x"}, "data_path must be '' .* got 'x'"),
    ("digits", lambda d: {"model": {"kind": "tree"}}, "kind must be 'conv' or 'mlp', got 'tree'"),
    ("digits", lambda d: {"model": {"hidden": 0}}, "hidden and channels must be at least 1, got 0"),
    ("digits", lambda d: {"model": {"dtype": "int8"}}, "model.dtype must be .* got 'int8'"),
    ("cifar10", lambda d: {}, "data_path must name the directory"),
    ("cifar10", lambda d: {"data_path": f"{d}/no"}, "there is no directory .*/no"),
    ("cifar10", lambda d: {"data_path": str(d)}, r"no data_batch_\*.bin in"),
    (
        "cifar10",
        lambda d: {"data_path": write_cifar10(d, [("data_batch_1", 3)])},
        "there is no file .*test_batch.bin",
    ),
    (
        "cifar10",
        lambda d: {"data_path": str(_file(d / "data_batch_1.bin", b"") and d)},
        "data_batch_1.bin must hold one or more records of 3073 bytes, but it has 0 bytes",
    ),
    (
        "cifar10",
        lambda d: {"data_path": str(_file(d / "data_batch_1.bin", b"x" * 3074) and d)},
        "records of 3073 bytes, but it has 3074 bytes",
    ),
    (
        "cifar10",
        lambda d: {"data_path": str(_file(d / "data_batch_1.bin", b"\x0a" + b"x" * 3072) and d)},
        "labels from 0 to 9, got 10",
    ),
    ("lm", lambda d: {"data_path": f"{d}/no.txt"}, "there is no file .*/no.txt"),
    ("lm", lambda d: {"data_path": f"{d}/no.bin"} | BIN, "there is no file .*/no.bin"),
    ("lm", lambda d: {"data_path": _file(d / "e.txt", b"")}, "e.txt is empty"),
    (
        "lm",
        lambda d: {"data_path": _file(d / "s.txt", b"abc")},
        "at least 20 blocks of .* 3 tokens",
    ),
    ("lm", lambda d: {"data_path": _file(d / "e.bin", b"")} | BIN, "but it has 0 bytes"),
    (
        "lm",
        lambda d: {"data_path": _file(d / "o.bin", b"abc")} | BIN,
        "uint16 tokens of 2 bytes, but it has 3 bytes",
    ),
    (
        "lm",
        lambda d: {"data_path": _file(d / "v.bin", b"\xff\xff" * 2000)} | BIN,
        "must be below config.task.vocab_size = 300, got 65535",
    ),
    ("lm", lambda d: {"data_path": f"{d}/x.bin"}, "vocab_size must be given .* got 0"),
    (
        "lm",
        lambda d: {"data_path": f"{d}/x.bin", "token_dtype": "int8"} | BIN,
        "token_dtype must be 'uint16' or 'uint32', got 'int8'",
    ),
    ("lm", lambda d: {"vocab_size": 100}, "vocab_size must be 0 or 256 for bytes, got 100"),
    ("lm", lambda d: {"max_bytes": -1}, "max_bytes must be at least 0, got -1"),
    ("lm", lambda d: {"seq_len": 0}, "seq_len must be at least 1, got 0"),
    ("lm", lambda d: {"validation_windows": 0}, "validation_windows must be at least 1, got 0"),
    ("lm", lambda d: {"model": {"num_heads": 3}}, "divisible by num_heads, got 64 and 3"),
    (
        "lm",
        lambda d: {"model": {"num_layers": 0}},
        "num_layers and width must be at least 1, got 0",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), ERRORS)
def test_bad_input(tmp_path, name, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as info:
        make(name, changes(tmp_path))
    assert "\n" not in str(info.value)
    assert ("there is no" in message or "no data_batch" in message) == (
        info.type is FileNotFoundError
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.task must be given"),
        ({"task": {}}, "name must be one of digits, cifar10, lm, got ''"),
        ({"task": {"name": "mnist"}}, "name must be one of digits, cifar10, lm, got 'mnist'"),
        ({"task": {"name": "digits", "seq_len": 3}}, "config.task.seq_len is not a field"),
        ({"task": {"name": "lm", "model": {"depth": 3}}}, "config.task.model.depth is not a field"),
        ({"task": {"name": "lm", "seq_len": "x"}}, "config.task.seq_len must be a int, got 'x'"),
    ],
)
def test_bad_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        make_task(ml_collections.ConfigDict(config))


def test_a_token_outside_the_vocabulary_is_refused_when_it_is_fetched(tmp_path):
    tokens = np.zeros(2000, "<u2")
    tokens[:100] = 300  # in a training block only
    tokens.tofile(tmp_path / "t.bin")
    task = make("lm", TINY_LM | BIN | {"data_path": f"{tmp_path}/t.bin"})
    with pytest.raises(ValueError, match="vocab_size = 300, got 300"):
        next(task.train_iterator(256, 0))


def test_task_config_errors():
    with pytest.raises(ValueError, match="got 'huge'"):
        task_config("lm", "huge")


@pytest.mark.parametrize("module", ["experiments.tasks", "experiments.tasks.defaults"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
