"""Links measured by ping-pong: on loopback, and between throttled hosts with a planted slow one."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from experiments import cluster, netns, probe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.005)
    monkeypatch.setattr(probe, "SKIPPED", 1 << 14)


def on_loopback(cut=()):
    """Latency and bandwidth of three hosts; the pairs in `cut` know no address of each other."""
    count = 3
    addresses = [("127.0.0.1", probe.free_port("127.0.0.1")) for _ in range(count)]
    nobody = ("127.0.0.1", probe.free_port("127.0.0.1"))
    barrier, rows = threading.Barrier(count), [[] for _ in range(count)]

    def host(i):
        known = [nobody if (i, j) in cut else address for j, address in enumerate(addresses)]
        rows[i] = probe.measure(i, known, lambda: barrier.wait(20))

    threads = [threading.Thread(target=host, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return np.array(rows).transpose(2, 0, 1)


@pytest.mark.parametrize("cut", [(), ((1, 2),)])
def test_every_pair_on_loopback(quick, monkeypatch, capfd, cut):
    monkeypatch.setattr(probe, "ACCEPT", 0.3)
    latency, bandwidth = on_loopback(cut)
    apart = ~np.eye(3, dtype=bool)
    for pair in cut:
        apart[pair] = False
    assert (latency[apart] > 0).all()
    assert (latency[apart] < 0.1).all()
    assert (bandwidth[apart] > 1e7).all()
    assert np.isnan(bandwidth[~apart]).all()
    said = capfd.readouterr().err.splitlines()  # both ends say why
    assert len(said) == 2 * len(cut)
    assert all(line.startswith("from host 1 to host 2: ") for line in said)


def _probe(bandwidth):
    n = len(bandwidth)
    known = lambda x: float(x) if np.isfinite(x) else None
    rates = [[None if i == j else known(bandwidth[i][j]) for j in range(n)] for i in range(n)]
    delays = [[None if i == j else 1e-5 for j in range(n)] for i in range(n)]
    return probe.Probe(n, None, delays, rates)


def test_the_report_names_what_is_slow(tmp_path):
    rates = np.full((4, 4), 1e8)
    assert "no host or link stands out" in probe.report(_probe(rates))
    rates[:, 2] = 2.5e7
    text = probe.report(_probe(rates))
    assert "host 2 receives slowly" in text
    assert "for plan: --links=25mbit@10us --overhead=1" in text
    rates[:, 2], rates[1, 3] = 1e8, 5e7
    assert "the link from host 1 to host 3 is slow" in probe.report(_probe(rates))


def test_who_cannot_be_reached_is_named_and_gives_no_link():
    rates = np.full((4, 4), 1e8)
    rates[1, 2], rates[3, 0] = np.nan, 1e7
    found = _probe(rates)
    assert found.unreachable == ["host 1 cannot reach host 2"]
    text = probe.report(found)
    assert "host 1 cannot reach host 2" in text
    assert "the link from host 3 to host 0 is slow" in text
    assert "for plan" not in text
    with pytest.raises(ValueError, match="the probe gives no link: host 1 cannot reach host 2"):
        found.link()
    nothing = probe.report(_probe(np.full((2, 2), np.nan)))
    assert "host 0 cannot reach host 1\nhost 1 cannot reach host 0" in nothing


def test_plan_takes_the_file_as_a_link(tmp_path):
    found = _probe(np.array([[0, 1e8, 9e7], [1e8, 0, 1e8], [1e8, 1e8, 0]]))
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(vars(found)))
    link = probe.parse_link(str(path), latency=1.0)
    assert (link.bandwidth, link.latency) == (9e7, 1e-5)
    assert probe.parse_link("100mbit", latency=1e-3).latency == 1e-3
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a file of `cluster --probe`"):
        probe.parse_link(str(path), latency=0.0)


def test_alone_it_refuses():
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAXCOMM_")}
    command = [sys.executable, "-m", "experiments.probe"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode
    assert "this process is part of no job" in run.stderr


def throttled(path, hosts, fault):
    """Exit codes of a probe between hosts at 100 Mbit/s; `fault(network)` is planted before."""
    job = cluster.Job(("-m", "experiments.probe"), hosts, rate="100mbit")
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(netns.Network(hosts, job.rate))
        except netns.NetworkError as error:
            pytest.skip(str(error))
        fault(network)
        coordinator = f"{network.addresses[0]}:{cluster.COORDINATOR_PORT}"
        ranks = [
            subprocess.Popen(
                [*network.enter(i), sys.executable, *job.arguments, str(path), "100mbit"],
                env=cluster.environment(os.environ, job, i, coordinator, netns.COUNTER),
                cwd=ROOT,
            )
            for i in range(hosts)
        ]
        return [rank.wait(120) for rank in ranks]


@pytest.mark.slow
def test_a_slow_host_behind_a_token_bucket(tmp_path):
    path, hosts = tmp_path / "probe.json", 3
    slow = "qdisc change dev eth0 root tbf rate 20mbit burst 32kb latency 50ms"
    plant = lambda network: netns._run("tc", "-n", network.names[1], *slow.split())
    assert throttled(path, hosts, plant) == [0] * hosts
    found = probe.load(path)
    rates = found.matrix("bandwidth")
    for i, rate in enumerate((1e8, 2e7, 1e8)):
        others = np.delete(rates[i], i)
        assert (abs(others / rate - 1) < 0.2).all(), rates
    assert [fault[:3] for fault in found.faults] == [("sender", 1, None)]


@pytest.mark.slow
def test_two_hosts_that_do_not_reach_each_other(tmp_path):
    """A black hole in one of them: its connections fail at once, the other's are not answered."""
    path = tmp_path / "probe.json"

    def plant(network):
        hole = ("route", "add", "blackhole", f"{network.addresses[2]}/32")
        netns._run("ip", "-n", network.names[1], *hole)

    assert throttled(path, 3, plant) == [1, 0, 0]
    found = probe.load(path)
    assert found.unreachable == ["host 1 cannot reach host 2", "host 2 cannot reach host 1"]
    assert np.isfinite(found.matrix("bandwidth")).sum() == 4
