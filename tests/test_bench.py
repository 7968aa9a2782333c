"""experiments.bench: dispatch, cases, resuming, reports; and the wire itself with two processes."""

import dataclasses
import errno
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from absl import flags

from experiments import (
    bench,
    bench_codec,
    bench_peers,
    bench_scale,
    bench_wire,
    bench_wire_report,
    command_line,
    netns,
)
from experiments.bench_wire_cases import (
    SENT_BYTES,
    Case,
    byte_cases,
    compressors,
    single,
    sizes_of,
    timed_cases,
)
from jaxcomm.collectives import exchange_bytes

ROOT = Path(__file__).parent.parent


def row(case, hosts, rate="1gbit", **changes):
    codec, axes = compressors()[case.compressor], sizes_of(case.exchange, hosts)
    sent = exchange_bytes(case.exchange, codec, case.elements, single(axes.values()))
    measured = {
        "payload_bytes": codec.payload_bytes(case.elements),
        "formula_bytes": sent,
        "counted_bytes": sent,
        "counter_bytes": 1.01 * sent,
        "frame_bytes": 1.05 * sent,
        "seconds": 0.2,
        "codec_seconds": 0.01,
        "load": 4.0,
    }
    return dataclasses.asdict(case) | {"hosts": hosts, "rate": rate} | measured | changes


def test_a_measurement_is_found_by_its_name(capsys):
    assert bench.find("wire") is bench_wire
    with pytest.raises(ValueError, match="must be one of wire, codec"):
        bench.find("speed")
    assert bench.main(["bench", "speed"]) == 2
    assert "got 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(netns.NetworkError("--rate needs root"), 2), (OSError(errno.ENOSPC, "disk full"), 74)],
)
def test_what_the_machine_refuses_is_a_sentence(error, code, monkeypatch, capsys):
    def refuse(_):
        raise error

    monkeypatch.setattr(bench, "find", lambda _: types.SimpleNamespace(main=refuse))
    assert bench.main(["bench", "wire"]) == code
    assert capsys.readouterr().err == f"bench: {error}\n"


def test_counts_of_hosts():
    values = flags.FlagValues()
    command_line.define_counts("hosts", [2, 4], "Hosts.", least=2, flag_values=values)
    values(["bench"])
    assert values.hosts == [2, 4]
    values(["bench", "--hosts=3,5"])
    assert values.hosts == [3, 5]
    for text in ("abc", "1", "2,", "", "-2", "2.0"):
        wanted = f"flag --hosts={text}: wants whole numbers, at least 2, comma-separated"
        with pytest.raises(flags.IllegalFlagValueError, match=wanted):
            values(["bench", f"--hosts={text}"])


@pytest.mark.parametrize("module", [bench_wire, bench_peers, bench_scale])
def test_only_names_something(module, monkeypatch, tmp_path):
    only = ["foo"] if module is bench_scale else "foo"
    values = types.SimpleNamespace(hosts=[], rate="", rates=["raw"], only=only, timed=False)
    values.workdir, values.quick, values.steps, values.timeout = tmp_path / "x", True, 10, None
    monkeypatch.setattr(module.flags, "FLAGS", values)
    with pytest.raises(ValueError, match=r"--only must be .*, got 'foo'"):
        module.main([])
    assert not values.workdir.exists()


def test_help_and_sizes(capsys, monkeypatch):
    assert bench.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"experiments.bench {name} " in text for name in bench.NAMES)
    monkeypatch.setattr(bench_codec, "run", lambda sizes: print(sizes) or [])
    bench_codec.main(["1e3", "20"])
    assert "[1000, 20]" in capsys.readouterr().out
    for word in ("abc", "0", "inf", "nan"):
        assert bench.main(["bench", "codec", word]) == 2
        assert f"a number of elements such as 1e6, got {word!r}" in capsys.readouterr().err


@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_compressor_by_every_exchange_with_messages_of_a_megabyte(hosts):
    cases = byte_cases(hosts)
    ways = {"gather", "two_phase", "ring"} | ({"hierarchical"} if hosts == 4 else set())
    names = {case.compressor for case in cases} - {"identity"}
    assert {(c.compressor, c.exchange) for c in cases if c.compressor != "identity"} == {
        (name, way) for name in names for way in ways
    }
    kinds = {type(codec) for codec in compressors().values()}
    assert {type(compressors()[name]) for name in names | {"identity"}} == kinds
    assert {c.exchange for c in cases if c.compressor == "identity"} == {"dense", "ring"}
    for case in cases:
        axes = single(sizes_of(case.exchange, hosts).values())
        sent = exchange_bytes(case.exchange, compressors()[case.compressor], case.elements, axes)
        assert SENT_BYTES <= sent <= 1.1 * SENT_BYTES
        assert case.elements % 2  # nothing has to be divisible by anything


