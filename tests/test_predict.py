"""Links, predicted times, advice, and programs without their communication."""

import dataclasses
import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from rich.console import Console

import jaxcomm
from jaxcomm.collectives.left_dense import record_left_dense
from jaxcomm.traffic import Collective, Link, Method, Traffic, advise, predict
from jaxcomm.traffic.alone import without_communication
from jaxcomm.traffic.table import bandwidth_text, bytes_text, seconds_text
from jaxcomm.transforms.common import log_dense

AXIS, N = "workers", 4
ONE_GBIT = Link.parse("1gbit@50us")


def collective(op, elements, *when, axes=(AXIS,), workers=N, part="values"):
    return Collective(op, axes, workers, "float32", (elements,), part, 1, when)


def report(*collectives, choices=(), workers=N, elements=1000):
    return Traffic(collectives, choices, workers, elements)


@pytest.mark.parametrize(
    ("text", "bandwidth", "latency"),
    [
        ("10mbit", 1e7, 0),
        ("1.5Gbit", 1.5e9, 0),
        ("400gbit@2us", 4e11, 2e-6),
        ("20mbps", 1.6e8, 0),  # bytes, as tc has it
        ("20MB/s", 1.6e8, 0),
        ("20Mb/s", 2e7, 0),
        ("1e3bit", None, None),
        ("fast", None, None),
        ("1gbit@soon", None, None),
        ("0mbit", None, None),
        (None, None, None),
    ],
)
def test_links_are_written_as_tc_writes_them(text, bandwidth, latency):
    if bandwidth is None:
        with pytest.raises(ValueError, match=r"link|time|bandwidth"):
            Link.parse(text)
    else:
        assert Link.parse(text) == Link(bandwidth, latency)


def test_options_of_a_link():
    assert Link.parse("1gbit", latency=1e-3).latency == 1e-3
    assert Link.parse("1gbit@1us", latency=1e-3).latency == 1e-6
    shared = Link.parse("1gbit", share=8, overhead=1.05)
    assert shared.transfer_seconds(1e6) == pytest.approx(8e6 * 8 * 1.05 / 1e9)
    assert [str(Link.parse(t)) for t in ("100mbit", "400gbit", "1.5gbit")] == [
        "100mbit",
        "400gbit",
        "1.5gbit",
    ]
    with pytest.raises(ValueError, match="share"):
        Link.parse("1gbit", share=0)
    with pytest.raises(ValueError, match="latency"):
        Link(1e9, latency=-1)


@pytest.mark.parametrize(
    ("op", "hops", "share"),
    [
        ("all-reduce", 2 * (N - 1), 2 * (N - 1) / N),
        ("all-gather", N - 1, N - 1),
        ("all-to-all", N - 1, (N - 1) / N),
        ("reduce-scatter", N - 1, (N - 1) / N),
        ("permute", 1, 1),
    ],
)
def test_a_collective_takes_its_hops_and_its_bytes(op, hops, share):
    seconds = predict(report(collective(op, 10**6)), ONE_GBIT).step_seconds
    assert seconds == pytest.approx(hops * 50e-6 + 8 * share * 4e6 / 1e9)


def test_a_step_is_the_sum_of_its_parts():
    step = report(collective("all-gather", 1000), collective("all-to-all", 5000))
    found = predict(step, ONE_GBIT, compute_seconds=0.1, codec_seconds=0.02)
    assert found.step_seconds == pytest.approx(
        0.12 + found.latency_seconds + found.transfer_seconds
    )
    assert sum(found.by_op().values()) == pytest.approx(found.communication_seconds)
    assert found.latency_seconds == pytest.approx(2 * (N - 1) * 50e-6)
    assert found.bytes_per_step == step.every_step_bytes
    with pytest.raises(ValueError, match="codec_seconds"):
        predict(step, ONE_GBIT, codec_seconds=-1)


