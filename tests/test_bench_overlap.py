"""`experiments.bench overlap`: what is measured, kept and shown."""

import json

import pytest

from experiments import bench_overlap, cluster


def row(work, rule, hosts, ratio):
    seconds = {"compute": 1.0, "transfer": ratio, "together": 1.05, "diloco": 1.0 + ratio}
    names = {"work": work, "rule": rule, "hosts": hosts, "rate": "100mbit", "ratio": ratio}
    return {**names, **seconds, "load": 0.5}


def test_missing_rows_are_measured_and_finished_ones_kept(tmp_path, monkeypatch):
    """Hosts beyond the cores are also measured with a computation that leaves the cores alone."""
    monkeypatch.setattr(bench_overlap.os, "cpu_count", lambda: 2)
    path, started = tmp_path / "rows.jsonl", []

    def launch(job):
        ratio, work, *rules = job.arguments[4:]
        started.append((job.hosts, work, ratio, *rules))
        lines = [json.dumps(row(work, rule, job.hosts, float(ratio))) for rule in rules]
        with path.open("a") as file:
            file.write("".join(f"\n{line}\n" for line in lines))
        outcome = type("Outcome", (), {"exit_code": 0})
        return type("Report", (), {"outcome": outcome})

    monkeypatch.setattr(cluster, "launch", launch)
    path.write_text(json.dumps(row("cores", "co2", 2, 0.5)) + '\n{"half a line')
    rows = bench_overlap.run([2, 4], "100mbit", tmp_path)
    assert started[0] == (2, "cores", "0.5", "streaming_diloco", "eager_diloco")
    assert len(started) == 6
    assert len(rows) == 18
    assert bench_overlap.run([2, 4], "100mbit", tmp_path) == rows
    assert len(started) == 6


def test_the_report_compares_with_the_larger_part():
    text = bench_overlap.report([row("cores", "co2", 2, 0.9)])
    assert (
        "| co2 | 2 | cores | 100mbit | 1.000 | 0.900 | 1.050 | 1.05 | 1.900 | 1.00 | 0.5 |" in text
    )


def test_a_failed_job_is_one_sentence(tmp_path, monkeypatch):
    outcome = type("Outcome", (), {"exit_code": 1, "reason": "rank 0 exited with code 1"})
    monkeypatch.setattr(cluster, "launch", lambda job: type("Report", (), {"outcome": outcome}))
    with pytest.raises(RuntimeError, match="bench overlap: rank 0 exited"):
        bench_overlap.run([2], "100mbit", tmp_path)
