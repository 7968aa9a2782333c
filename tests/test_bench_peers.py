"""experiments.bench peers: cases, both models, reports; and the JAX side with two processes."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from experiments import bench, bench_peers, bench_peers_report
from experiments.bench_peers_cases import (
    ADAMW,
    BY_NAME,
    DENSE,
    METHODS,
    RAW,
    Case,
    cases,
    config,
)
from experiments.bench_peers_jax import export, restore
from experiments.bench_peers_plan import predictions, traffic
from experiments.bench_peers_report import checks, clock, curve, index, report, seconds_to
from experiments.tasks import make_task

JAX_DENSE = "jaxcomm dense"
HALVES = "jaxcomm local, ternary, half batches"


@pytest.fixture(scope="module")
def tiny():
    cfg = config("tiny", 2, 40)
    task = make_task(cfg)
    return SimpleNamespace(
        cfg=cfg,
        task=task,
        params=jax.device_get(task.init(jax.random.key(0))),
        batches=[b["tokens"] for b, _ in zip(task.train_iterator(2, 0), range(3))],
    )


def test_the_measurement_is_found_by_its_name():
    assert bench.find("peers") is bench_peers


def test_without_pytorch_there_is_one_sentence_and_no_row_of_it():
    missing = bench_peers.torch_missing(lambda name: None)
    assert missing.count(".") == 1
    assert "jaxcomm[peers]" in missing
    assert bench_peers.torch_missing(lambda name: object()) == ""
    left = cases((2,), (RAW,), quick=False, torch=False)
    assert {BY_NAME[c.method].library for c in left} == {"jaxcomm", "jax"}


def test_cases_time_every_link_and_train_once():
    found = cases((2, 4), (RAW, "10mbit"), quick=False)
    assert len(set(found)) == len(found)
    trained = [c for c in found if c.kind == "loss"]
    assert len(trained) == 2 * len(METHODS)
    assert {c.rate for c in trained} == {RAW}
    small = [c for c in found if c.kind == "time" and c.size == "small"]
    assert len(small) == 2 * 2 * len(METHODS)
    assert set(cases((4,), ("10mbit",), quick=True)) < set(found)


def test_large_has_five_million_parameters():
    task = make_task(config("large", 4, 40))
    assert 4.5e6 < task.metadata["parameters"] < 5.5e6


def test_export_and_restore(tiny):
    arrays = export(tiny.params)
    assert arrays["blocks.block_00.qkv.kernel"].shape == (32, 96)
    again = restore(arrays, tiny.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tiny.params))
    with pytest.raises(ValueError, match=r"names differ: head\.kernel"):
        restore({k: v for k, v in arrays.items() if k != "head.kernel"}, tiny.params)


def test_loss_gradients_and_three_steps_of_adamw_agree(tiny):
    """From the same parameters, both models do the same."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")
    from experiments import bench_peers_torch as peers

    model = peers.make_model(tiny.cfg.task)
    peers.load(model, export(tiny.params))
    named = dict(model.named_parameters())
    optimizer = peers.make_optimizer(model)
    optimizer.param_groups[0]["lr"] = 1e-2
    tx = optax.adamw(1e-2, **ADAMW)
    fn = jax.jit(jax.value_and_grad(lambda p, t: tiny.task.loss_fn(p, {"tokens": t}, None)[0]))
    params, state = tiny.params, tx.init(tiny.params)
    for tokens in tiny.batches:
        loss, grads = fn(params, tokens)
        optimizer.zero_grad()
        other = model(torch.from_numpy(tokens))
        other.backward()
        np.testing.assert_allclose(other.item(), float(loss), atol=1e-4)
        theirs = peers.unload({name: p.grad for name, p in named.items()})
        for name, g in export(grads).items():
            np.testing.assert_allclose(theirs[name], g, atol=1e-4)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        optimizer.step()
    ours, theirs = export(params), peers.unload(named)
    for name, p in ours.items():
        np.testing.assert_allclose(theirs[name], p, atol=2e-4)
    with pytest.raises(ValueError, match="the model has no more"):
        peers.load(model, export(tiny.params) | {"more": np.zeros(1)})