def test_hosts_work_while_bytes_travel():
    """On a slow link the transfer hides what hosts take for messages, on a fast one not."""
    step = report(collective("all-reduce", 10**6))
    seconds = lambda link, host: predict(step, link, compute_seconds=0.1, host_seconds=host)
    slow, fast = Link.parse("100mbit@1ms"), Link.parse("100gbit@1ms")
    transfer = 8 * 4e6 * 2 * 3 / 4 / 1e8
    assert seconds(slow, 0.05).step_seconds == pytest.approx(0.1 + 6e-3 + transfer)
    assert seconds(slow, 0.5).step_seconds == pytest.approx(0.1 + 6e-3 + 0.5)
    assert seconds(fast, 0.05).communication_seconds == pytest.approx(6e-3 + 0.05)
    with pytest.raises(ValueError, match="host_seconds must not be negative"):
        seconds(slow, -1.0)


@pytest.mark.parametrize("host", [0.0, 0.05])
def test_in_the_background_codec_and_messages_go_on_together(host):
    step = report(collective("all-reduce", 10**6))
    other = {"compute_seconds": 0.1, "host_seconds": host}
    seconds = lambda codec, background: (
        predict(step, ONE_GBIT, codec_seconds=codec, background=background, **other).step_seconds
    )
    travels = predict(step, ONE_GBIT, **other).communication_seconds
    assert travels > 0.04
    for codec in (0.0, 0.02, 0.2):
        assert seconds(codec, False) == pytest.approx(0.1 + codec + travels)
        assert seconds(codec, True) == pytest.approx(0.1 + max(codec, travels))


def test_a_burst_passes_at_once_once_a_step():
    burst = Link.parse("10mbit", burst=30_000)
    sums = report(collective("all-reduce", 10**5), collective("all-reduce", 10**5))
    each = 8 * 4e5 * 2 * 3 / 4 / 1e7
    assert predict(sums, burst).step_seconds == pytest.approx(2 * each - 8 * 30_000 / 1e7)
    few = report(collective("all-reduce", 1000))
    assert predict(few, burst).step_seconds == 0
    assert predict(few, burst, host_seconds=0.01).step_seconds == pytest.approx(0.01)
    meeting = report(collective("all-reduce", 10**5, ("meet", 1)), choices=("meet",))
    rare = predict(meeting, burst, rounds_per_step=1 / 4)
    assert rare.step_seconds == pytest.approx((each - 8 * 30_000 / 1e7) / 4)
    with pytest.raises(ValueError, match="Link: burst must not be negative, got -1"):
        Link(1e6, burst=-1)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_every_kind_of_step_has_one_burst(share):
    """Equal shares are other steps, and an every-step collective is in the step of a meeting."""
    burst = Link.parse("10mbit", burst=30_000)
    yes, no = (collective("all-reduce", 10**5, ("a", b)) for b in (1, 0))
    every = collective("all-reduce", 10**4)
    for collectives in ((yes, no), (every, yes), (every, yes, no)):
        step = report(*collectives, choices=("a",))
        seconds = lambda branches, step=step: predict(step, burst, branches=branches).step_seconds
        mean = share * seconds({(1,): 1.0}) + (1 - share) * seconds({(0,): 1.0})
        assert seconds({(1,): share, (0,): 1 - share}) == pytest.approx(mean)
        assert seconds({(1,): 1.0, (0,): 0.0}) == seconds({(1,): 1.0})


def test_meetings_are_spread_over_the_steps():
    step = report(
        collective("all-reduce", 10, part="metrics"),
        collective("all-reduce", 1000, ("0", 1)),
        choices=("0",),
    )
    rare = predict(step, ONE_GBIT, rounds_per_step=1 / 8)
    always, never = (predict(step, ONE_GBIT, rounds_per_step=r) for r in (1, 0))
    meeting = always.step_seconds - never.step_seconds
    assert rare.step_seconds == pytest.approx(never.step_seconds + meeting / 8)
    assert rare.sync_seconds_per_step == pytest.approx(meeting / 8)
    assert rare == predict(step, ONE_GBIT, branches={(1,): 1 / 8, (0,): 7 / 8})
    assert rare.bytes_per_step == pytest.approx(step.every_step_bytes + step.conditional_bytes / 8)
    with pytest.raises(ValueError, match="rounds_per_step"):
        predict(step, ONE_GBIT, rounds_per_step=2)
    with pytest.raises(ValueError, match="sum to 1"):
        predict(step, ONE_GBIT, branches={(1,): 0.5})


