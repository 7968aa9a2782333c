"""What the compiled program really moves: XLA may widen or move what the traced one says."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from common import AXIS, batch, loss_fn, mesh, tree

import jaxcomm
from configs import digits_ef21, digits_sign_ef
from experiments.tasks import make_task
from experiments.train import make_step
from jaxcomm.traffic import traffic
from jaxcomm.traffic.ledger import SHARE
from jaxcomm.training.step import apart

OPS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
TYPE = r"([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]"
WIDTH = {"u8": 1, "s8": 1, "pred": 1, "u16": 2, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4}


class Moved(NamedTuple):
    """One collective of a compiled program."""

    op: str
    operands: tuple  # of (dtype, elements)
    part: str  # what the library calls it

    @property
    def bytes(self) -> int:
        return sum(WIDTH[dtype] * elements for dtype, elements in self.operands)


def collectives(text: str) -> list[Moved]:
    """Every collective in the text of a compiled program, with the types of its operands."""
    lines = [line.strip().removeprefix("ROOT ") for line in text.splitlines()]
    types = {}
    for line in lines:
        if match := re.match(rf"%?([\w.-]+) = {TYPE}", line):
            shape = [int(x) for x in match[3].split(",") if x]
            types[match[1]] = (match[2], math.prod(shape))
    found = []
    for line in lines:
        if match := re.search(rf"= .*?\b({OPS})(?:-start)?\(([^)]*)\)", line):
            names = re.findall(r"%([\w.-]+)", match[2])
            part = re.search(r"jaxcomm\.wire\.(\w+)", line)
            found.append(Moved(match[1], tuple(types[n] for n in names), part[1] if part else "?"))
    return found


def config_program(config):
    """The train step of a config, an abstract state and a batch."""
    task = make_task(config)
    step = make_step(config, task.loss_fn)
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = next(task.train_iterator(config.batch_size, 0))
    return step, step.abstract_state(params, jax.random.key(1)), batch


def tiny_program(tx, sync=None):
    """The same for a regression of 24 parameters."""
    chain = optax.chain(tx, optax.adam(0.1))
    step = jaxcomm.make_train_step(loss_fn, chain, axis_name=AXIS, sync=sync)
    return step, step.abstract_state(tree(), jax.random.key(1)), batch(0)


CASES = {
    "digits_ef21": lambda: config_program(digits_ef21.get_config()),
    "digits_sign_ef": lambda: config_program(digits_sign_ef.get_config("smoke")),
    "cast": lambda: tiny_program(jaxcomm.compressed_average(jaxcomm.cast("bfloat16"), AXIS)),
    "cast_two_phase": lambda: tiny_program(
        jaxcomm.error_feedback(jaxcomm.cast("float8_e4m3fn"), AXIS, exchange="two_phase")
    ),
    "quantize": lambda: tiny_program(
        jaxcomm.compressed_average(jaxcomm.quantize(bits=4, block_size=8), AXIS)
    ),
}


def compiled(step, state, batch) -> str:
    return step.lower(state, batch).compile().as_text()


@pytest.mark.parametrize("name", CASES)
def test_only_unsigned_integers_and_scales_travel(name):
    step, state, batch = CASES[name]()
    moved, report = collectives(compiled(step, state, batch)), traffic(step, state, batch)
    messages = [m for m in moved if m.part != "metrics"]
    assert messages
    for m in messages:
        assert m.op in ("all-gather", "all-to-all")
        if m.part == "scale":
            assert {dtype for dtype, _ in m.operands} == {"f32"}
            assert m.bytes <= 4 * 8  # one a block or a chunk
        else:
            assert {dtype for dtype, _ in m.operands} <= {"u8", "u16", "u32"}, m
    if name == "digits_ef21":
        k = math.ceil(0.01 * report.elements)
        assert {(m.part, m.operands) for m in messages} == {
            ("values", (("u32", k),)),
            ("indices", (("u8", -(-k * 16 // 8)),)),  # positions below 2^16
        }
    metrics = [m for m in moved if m.part == "metrics"]
    assert [m.op for m in metrics] == ["all-reduce"]
    assert metrics[0].bytes <= 16  # a flag, the loss, the accuracy
    sent = sum(SHARE[m.op](step.workers.count) * m.bytes for m in moved)
    assert sent == report.every_step_bytes  # the count is that of the compiled program


def test_the_dense_baseline_is_seen_by_the_same_eyes():
    """The parser finds float32 where it is: a dense average moves all parameters as float32."""
    step, state, batch = tiny_program(jaxcomm.average(AXIS))
    moved, report = collectives(compiled(step, state, batch)), traffic(step, state, batch)
    assert ("f32", report.elements) in [x for m in moved for x in m.operands]
    assert sum(SHARE[m.op](8) * m.bytes for m in moved) == report.every_step_bytes


def test_local_steps_move_nothing():
    """The collectives of a sync rule are inside the conditional's branch, and nowhere else."""
    step, state, batch = tiny_program(optax.identity(), jaxcomm.local_sgd(AXIS, 4))
    text = compiled(step, state, batch)
    computations = re.split(r"\n(?=\S)", text)  # one a function of the program
    holding = [c for c in computations if re.search(rf"\b({OPS})(-start)?\(", c)]
    assert len(holding) == 1
    assert not holding[0].startswith("ENTRY")
    name = re.match(r"%?([\w.-]+)", holding[0])[1]
    assert re.search(rf"conditional\(.*%?{re.escape(name)}\b", text)
    report = traffic(step, state, batch)
    assert (report.every_step_bytes, report.largest_step_bytes > 0) == (0, True)


@pytest.mark.parametrize("exchange", ["gather", "two_phase"])
@pytest.mark.parametrize("optimizer", [optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_step_between_meetings_copies_nothing(exchange, optimizer):
    """Conditionals change the state, or hand it through, where it lies, on CPU as well."""
    feedback = jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange=exchange)
    rule = jaxcomm.periodic(feedback, 3)
    loss = lambda p, x, key: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) ** 2)
    step = jaxcomm.make_train_step(loss, optimizer, axis_name=AXIS, sync=rule, mesh=mesh(2))
    params = {"w": jnp.ones((48, 32)), "b": jnp.ones(32), "v": jnp.ones((32, 40))}
    state = step.init(params, jax.random.key(0))
    program = step._compile(state).lower(*apart(state), jnp.ones((8, 48))).compile()
    arrays = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
    own = sum(x.addressable_data(0).nbytes for x in arrays)
    assert program.memory_analysis().alias_size_in_bytes >= own
    computations = re.split(r"\n(?=\S)", program.as_text())  # one a function of the program
    shapes = "|".join(",".join(map(str, x.shape)) for x in params.values())
    copying = [c for c in computations if re.search(rf"= f32\[(1,)?({shapes})\]\S* copy\(", c)]
    assert all(re.search(rf"\b({OPS})(-start)?\(", c) for c in copying)  # only who meets