def loss_row(method, losses, kinds, hosts=4):
    case = {"kind": "loss", "size": "small", "method": method, "hosts": hosts, "rate": RAW}
    every = len(kinds) // (len(losses) - 1)
    points = [[i * every, loss] for i, loss in enumerate(losses)]
    return case | {"curve": points, "kinds": kinds, "seconds": 1.0}


def time_row(method, rate, kinds, steps, alone, local, size="small", hosts=4):
    case = {"kind": "time", "size": size, "method": method, "hosts": hosts, "rate": rate}
    step = float(np.median(steps))
    return case | {
        "kinds": kinds,
        "steps": steps,
        "step": step,
        "alones": [alone] * len(steps),
        "alone": alone,
        "local": local,
        "bytes": 100.0,
        "load": 1.0,
        "about": {"jax": "1.2", "torch": "3.4" if rate == "10mbit" else "3.5"},
    }


@pytest.fixture
def rows():
    """Dense: 1 s a step. DiLoCo: 0.1 s, meetings 0.5 s. PowerSGD's first steps are dense."""
    found = []
    sync = (
        (DENSE, [3.0, 2.0, 1.0], 1.0),
        (JAX_DENSE, [3.0, 2.0, 1.0], 0.9),
        ("DDP PowerSGD r1", [3.0, 2.5, 1.2], 0.5),
        ("DDP PowerSGD r4", [3.0, 2.5, 1.1], 0.6),
        ("jaxcomm PowerSGD r4", [3.0, 2.5, 1.1], 0.3),
    )
    for rate in ("100mbit", "10mbit"):
        for name, losses, seconds in sync:
            for size in ("small", "large"):
                row = time_row(name, rate, ["", ""], [seconds] * 2, 0.1, 0.05, size)
                found.append(row)
            kinds = ["dense"] * 2 if "DDP P" in name else ["", ""]
            if rate == "100mbit":
                found.append(loss_row(name, losses, [*kinds, "", ""]))
        local = time_row("jaxcomm DiLoCo", rate, ["0", "0", "1"], [0.1, 0.1, 0.5], 0.1, 0.05)
        found.append(local)
    found.append(loss_row("jaxcomm DiLoCo", [3.0, 1.5, 0.9], ["0", "1", "0", "2"]))
    return found


def test_seconds_of_a_training_add_up_over_kinds_of_steps(rows):
    found = index(rows)
    np.testing.assert_allclose(clock(found, DENSE, 4, "10mbit"), [1, 2, 3, 4])
    # a kind that was not timed costs what the dearest does
    np.testing.assert_allclose(
        clock(found, "jaxcomm DiLoCo", 4, "10mbit"), np.cumsum([0.1, 0.5, 0.1, 0.5])
    )
    # or a dense step, where it is one
    np.testing.assert_allclose(clock(found, "DDP PowerSGD r1", 4, "10mbit"), [1, 2, 2.5, 3])
    assert clock(found, "jaxcomm QSR", 4, "10mbit") is None
    times, losses = curve(found, "jaxcomm DiLoCo", 4, "10mbit")
    np.testing.assert_allclose(times, [0, 0.6, 1.2])
    np.testing.assert_allclose(losses, [3.0, 1.5, 0.9])
    assert seconds_to(found, "jaxcomm DiLoCo", 4, "10mbit", 1.0) == pytest.approx(1.2)
    assert seconds_to(found, "DDP PowerSGD r1", 4, "10mbit", 1.0) is None