def test_two_stages_that_both_send():
    step = report(
        collective("all-reduce", 1000, ("0", 1)),
        collective("all-gather", 30, ("0", 0)),
        choices=("0",),
    )
    assert step.largest_step_bytes == 1.5 * 4000
    assert step.smallest_step_bytes == 3 * 120
    found = predict(step, Link(8.0), branches={(1,): 0.25, (0,): 0.75})
    assert found.bytes_per_step == found.step_seconds == 0.25 * 6000 + 0.75 * 360


def test_axes_have_links_of_their_own():
    step = report(
        collective("all-gather", 1000, axes=("fast",), workers=8),
        collective("all-gather", 1000, axes=("slow",), workers=2),
        collective("all-reduce", 2, axes=("fast", "slow"), workers=16, part="metrics"),
        workers=16,
    )
    links = {"fast": Link(1e12), "slow": Link(1e6, latency=1.0)}
    found = predict(step, links)
    assert [t.latency_seconds for t in found.collectives] == [0, 1, 30]  # the slower of the two
    assert found.collectives[0].transfer_seconds == 8 * 7 * 4000 / 1e12
    with pytest.raises(ValueError, match="no link is given for axis 'slow'"):
        predict(step, {"fast": Link(1e9)})


def test_break_even_is_where_the_steps_are_equally_long():
    small = report(collective("all-gather", 10_000), elements=10**6)
    found = advise(small, ONE_GBIT, compute_seconds=0.05, codec_seconds=0.01)
    (slow, fast) = found.ranges
    assert (slow.method, fast.method) == ("method", "dense")
    assert slow.high == fast.low == found.break_even["method"]
    there = advise(small, Link(slow.high, 50e-6), compute_seconds=0.05, codec_seconds=0.01)
    times = [p.step_seconds for p in there.predictions.values()]
    assert times[0] == pytest.approx(times[1], rel=1e-9)
    assert there.speedup("method") == pytest.approx(1)
    assert found.best == "method"


@pytest.mark.parametrize("seed", range(20))
def test_ranges_name_the_best_method_at_every_bandwidth(seed):
    random = np.random.default_rng(seed)
    methods = {
        f"m{i}": Method(
            report(collective("all-gather", int(10 ** random.uniform(1, 6))), elements=10**6),
            codec_seconds=10 ** random.uniform(-5, -1),
        )
        for i in range(6)
    }
    ranges = advise(methods, ONE_GBIT).ranges
    assert ranges[0].low == 0
    assert math.isinf(ranges[-1].high)
    assert all(a.high == b.low for a, b in itertools.pairwise(ranges))
    for r in ranges:
        middle = math.sqrt(max(r.low, 1.0) * min(r.high, 1e16))
        assert advise(methods, Link(middle, 50e-6)).best == r.method


@pytest.mark.parametrize("seed", range(20))
def test_with_a_link_for_each_axis_the_lines_bend(seed):
    random = np.random.default_rng(seed)
    size = lambda low, high: 10 ** random.uniform(low, high)
    workers = {("a",): 4, ("b",): 2, ("a", "b"): 8}

    def method():
        drawn = [list(workers)[i] for i in random.integers(3, size=3)]
        ops = random.choice(["all-reduce", "all-gather", "all-to-all"], 3)
        sent = [
            collective(op, int(size(2, 5.5)), axes=axes, workers=workers[axes])
            for op, axes in zip(ops, drawn)
        ]
        return Method(report(*sent, workers=8, elements=10**6), size(-4, -1))

    methods = {"one": method(), "two": method()}
    links = {"a": Link(size(8, 11), size(-6, -4)), "b": Link(size(7, 10), size(-6, -3))}
    at = lambda b: advise(methods, links | {"b": dataclasses.replace(links["b"], bandwidth=b)})
    found = advise(methods, links, vary="b")
    for name, even in found.break_even.items():
        for b in (1e-3, even / 10, even * (1 - 1e-6), even * (1 + 1e-6)):
            if 0 < b < math.inf:
                seconds = {k: p.step_seconds for k, p in at(b).predictions.items()}
                assert (seconds[name] < seconds["dense"]) == (b < even), (name, b, even)
    assert [r.low for r in found.ranges] == [0.0, *(r.high for r in found.ranges[:-1])]
    assert math.isinf(found.ranges[-1].high)
    for r in found.ranges:
        for b in (r.low * (1 + 1e-6) or 1e-3, min(r.high * (1 - 1e-6), 1e18)):
            assert at(b).best == r.method


