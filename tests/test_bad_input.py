"""Bad input: every mistake gets one sentence that names the argument, the rule and the value."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AXIS, batch, loss_fn, mesh, tree

import jaxcomm
from configs import digits_ef21
from experiments import job
from experiments.command_line import sentence
from experiments.train import train_and_evaluate

ROOT = Path(__file__).parents[1]
KEY = jax.random.key(0)
MEAN = jaxcomm.average(AXIS)


def start(tx=None, data=None, *, axis_name=AXIS, params=None, loss=loss_fn, sync=None, **way):
    """Builds a step, its state, and takes one step."""
    tx = optax.chain(MEAN, optax.sgd(0.1)) if tx is None else tx
    way = way or {"simulate": 4}
    step = jaxcomm.make_train_step(loss, tx, axis_name=axis_name, sync=sync, **way)
    state = step.init(tree() if params is None else params, KEY)
    return step(state, batch(0) if data is None else data)


def growing(change):
    """A transform whose state is not the same after an update."""
    init = lambda params: {"count": jnp.zeros((), jnp.int32)}
    return optax.GradientTransformation(init, lambda u, s, p=None: (u, change(s)))


def chain(first):
    return optax.chain(first, optax.sgd(0.1))


ERRORS = {
    # axes
    "axis not bound": (
        lambda: start(chain(jaxcomm.average("nodes"))),
        r"axis_name='nodes' is not bound here \(axes in scope: 'workers'\)",
    ),
    "axis not bound outside": (
        lambda: MEAN.update(tree(), MEAN.init(tree())),
        r"'workers' is not bound here \(axes in scope: none\)",
    ),
    "axis not in the mesh": (
        lambda: start(mesh=mesh(4, ("data",))),
        "axis_name='workers' is not an axis of the mesh, whose axes are 'data'",
    ),
    "one axis for a pair": (
        lambda: start(axis_name=("pods", "hosts"), simulate=4),
        r"axes \('pods', 'hosts'\) cannot have the sizes \(4,\)",
    ),
    "no workers": (lambda: start(simulate=0), r"cannot have the sizes \(0,\)"),
    "two ways": (lambda: start(simulate=2, pmap=2), "only one of mesh=, simulate= and pmap="),
    "more than there are devices": (lambda: start(pmap=99), "at most 8 workers"),
    # batches
    "batch not divisible": (
        lambda: start(data=batch(0, rows=10)),
        r"batch leaf \"\['x'\]\" has 10 rows, which 4 workers do not divide",
    ),
    "batch of scalars": (lambda: start(data={"x": 1.0}), "has no axis 0 rows"),
    # compressors
    "k larger than d": (
        lambda: start(chain(jaxcomm.ef21(jaxcomm.top_k(k=25), AXIS))),
        "k must be at most the vector's size, got k=25 for size 24",
    ),
    "fraction above 1": (
        lambda: jaxcomm.top_k(1.5),
        r"top_k: fraction must be in \(0, 1\], got 1.5",
    ),
    "fraction 0": (lambda: jaxcomm.top_k(0.0), r"fraction must be in \(0, 1\], got 0.0"),
    "fraction NaN": (lambda: jaxcomm.rand_k(float("nan")), r"rand_k: fraction must be in \(0, 1\]"),
    "negative k": (
        lambda: jaxcomm.block_top_k(k=-1),
        "k must be a whole number, at least 1, got -1",
    ),
    "half a coordinate": (lambda: jaxcomm.top_k(k=2.5), "k must be a whole number.*got 2.5"),
    "half a rank": (lambda: jaxcomm.power_sgd(1.5, AXIS), "rank must be a whole number.*got 1.5"),
    "no quantizer": (
        lambda: jaxcomm.compose(jaxcomm.top_k(0.1), 4),
        "compose: quantizer must be a dense compressor, got 4",
    ),
    "fraction and k": (lambda: jaxcomm.top_k(0.1, k=3), "exactly one of fraction and k"),
    # confused arguments
    "arguments swapped": (
        lambda: jaxcomm.ef21("workers", jaxcomm.top_k(0.1)),
        "ef21: compressor must be a jaxcomm compressor such as top_k.*got 'workers'",
    ),
    "factory, not compressor": (
        lambda: jaxcomm.error_feedback(jaxcomm.top_k, AXIS),
        "error_feedback: compressor must be a jaxcomm compressor",
    ),
    "a number for a compressor": (
        lambda: jaxcomm.compressed_average(0.01, AXIS),
        "compressed_average: compressor must be.*got 0.01",
    ),
    "a number for a downlink": (
        lambda: jaxcomm.ef21(jaxcomm.top_k(0.1), AXIS, downlink=0.1),
        "ef21: downlink: compressor must be.*got 0.1",
    ),
    "no transform": (lambda: start(MEAN.init), "tx must be an Optax transform, got"),
    "a transform not called": (lambda: start(jaxcomm.ef21), "tx must be an Optax transform, got"),
    "schedule for a rule": (
        lambda: start(optax.sgd(0.1), sync=jaxcomm.every(3)),
        "sync must be a sync rule such as local_sgd.*got",
    ),
    "unknown exchange": (
        lambda: jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="star"),
        r"exchange must be one of \('gather', 'two_phase'.*\), got 'star'",
    ),
    "decay above 1": (
        lambda: jaxcomm.error_feedback(jaxcomm.sign(), AXIS, decay=1.5),
        r"decay must be in \[0, 1\], got 1.5",
    ),
    "momentum 0": (
        lambda: jaxcomm.ef21(jaxcomm.top_k(0.1), AXIS, momentum=0.0),
        r"ef21: momentum must be in \(0, 1\], got 0.0",
    ),
    "integer parameters": (
        lambda: start(
            chain(jaxcomm.ef21(jaxcomm.top_k(0.5), AXIS)),
            params={"w": jnp.ones(3), "n": jnp.arange(3)},
            loss=lambda p, b, k: jnp.sum(p["w"]),
        ),
        r"only floating-point leaves can be exchanged, got int32 at \['n'\]; leave it out",
    ),
    # chains
    "structure changes": (
        lambda: start(optax.chain(growing(lambda s: {**s, "more": s["count"]}), MEAN)),
        "changes the structure of the state",
    ),
    "dtype changes": (
        lambda: start(optax.chain(growing(lambda s: {"count": s["count"] + 0.5}), MEAN)),
        r"changes state leaf .*count.* from int32\[\] to float32\[\]",
    ),
    "shape changes": (
        lambda: start(optax.chain(growing(lambda s: {"count": s["count"][None]}), MEAN)),
        r"changes state leaf .*count.* from int32\[\] to int32\[1\]",
    ),
    "nothing communicates": (
        lambda: start(optax.adam(0.1)),
        r"tx does not communicate.*put jaxcomm.average\('workers'\) first.*or pass sync=",
    ),
    "only a scalar in the loss communicates": (
        lambda: start(optax.sgd(0.1), loss=lambda p, b, k: jax.lax.pmean(loss_fn(p, b, k), AXIS)),
        "tx does not communicate",
    ),
    "accumulation under a sync rule": (
        lambda: start(jaxcomm.accumulate(optax.sgd(0.1), 2, AXIS), sync=jaxcomm.local_sgd(AXIS, 4)),
        r"counters \.micro_step may differ.*optax.MultiSteps around what does not communicate",
    ),
    "an exchange that waits for a count, under a sync rule": (
        lambda: start(
            jaxcomm.one_bit_adam(0.1, "chips", freeze_step=3),
            axis_name=("hosts", "chips"),
            sync=jaxcomm.local_sgd(("hosts", "chips"), 4),
            simulate=(2, 2),
        ),
        r"counters \[0\]\.count, \[0\]\.frozen_at may differ.*or train without sync",
    ),
    "accumulation around the exchange": (
        lambda: start(optax.MultiSteps(chain(MEAN), 2).gradient_transformation()),
        "holds a jaxcomm transform inside a lax.cond of its own, as optax.MultiSteps",
    ),
    "a decision of one worker around the exchange": (
        lambda: start(optax.apply_if_finite(chain(MEAN), 3)),
        "holds a jaxcomm transform inside a lax.cond of its own",
    ),
    # losses
    "vector loss": (
        lambda: start(loss=lambda p, b, k: b["x"][:, 0] * p["scale"]),
        r"loss_fn must return a scalar loss, got shape \(4,\)",
    ),
    # schedules
    "round of no steps": (lambda: jaxcomm.local_sgd(AXIS, 0), "needs at least one step"),
    "round of half a step": (lambda: jaxcomm.every(0), "at least one step, got h=0"),
    "endless round": (
        lambda: jaxcomm.qsr(optax.linear_schedule(0.0, 0.1, 10), alpha=0.01, h_base=2),
        "learning rate at step 0 is 0.0.*set warmup_steps",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_sentence(name):
    call, match = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=match) as error:
        call()
    assert "\n" not in str(error.value).strip()


def test_a_state_that_changes_between_meetings_is_refused_too():
    with pytest.raises(ValueError, match="changes the structure of the state"):
        start(growing(lambda s: {**s, "more": s["count"]}), sync=jaxcomm.local_sgd(AXIS, 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_skips_the_step_for_all(bad):
    """Even where the gradients are finite: one worker's loss is infinite by its data alone."""
    step = jaxcomm.make_train_step(
        lambda p, b, k: loss_fn(p, b, k) + b["offset"][0],
        chain(jaxcomm.ef21(jaxcomm.top_k(0.2), AXIS)),
        axis_name=AXIS,
        simulate=4,
    )
    offset = np.zeros(4, np.float32)
    offset[2] = bad
    state = step.init(tree(), KEY)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = step(state, {**batch(0), "offset": offset})
    after = jax.tree.map(np.asarray, (state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (int(metrics["skipped"]), int(state.step)) == (1, 1)
    state, metrics = step(state, {**batch(1), "offset": np.zeros(4, np.float32)})
    assert (int(metrics["skipped"]), int(state.step)) == (1, 2)
    assert not np.array_equal(state.params["w"], before[0]["w"])


# The command line: exit code 2 and one sentence on stderr, without a traceback.

SMOKE = ["--config=configs/digits_ef21.py:smoke", "--config.task.model.kind=mlp"]
COMMANDS = {
    "unknown key": (["--config.foo=1"], "the config has no field 'foo'"),
    "misspelt key": (["--config.learning_rate.peek=1.0"], "no field 'peek': did you mean 'peak'?"),
    "batch": (["--config.batch_size=63"], "config.batch_size=63 is not divisible by .*workers=4"),
    "data path": (
        ["--config=configs/lm_ef21.py:smoke", "--config.task.data_path=/no/such/file.txt"],
        "/no/such/file.txt",
    ),
    "no config file": (["--config=configs/nothing.py"], "No such file.*configs/nothing.py"),
    "config argument": (
        ["--config=configs/digits_ef21.py:smok"],
        "flag --config=configs/digits_ef21.py:smok: the only config argument is 'smoke', got",
    ),
    "type": (["--config.steps=abc"], "flag --config.steps=abc: invalid literal"),
    "ratio": (["--config.tx=ef21(top_k(1.5), axis_name)"], "config.tx = .*top_k: fraction must be"),
    "axis": (
        ["--config.tx=optax.chain(average('nodes'), optax.sgd(0.1))"],
        "axis_name='nodes' is not bound here",
    ),
    "no config": (["--config=configs/common.py"], "common.py is no config: it has no function"),
    "no Python": (["--config=README.md"], r"README.md, line \d+, is no Python"),
    "URL": (["--workdir=gs://a/b"], "workdir must be in a mounted file system, got gs://a/b"),
    "workdir": (["--workdir=README.md/run"], "cannot write to workdir .*Not a directory"),
}
# runs every command in a child process of one that has imported everything
DRIVER = """
import json, os, runpy, sys
import experiments.train, sklearn.datasets
for name, argv in json.load(sys.stdin).items():
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["experiments.train", *argv]
        runpy.run_module("experiments.train", run_name="__main__")
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit code and stderr of every command."""
    folder = tmp_path_factory.mktemp("commands")
    argv = {
        str(folder / name): [f"--workdir={folder}/run", *arguments]
        if "--config=" in arguments[0]
        else [*SMOKE, f"--workdir={folder}/run", *arguments]
        for name, (arguments, _) in COMMANDS.items()
    }
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER],
        input=json.dumps(argv),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        check=True,
    )
    codes = dict(line.rsplit(" ", 1) for line in result.stdout.splitlines() if str(folder) in line)
    return {n: (int(codes[str(folder / n)]), (folder / n).read_text()) for n in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_says_it_in_one_sentence(name, ended):
    code, stderr = ended[name]
    *others, last = stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert re.search(COMMANDS[name][1], last), last
    assert code == 2
    assert "Traceback" not in stderr, others


# Fields of a config, without a process of their own.

FIELDS = {
    "mode": ({"mode": "fast"}, "config.mode must be one of devices, .*got 'fast'"),
    "devices": (
        {"workers": 64},
        "config.workers=64 does not fit 8 devices in 1 processes.*--config.mode=simulate",
    ),
    "decay": ({"learning_rate": {"decay": "linear"}}, "decay must be 'cosine' or .*got 'linear'"),
    "warm-up": ({"steps": 2}, "warmup_steps must be in .*config.steps=2"),
    "interval": ({"log_every": 0}, "log_every must be at least 1 step, got 0"),
    "unknown name": ({"tx": "chain(average(axis_name))"}, "config.tx = .*there is no 'chain'"),
    "unknown optimizer": ({"tx": "optax.sgdd(0.1)"}, "there is no optax.sgdd"),
    "swapped": ({"tx": "ef21(axis_name, top_k(0.1))"}, "config.tx = .*compressor must be"),
    "no exchange": ({"tx": "optax.sgd(learning_rate)"}, "tx does not communicate"),
    "large k": (
        {"tx": "optax.chain(ef21(top_k(k=10**6), axis_name))"},
        "k must be at most the vector's size, got k=1000000",
    ),
    "arbitrary code": ({"tx": "__import__('os').system('true')"}, "there is no '__import__'"),
    "a private name": ({"tx": "optax._src"}, "not allowed in a config expression"),
    "not an expression": ({"tx": "optax.chain("}, "config.tx is not an expression"),
    "no transform": ({"tx": "top_k(0.1)"}, r"config.tx must be an Optax transform, got 'top_k\(0"),
    "a number for a rule": ({"sync": "3"}, "config.sync must be a sync rule or empty, got '3'"),
    "arithmetic": ({"tx": "1/0"}, "config.tx = '1/0': division by zero"),
    "chain of a number": (
        {"tx": "optax.chain(5)"},
        r"config.tx = 'optax.chain\(5\)': 'int' object",
    ),
    "peak of 0": (
        {"learning_rate": {"peak": 0.0}},
        "config.learning_rate.peak must be positive, got 0",
    ),
    "checkpoints in a bucket": (
        {"local_checkpoints": "gs://bucket/run"},
        "checkpoints need a mounted file system, got gs:/bucket/run",
    ),
    "negative workers": ({"workers": -4}, "config.workers must not be negative, got -4"),
    "no rule": ({"sync": "local_sgd(axis_name, 0)"}, "config.sync = .*at least one step"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_config_that_cannot_be_is_refused(name, tmp_path):
    fields, match = FIELDS[name]
    config = digits_ef21.get_config("smoke")
    config.task.model.kind = "mlp"
    config.update(fields)
    with pytest.raises(ValueError, match=match) as error:
        train_and_evaluate(config, str(tmp_path))
    assert sentence(error.value) == str(error.value)  # as the command line shows it
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 20, "sy')
    with pytest.raises(ValueError, match=r"summary.json is damaged .*: remove it to go on"):
        train_and_evaluate(digits_ef21.get_config("smoke"), str(tmp_path))


def test_two_runs_do_not_write_to_one_directory(tmp_path):
    words = [sys.executable, "-m", "experiments.train", "--config=configs/digits_ef21.py:smoke"]
    words += [f"--workdir={tmp_path}"]
    with job.claimed(tmp_path):
        ended = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert ended.returncode == 2
        owner = f"process {os.getpid()}" if os.path.exists("/proc/locks") else "another process"
        assert f"{owner} is writing to workdir {tmp_path}: end it, or give" in ended.stderr
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="is writing to workdir"), job.claimed(tmp_path):
            pass
    with job.claimed(tmp_path):  # nobody holds it
        pass


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ValueError) as error:
        np.zeros(3).reshape(2)
    assert sentence(error.value) is None
    with pytest.raises(AttributeError) as error:
        np.zeros(3).nothing  # noqa: B018
    assert sentence(error.value) is None