def test_a_batch_in_parts_takes_as_many_steps():
    """Two steps of 0.1 s a batch, the fourth with a meeting; figures are of a batch."""
    times = time_row(HALVES, "10mbit", ["0", "1"], [0.1, 0.5], 0.08, 0.05)
    found = index([times, loss_row(HALVES, [3.0, 1.5, 0.9], ["0", "0", "0", "1"])])
    np.testing.assert_allclose(clock(found, HALVES, 4, "10mbit"), [0.2, 0.8])
    line = next(x for x in report(found.values(), [HALVES]).splitlines() if HALVES in x)
    assert "| 200 | 0.400 | 0.240 | 0.300 |" in line  # bytes, a step, exposed, overhead


def test_checks_say_what_holds(rows):
    told = {text: (figures, holds) for text, figures, holds in checks(index(rows), 4)}
    dense = next(v for k, v in told.items() if k.startswith("dense no more"))
    assert dense[1]
    wall = next(v for k, v in told.items() if "at least 10 x less" in k)
    assert wall == ("jaxcomm DiLoCo: 1.2 s against 4.0 s, 3.3 times less", False)
    best = next(k for k in told if "at least 1.5 x" in k)
    assert best.startswith("jaxcomm PowerSGD r4 at least 1.5 x less than DDP PowerSGD r1")
    assert told[best][1]


@pytest.mark.parametrize(("second", "said"), [(0.7, "DiLoCo: 1.2 s against"), (1.3, "ends at")])
def test_wall_time_is_that_of_the_mean_of_as_many_seeds(rows, second, said):
    """Dense ends at 1.0 and 0.9, DiLoCo at 0.9 and the second."""
    for name, other in ((DENSE, [3.0, 2.0, 0.9]), ("jaxcomm DiLoCo", [3.0, 1.5, second])):
        row = next(r for r in rows if r["method"] == name and r["kind"] == "loss")
        row["curves"] = [row["curve"], loss_row(name, other, row["kinds"])["curve"]]
    told = {text: (figures, holds) for text, figures, holds in checks(index(rows), 4)}
    text = "wall time to the dense loss 0.950 at least 10 x less, 100mbit (means of 2 seeds)"
    figures, holds = told[text]
    assert said in figures
    assert not holds
    near = "wall time to the dense loss and its standard error, 1.000, at least 10 x less, 100mbit"
    assert f"{near} (means of 2 seeds)" in told
    diloco = loss_row("jaxcomm DiLoCo", [3.0, 1.5, 0.9], ["0", "1", "0", "2"])
    told = [text for text, *_ in checks(index([*rows[:-1], diloco]), 4)]
    assert "wall time to the dense loss 1.000 at least 10 x less, 100mbit" in told


def test_report_has_every_method_and_check(rows):
    text = report(rows, [m.name for m in METHODS])
    for name in {row["method"] for row in rows}:
        assert text.count(f"| {name} |") >= 2
    assert "| dense no more than DDP's, 100mbit |" in text
    assert "jax 1.2, torch 3.5 and 3.4." in text
    diloco = next(x for x in text.splitlines() if x.startswith("| jaxcomm DiLoCo | 100 |"))
    assert "0.300 | 0.200 | 0.250" in diloco  # a step, exposed, overhead
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.count("|"), 0)
    assert len(widths) <= 4


@pytest.mark.parametrize(("ours", "together"), [(JAX_DENSE, max), ("jaxcomm PowerSGD r4", sum)])
def test_predictions_count_the_bytes_and_take_the_measured_computation(ours, together):
    """The dense step codes in the background of its messages."""
    row = time_row(ours, "10mbit", ["", ""], [5.0, 5.0], 0.2, 0.1, "tiny", hosts=2)
    rows = index([row, time_row(DENSE, "10mbit", ["", ""], [5.0, 5.0], 0.2, 0.1, "tiny", hosts=2)])
    found = predictions(rows, 40)
    assert list(found) == [("tiny", ours, 2, "10mbit")]
    predicted, measured = found["tiny", ours, 2, "10mbit"]
    sent = traffic(ours, "tiny", 2, 40).every_step_bytes
    assert measured == 5.0
    bucket = 32_000  # bytes that pass at once
    travels = max(0.0, 8 * (1.055 * sent - bucket) / 1e7)
    np.testing.assert_allclose(predicted, 0.1 + together((0.1, travels)), rtol=0.02)
    text = report([row], [ours], predicted={("tiny", ours, 2, "10mbit"): (4.0, 5.0)})
    assert "0 of 1 within 15%" in text
    assert "4.000 / 5.000 = 0.80" in text