def test_a_method_that_wins_on_fast_links_alone_has_its_range_and_no_break_even():
    """The dense one waits for b, then for a; both others for b alone."""
    both = collective("all-reduce", 10**6, axes=("a", "b"), workers=2)
    fast, slow = (collective("all-reduce", n, axes=("b",), workers=2) for n in (10**5, 2 * 10**6))
    links = {"a": Link(1e8), "b": Link(1e7)}
    dense, little, much = (report(c, workers=2) for c in (both, fast, slow))
    found = advise({"dense": dense, "little": Method(little, 0.1), "much": much}, links, vary="b")
    assert found.break_even == {"little": math.inf, "much": 0.0}
    assert [r.method for r in found.ranges] == ["little", "much"]
    assert found.ranges[1].low == pytest.approx((6.4e7 - 3.2e6) / 0.1)


def test_methods_that_always_or_never_pay():
    less, more = (report(collective("all-gather", d), elements=10**6) for d in (10, 10**7))
    found = advise({"less": less, "more": more}, Link(1e9))
    assert found.break_even == {"less": math.inf, "more": 0.0}
    with pytest.raises(ValueError, match="at least one method"):
        advise({}, ONE_GBIT)


def test_the_dense_method_averages_over_all_axes():
    """Also where no collective of the method, such as a sum of metrics, names them all."""
    step = report(
        collective("all-reduce", 1000, axes=("fast",), workers=2),
        collective("all-reduce", 1000, ("0", 1), axes=("slow", "fast"), workers=8),
        collective("all-gather", 10, ("0", 1), axes=("slow",), workers=4),
        choices=("0",),
        workers=8,
    )
    links = {"fast": Link(1e11), "slow": Link(1e6)}
    two_axes = report(*(step.collectives[i] for i in (0, 2)), workers=8)
    for found in (step, two_axes, report(workers=8)):  # the last one names no axis at all
        predicted = advise(found, links).predictions["dense"]
        assert predicted.bytes_per_step == found.dense_equivalent_bytes == 2 * 7 / 8 * 4000
        assert predicted.step_seconds == pytest.approx(8 * 7000 / 1e6)


def test_a_link_may_be_its_bandwidth():
    step = report(collective("all-gather", 10_000), elements=10**6)
    assert predict(step, "1gbit@50us") == predict(step, ONE_GBIT)
    assert advise(step, "1gbit@50us") == advise(step, ONE_GBIT)


SMALL = report(collective("all-gather", 10, axes=("w",)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advise(SMALL, {"w": ONE_GBIT}, vary="zz"), r"one of \['w'\], got 'zz'"),
        (lambda: advise(SMALL, Link(math.inf), codec_seconds=1.0), "must be finite, got inf"),
        (lambda: advise(SMALL, 10), "a link is a bandwidth such as 100mbit.*got 10"),
        (lambda: predict(SMALL, None), "a link is a bandwidth such as 100mbit.*got None"),
        (lambda: predict(SMALL, ONE_GBIT, compute_seconds=math.nan), "compute_seconds.*got nan"),
        (lambda: predict(SMALL, ONE_GBIT, branches={(): math.nan}), "must sum to 1"),
        (lambda: jaxcomm.pace(10), "a link is a bandwidth such as 100mbit.*got 10"),
    ],
)
def test_what_is_no_link_and_no_time_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_the_slow_axis_is_in_question():
    step = report(
        collective("all-to-all", 10**6, axes=("fast",), workers=2),
        collective("all-gather", 10**4, axes=("slow",), workers=4),
        collective("all-gather", 5 * 10**5, axes=("fast",), workers=2),
        workers=8,
        elements=10**6,
    )
    dense = report(
        collective("all-reduce", 10**6, axes=("slow",), workers=4), workers=8, elements=10**6
    )
    links = {"fast": Link(1e11), "slow": Link(1e9)}
    even = advise({"dense": dense, "two": step}, links, codec_seconds=0.001).break_even["two"]
    at = links | {"slow": Link(even)}
    times = [
        p.step_seconds
        for p in advise({"dense": dense, "two": Method(step, 0.0)}, at).predictions.values()
    ]
    assert times[0] == pytest.approx(times[1], abs=0.00101)
    assert 1e9 < even < 1e12