def test_finished_rows_are_kept_and_missing_ones_are_measured(tmp_path, monkeypatch):
    cases = [Case("sign l1", "gather", 1001), Case("sign l1", "ring", 1001)]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(cases[0], 2)) + '\n{"compressor": "si')
    launched = []

    def launch(job):
        todo, rows = job.arguments[2:4]
        launched.extend(json.loads(Path(todo).read_text()))
        with open(rows, "a") as file:
            for case in launched:
                file.write("\n" + json.dumps(row(Case(**case), job.hosts)))
        return types.SimpleNamespace(outcome=types.SimpleNamespace(exit_code=0, reason=None))

    monkeypatch.setattr(bench_wire.cluster, "launch", launch)
    jobs = [bench_wire.Job(2, "1gbit", cases)]
    rows = bench_wire.run(jobs, tmp_path)
    assert launched == [dataclasses.asdict(cases[1])]
    assert [r["exchange"] for r in rows] == ["gather", "ring"]
    assert bench_wire.run(jobs, tmp_path) == rows
    assert len(launched) == 1


def test_a_failed_job_says_why(tmp_path, monkeypatch):
    outcome = types.SimpleNamespace(exit_code=1, reason="rank 1 exited with code 1")
    failed = lambda job: types.SimpleNamespace(outcome=outcome)
    monkeypatch.setattr(bench_wire.cluster, "launch", failed)
    jobs = [bench_wire.Job(2, "", [Case("sign l1", "gather", 1001)])]
    with pytest.raises(RuntimeError, match="rank 1 exited with code 1"):
        bench_wire.run(jobs, tmp_path)


def test_the_report_tells_ratios_and_times():
    case, timed = byte_cases(2)[3], timed_cases()[1]
    good, bad = row(case, 2), row(case, 4, counter_bytes=3e6)
    late = row(timed, 4, "100mbit", seconds=0.3, codec_seconds=0.02)
    text = bench_wire_report.report([good, bad, late])
    assert "1 of 2 ratios in 1.00..1.08" in text
    assert "2 of 2 figures of traffic equal" in text
    assert "| 1.010 | 1.050 |" in text
    ideal = 8 * late["counted_bytes"] / 1e8
    assert bench_wire_report.time_ratio(late) == 0.3 / ideal
    assert f"| 0.300 | {0.3 / ideal:.2f} | {0.3 / (ideal + 0.02):.2f} | 4.0 |" in text
    assert bench_wire_report.time_ratio(late | {"codec_seconds": 0.6}) == 0.5


def test_only_what_is_asked_for():
    jobs = bench_wire.jobs([2], "", only="sign l1", timed=True)
    assert [(j.hosts, j.rate) for j in jobs] == [(2, "")]  # loopback has no rate to compare with
    assert {c.compressor for c in jobs[0].cases} == {"sign l1", "sign l1 block 1024"}
    jobs = bench_wire.jobs([4], "1gbit")
    assert [(j.hosts, j.rate, len(j.cases)) for j in jobs[1:]] == [
        (4, "100mbit", 5),
        (4, "1gbit", 5),
    ]


def wire(tmp_path, *options):
    command = [sys.executable, "-m", "experiments.bench", "wire", f"--workdir={tmp_path}"]
    command += ["--hosts=2", "--notimed", "--only=natural_dithering", "--timeout=300", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "wire.json").read_text())
    assert {r["exchange"] for r in rows} == {"gather", "two_phase", "ring"}
    assert all(r["counted_bytes"] == r["formula_bytes"] for r in rows)
    assert (tmp_path / "wire.md").read_text() in done.stdout
    return rows


@pytest.mark.slow
def test_the_counter_agrees_with_the_count_on_throttled_hosts(tmp_path):
    try:
        with netns.Network(1, "1gbit"):
            pass
    except netns.NetworkError as error:
        pytest.skip(str(error))
    for r in wire(tmp_path):
        assert 1.00 <= bench_wire_report.bytes_ratio(r) <= 1.08
        assert 1.00 <= r["frame_bytes"] / r["counted_bytes"] <= 1.08


@pytest.mark.slow
def test_on_loopback_at_least_what_is_counted_is_sent(tmp_path):
    for r in wire(tmp_path, "--rate="):  # everything else on the machine uses this counter too
        assert bench_wire_report.bytes_ratio(r) >= 1.00


@pytest.mark.slow
def test_codec_throughput_is_printed():
    command = [sys.executable, "-m", "experiments.bench", "codec", "1e4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sign l1" in done.stdout