def test_figure_is_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")
    bench_peers_report.draw(rows, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_a_finished_measurement_runs_nothing(rows, tmp_path, monkeypatch):
    setting = bench_peers.Setting(40, 1.0, throttled=False)
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "rows_40.jsonl").write_text(lines + '\n{"kind": "ti')
    monkeypatch.setattr(bench_peers.cluster, "launch", None)  # would raise
    todo = [Case(*(row[k] for k in bench_peers.KEY)) for row in rows[::-1]]
    assert bench_peers.run(todo, tmp_path, setting) == rows[::-1]


def test_an_interrupted_measurement_prints_what_it_has(rows, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows_40.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = SimpleNamespace(exit_code=130, reason="got SIGINT")
    launch = lambda job: SimpleNamespace(outcome=outcome)
    monkeypatch.setattr(bench_peers.cluster, "launch", launch)
    values = SimpleNamespace(quick=True, hosts=None, rates=["raw"], steps=40, only="")
    values.workdir, values.timeout = str(tmp_path), None
    monkeypatch.setattr(bench_peers.flags, "FLAGS", values)
    monkeypatch.setattr(bench_peers, "draw", lambda rows, path: None)
    with pytest.raises(SystemExit) as ended:
        bench_peers.main([])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert told.err == "bench peers: got SIGINT\n"
    assert "## 4 hosts" in told.out
    assert (tmp_path / "peers.json").exists()


def test_a_machine_without_throttled_hosts_measures_loopback(monkeypatch, capsys):
    def refuse():
        raise bench_peers.netns.NetworkError("--rate needs root")

    monkeypatch.setattr(bench_peers.netns, "check_machine", refuse)
    assert bench_peers.possible((RAW, "10mbit")) == (RAW,)
    assert capsys.readouterr().out == "Only plain loopback is measured: --rate needs root\n"


@pytest.mark.slow
def test_two_processes_train_and_time_the_jax_side(tmp_path):
    names = (JAX_DENSE, "plain JAX dense", "jaxcomm DiLoCo", HALVES)
    todo = [Case(kind, "tiny", name, 2, RAW) for name in names for kind in ("loss", "time")]
    setting = bench_peers.Setting(40, 0.1, throttled=False, timeout=300)
    found = {(r["kind"], r["method"]): r for r in bench_peers.run(todo, tmp_path, setting)}
    ends = [found["loss", name]["curve"][-1][1] for name in names]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)  # jaxcomm's mean is XLA's
    assert ends[0] < found["loss", JAX_DENSE]["curve"][0][1] - 0.5
    assert set(found["loss", "jaxcomm DiLoCo"]["kinds"]) == {"0", "1"}
    assert found["loss", "jaxcomm DiLoCo"]["kinds"].count("1") == 2  # step 32, and the last
    halves = found["loss", HALVES]
    assert len(halves["kinds"]) == 80
    assert [step for step, _ in halves["curve"]] == list(range(41))
    assert halves["curve"][-1][1] < ends[0]  # twice the steps on the same data
    for name in names:
        row = found["time", name]
        assert min(row["step"], row["alone"], row["local"]) > 0
    parameters = make_task(config("tiny", 2, 40)).metadata["parameters"]
    assert found["time", JAX_DENSE]["bytes"] > 4 * parameters  # the whole loopback's