def quadratic(params, rows, key):
    return sum(jnp.mean((x - rows["x"][0]) ** 2) for x in jax.tree.leaves(params))


def made_step(tx, **options):
    return jaxcomm.make_train_step(quadratic, tx, axis_name=AXIS, simulate=N, **options)


def test_bytes_are_counted_for_workers_without_devices():
    tx = optax.chain(jaxcomm.error_feedback(jaxcomm.sign(), AXIS), optax.sgd(0.1))
    step = jaxcomm.make_train_step(quadratic, tx, axis_name=AXIS, simulate=4096)
    state = step.abstract_state(jnp.zeros(800), jax.random.key(0))
    found = jaxcomm.traffic(step, state, {"x": jax.ShapeDtypeStruct((4096,), jnp.float32)})
    assert found.payload_bytes == 4095 * 100
    assert found.metadata_bytes == 4095 * 4
    assert (
        found.every_step_bytes - found.payload_bytes - found.metadata_bytes
        == found.by("kind")["metrics"]
    )
    assert [c.exchange for c in found.collectives][1:] == ["gather", "gather"]


def test_rows_that_the_workers_do_not_divide_are_refused():
    step = made_step(optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1)))
    state = step.abstract_state(jnp.zeros(3), jax.random.key(0))
    with pytest.raises(ValueError, match="has 9 rows, which 4 workers do not divide"):
        jaxcomm.traffic(step, state, {"x": jax.ShapeDtypeStruct((9,), jnp.float32)})


@pytest.mark.parametrize("place", ["init", "update"])
def test_what_is_left_dense_is_in_the_report_with_its_reason(place):
    def note(where):
        if where == place:
            log_dense("a rule", ["['bias']"], "too small")

    def init_fn(params):
        note("init")
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        note("update")
        return jaxcomm.average(AXIS).update(updates, state)

    tx = optax.chain(optax.GradientTransformation(init_fn, update_fn), optax.sgd(0.1))
    step = made_step(tx)
    state = step.abstract_state({"bias": jnp.zeros(3)}, jax.random.key(0))
    found = jaxcomm.traffic(step, state, {"x": jnp.ones(N)})
    assert found.left_dense == (jaxcomm.LeftDense("a rule", ("['bias']",), "too small"),)
    text = shown(jaxcomm.print_traffic, found)
    assert "left dense by a rule (too small): ['bias']" in text
    with record_left_dense() as notes:
        log_dense("a rule", [], "nothing")
    assert notes == []


def shown(print_fn, report):
    console = Console(width=200, file=io.StringIO())
    print_fn(report, console)
    return console.file.getvalue()


def test_tables_show_branches_sums_and_ranges():
    step = report(
        collective("all-reduce", 2, part="metrics"),
        collective("all-gather", 250_000, ("0", 1)),
        collective("all-gather", 100, ("0", 1), part="scale"),
        choices=("0",),
        elements=10**6,
    )
    text = shown(jaxcomm.print_traffic, step)
    for words in ("conditional 0 yes", "every step", "cheapest step", "metadata", "3 MB", "1.2 kB"):
        assert words in text, words
    text = shown(jaxcomm.print_advice, advise({"mine": step}, ONE_GBIT, codec_seconds=0.01))
    assert "mine up to" in text
    assert "dense above" in text


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (bytes_text, {0: "0 B", 999.4: "999 B", 999.6: "1 kB", 999_600: "1 MB", 2e12: "2,000 GB"}),
        (seconds_text, {0: "0", 0.000_999_9: "1 ms", 0.9996: "1 s", 999.9: "1,000 s"}),
        (bandwidth_text, {0: "never", 0.5: "0.5 bit/s", 999_900: "1 Mbit/s", 9.996e8: "1 Gbit/s"}),
    ],
)
def test_what_rounds_to_a_unit_is_written_in_it(function, texts):
    assert {value: function(value) for value in texts} == texts


def everything(x):
    """Each collective, inside what JAX has of control flow."""

    ahead = [(i, (i + 1) % N) for i in range(N)]

    def body(carry, row):
        return carry + lax.psum(row, AXIS), lax.ppermute(row, AXIS, ahead)

    total, rows = lax.scan(body, jnp.zeros(x.shape[1]), x)
    rounds = x[0, 0].astype(int) + 1  # a while loop
    looped = lax.fori_loop(0, rounds, lambda i, y: y + lax.pmax(y, AXIS), total)
    both = lax.cond(x[0, 0] > 0, lambda y: lax.all_gather(y, AXIS).sum(0), lambda y: y, looped)
    swapped = jax.jit(lambda y: lax.all_to_all(y, AXIS, 0, 0))(x)
    scattered = lax.psum_scatter(x, AXIS, tiled=True)
    tiled = lax.all_gather(x, AXIS, axis=1, tiled=True)
    return total, rows, both, swapped, scattered, tiled


def test_without_communication_equals_workers_that_hold_the_same():
    x = jnp.arange(1.0, 1 + N * 3).reshape(N, 3)
    jaxpr = jax.make_jaxpr(everything, axis_env=[(AXIS, N)])(x)
    alone = jax.jit(without_communication(jaxpr, {AXIS: N}))(x)
    same = jnp.broadcast_to(x, (N, *x.shape))
    reference = jax.vmap(everything, axis_name=AXIS)(same)
    for ours, theirs in zip(alone, reference, strict=True):
        assert ours.shape == theirs.shape[1:]
    for i in (0, 1, 2, 4, 5):  # what does not depend on who sent which row
        np.testing.assert_allclose(alone[i], reference[i][0])
    np.testing.assert_allclose(alone[3], x)
    text = jax.jit(without_communication(jaxpr, {AXIS: N})).lower(x).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "permute("))


def test_the_program_of_a_reduction_is_not_a_call():
    """It combines two elements: run on the arrays it would add them up element by element."""

    def fn(x):
        add = lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1]))
        total, top = jax.lax.reduce((x, x), (0.0, -jnp.inf), add, (0,))
        return jax.lax.psum(total, AXIS), top

    x = jnp.arange(6.0).reshape(3, 2)
    jaxpr = jax.make_jaxpr(fn, axis_env=[(AXIS, N)])(x)
    total, top = jax.jit(without_communication(jaxpr, {AXIS: N}))(x)
    np.testing.assert_array_equal(total, N * x.sum(0))
    np.testing.assert_array_equal(top, x.max(0))


def test_a_step_without_communication_is_a_worker_among_equals():
    tx = optax.chain(
        jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase"), optax.adam(0.1)
    )
    step = made_step(tx, donate=False)
    state = step.init({"a": jnp.arange(8.0), "b": jnp.ones(())}, jax.random.key(0))
    rows = {"x": jnp.ones(N)}
    after, metrics = step(state, rows)
    leaves = [
        leaf[:1] if place.name == "PER_WORKER" else leaf
        for place, leaf in zip(jax.tree.leaves(step.places), jax.tree.leaves(state))
    ]
    run = jax.jit(without_communication(step.trace(state, rows), {AXIS: N}))
    out = run(*leaves, rows["x"][:1])
    new = jax.tree.unflatten(jax.tree.structure(state), out[: len(leaves)])
    assert new.step == after.step == 1
    assert out[len(leaves)] == metrics["loss"]
    with pytest.raises(ValueError, match="arrays, got 1"):
        run(rows["x"])
