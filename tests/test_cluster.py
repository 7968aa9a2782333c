"""Real processes: what they are told, what of them is printed, how they end, what they send."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from absl import flags

from configs import common
from experiments import cluster, command_line, job, netns, processes
from jaxcomm.training import distributed

ROOT = Path(__file__).parent.parent
SLEEP = "import time; time.sleep(300)"
RANK = "import os, sys, time, signal; rank = int(os.environ['JAXCOMM_PROCESS_ID']); "


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in (*(n for n in os.environ if n.startswith("JAXCOMM_")), "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def throttled():
    """Skips where this machine does not allow throttled hosts."""
    try:
        with netns.Network(1, "100mbit"):
            pass
    except netns.NetworkError as error:
        pytest.skip(str(error))


def launch(code, hosts=2, **options):
    return cluster.launch(cluster.Job(("-c", code), hosts, **options))


def launcher(code, *options):
    """The program itself, for signals, which a test run in the background would hand on ignored."""
    unblock = "import signal as s; [s.signal(n, s.SIG_DFL) for n in (s.SIGHUP, s.SIGINT)]; "
    run = (
        "import runpy; runpy.run_module('experiments.cluster', run_name='__main__', alter_sys=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", unblock + run, *options, "--", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(pid):
    names = os.listdir(netns.NAMESPACES) if os.path.isdir(netns.NAMESPACES) else []
    files = os.listdir(netns.HOST_FILES) if os.path.isdir(netns.HOST_FILES) else []
    return [name for name in names + files if name.startswith((f"jc{pid}n", f"jc{pid}sw"))]


def alive(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# ---------------------------------------------------------------- pure parts


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("100mbit", 1e8),
        ("1.5gbit", 1.5e9),
        ("64kibit", 65536),
        ("10MBPS", 8e7),
        ("9600bit", 9600),
        ("1tbit", 1e12),
    ],
)
def test_rates_are_read_as_tc_reads_them(text, bits):
    assert netns.parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "fast", "100", "0mbit", "-1mbit", "100 mbit", "100mbitx"])
def test_a_bad_rate_is_echoed(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        netns.parse_rate(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hosts": 0}, "hosts must be at least 1, got 0"),
        ({"devices_per_host": 0}, "devices_per_host must be at least 1, got 0"),
        ({"timeout": 0.0}, r"timeout must be positive and at most 1e\+09 s, got 0"),
        ({"timeout": float("inf")}, r"timeout must be positive and at most 1e\+09 s, got inf"),
        ({"grace": -1.0}, r"grace must be from 0 to 1e\+09 s, got -1"),
        ({"grace": float("nan")}, r"grace must be from 0 to 1e\+09 s, got nan"),
        ({"rate": "fast"}, "rate must be .* got 'fast'"),
        ({"arguments": ()}, "nothing to run"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        cluster.Job(**{"arguments": ("-c", "1"), "hosts": 2, **change})


def test_the_environment_of_a_process():
    job = cluster.Job(("-c", "1"), 4, devices_per_host=2)
    base = {
        "HOME": "/h",
        "JAXCOMM_COUNTER": "outer",
        "XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8 --b=2",
    }
    env = cluster.environment(base, job, 3, "127.0.0.1:9", None)
    assert env["HOME"] == "/h"
    assert env["JAXCOMM_COORDINATOR"] == env["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:9"
    assert (env["JAXCOMM_PROCESSES"], env["JAXCOMM_PROCESS_ID"]) == ("4", "3")
    assert (env["JAX_NUM_CPU_DEVICES"], env["JAX_PLATFORMS"]) == ("2", "cpu")
    assert env["XLA_FLAGS"].split() == ["--a=1", "--b=2"]
    assert "JAXCOMM_COUNTER" not in env  # hosts on loopback share one counter
    assert "no_proxy" not in env  # JAX warns of any proxy variable
    assert base["JAXCOMM_COUNTER"] == "outer"


def test_the_environment_keeps_platform_and_reaches_the_coordinator_without_a_proxy():
    job = cluster.Job(("-c", "1"), 2)
    base = {"JAX_PLATFORMS": "cuda", "http_proxy": "http://p", "no_proxy": "example.org"}
    env = cluster.environment(base, job, 0, "10.77.0.1:7777", netns.COUNTER)
    assert env["JAX_PLATFORMS"] == "cuda"
    assert env["no_proxy"] == "example.org,10.77.0.1"
    assert env["JAXCOMM_COUNTER"] == netns.COUNTER


def test_launcher_and_library_agree_on_the_names():
    assert cluster.COORDINATOR == distributed.COORDINATOR
    assert cluster.PROCESSES == distributed.PROCESSES
    assert cluster.PROCESS_ID == distributed.PROCESS_ID


@pytest.mark.parametrize(
    ("code", "words"),
    [(3, "exited with code 3"), (-9, "was killed by SIGKILL"), (-40, "was killed by signal 40")],
)
def test_an_end_in_words(code, words):
    assert processes.describe(code) == words


def test_hosts_get_addresses_of_one_private_subnet():
    network = netns.Network(600, "1mbit")
    assert len(set(network.addresses)) == len(set(network.names)) == 600
    assert network.addresses[0] == "10.77.0.1"
    assert network.addresses[599] == "10.77.2.100"
    assert max(map(len, network.names)) <= 15


# ---------------------------------------------------------------- the command line


def run_main(*arguments):
    values = flags.FlagValues()
    cluster.define_flags(values)
    return cluster.main(values(["cluster", *arguments]), values)


def test_without_root_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run_main("--rate=100mbit", "--", "-c", "1") == 2
    assert "cluster: --rate needs root" in capsys.readouterr().err


def test_without_iproute2_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert run_main("--rate=100mbit", "--", "-c", "1") == 2
    assert "needs iproute2 (not on the PATH: ip, tc)" in capsys.readouterr().err


def test_where_namespaces_are_forbidden_a_sentence(monkeypatch, capsys):
    def forbidden(*_):
        raise subprocess.CalledProcessError(1, ["ip"], stderr="Operation not permitted\n")

    monkeypatch.setattr(netns, "check_machine", lambda: None)
    monkeypatch.setattr(netns, "_batch", forbidden)
    assert run_main("--rate=100mbit", "--", "-c", "1") == 2
    assert "allows no throttled hosts: Operation not permitted" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--hosts=abc", "--hoosts=2"])
def test_a_wrong_flag_is_a_sentence(flag, monkeypatch, capsys):
    values = flags.FlagValues()
    cluster.define_flags(values)
    monkeypatch.setattr(cluster.flags, "FLAGS", values)
    with pytest.raises(SystemExit) as ended:
        cluster.parse_flags(["cluster", flag, "--", "-c", "pass"])
    assert ended.value.code == 2
    assert flag.strip("-").partition("=")[0] in capsys.readouterr().err


def test_nothing_to_run_is_a_sentence(capsys):
    assert run_main("--hosts=2") == 2
    assert "nothing to run" in capsys.readouterr().err


def test_a_run_ends_with_a_table_and_a_file(tmp_path, capsys):
    code = RANK + "sys.exit(4 * rank)"
    where = tmp_path / "deep" / "er"
    assert run_main("--hosts=2", f"--workdir={where}", "--", "-c", code) == 4
    out, err = capsys.readouterr()
    assert "2 hosts on loopback" in out
    assert "exited with code 4" in out
    assert "cluster: rank 1 exited with code 4" in err
    report = json.loads((where / "cluster.json").read_text())
    assert report["exit_code"] == 4
    assert report["arguments"] == ["-c", code]
    assert [host["rank"] for host in report["ranks"]] == [0, 1]


# ---------------------------------------------------------------- processes


def test_each_process_knows_who_it_is_and_its_lines_stay_whole(capsys):
    code = RANK + (
        "print(rank, os.environ['JAXCOMM_PROCESSES'], os.environ['JAXCOMM_COORDINATOR']);"
        "print('to stderr', file=sys.stderr);"
        "[print(str(rank) * 500) for _ in range(200)];"
        "sys.stdout.write('no newline')"
    )
    report = launch(code, hosts=3)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert report.outcome == processes.Outcome(0, None, report.outcome.ranks)
    assert sorted(err.splitlines()) == [f"[{i}] to stderr" for i in range(3)]
    for i in range(3):
        own = [line[4:] for line in lines if line.startswith(f"[{i}] ")]
        assert re.fullmatch(rf"{i} 3 127\.0\.0\.1:\d+", own[0])
        assert own[1:] == [str(i) * 500] * 200 + ["no newline"]
    assert len(lines) == 3 * 202
    assert len({line.split()[-1] for line in lines if "127.0.0.1" in line}) == 1


def test_one_exit_code_ends_all():
    begin = time.monotonic()
    outcome = launch(RANK + "sys.exit(3) if rank == 1 else time.sleep(300)", hosts=3).outcome
    assert time.monotonic() - begin < 5
    assert outcome.exit_code == 3
    assert outcome.reason == "rank 1 exited with code 3; ended ranks 0, 2"
    assert [rank.stopped for rank in outcome.ranks] == [True, False, True]
    assert [rank.exit_code for rank in outcome.ranks] == [-15, 3, -15]


def test_one_signal_ends_all_and_the_stubborn_are_killed_after_the_grace_period():
    code = RANK + (
        "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 and not time.sleep(.5) else None;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP
    )
    begin = time.monotonic()
    outcome = launch(code, grace=1.0).outcome
    assert 1.4 < time.monotonic() - begin < 6
    assert outcome.exit_code == 128 + 9
    assert outcome.reason == "rank 0 was killed by SIGKILL; ended rank 1"
    assert [rank.exit_code for rank in outcome.ranks] == [-9, -9]


def test_a_stopped_process_is_ended_as_well():
    code = RANK + "os.kill(os.getpid(), signal.SIGSTOP) if rank else time.sleep(.5) or sys.exit(1)"
    outcome = launch(code, grace=0.5).outcome
    assert outcome.reason == "rank 0 exited with code 1; ended rank 1"
    assert outcome.ranks[1].exit_code == -9


def test_who_is_stuck_when_rank_0_has_ended_well_is_lost(capsys):
    code = RANK + "rank == 1 and os.kill(os.getpid(), signal.SIGSTOP)"
    outcome = launch(code, hosts=3, losses=1, grace=0.5, timeout=20.0).outcome
    assert outcome.exit_code == 0
    assert [rank.stopped for rank in outcome.ranks] == [False, True, False]
    assert "lost rank 1, still running" in capsys.readouterr().err
    outcome = launch(RANK + "rank and (time.sleep(.5), sys.exit(9))", losses=1).outcome
    assert outcome.exit_code == 0


def test_more_than_may_be_lost_are_not_waited_for_when_rank_0_has_ended_well():
    code = RANK + "rank == 1 and sys.exit(9); rank == 2 and time.sleep(300); time.sleep(.5)"
    outcome = launch(code, hosts=3, losses=1, grace=0.3, timeout=20.0).outcome
    assert outcome.exit_code == 1
    assert outcome.reason == "rank 0 has ended well; ended rank 2, still running"
    assert [rank.stopped for rank in outcome.ranks] == [False, False, True]


def test_a_time_out_names_those_that_still_ran():
    outcome = launch(RANK + "rank != 1 and time.sleep(300)", hosts=3, timeout=1.0).outcome
    assert outcome.exit_code == 124
    assert outcome.reason == "timed out after 1 s; still running: ranks 0, 2"


@pytest.mark.parametrize("end", ["sys.exit(0)", "sys.exit(5)"])
def test_what_a_process_started_ends_with_it(tmp_path, end):
    code = RANK + (
        f"import subprocess; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]);"
        f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(child.pid)); {end}"
    )
    begin = time.monotonic()
    launch(code)
    assert time.monotonic() - begin < 5  # the children hold the pipes
    children = [int(path.read_text() or 0) for path in tmp_path.iterdir()]
    assert children
    assert wait_until(lambda: not any(map(alive, children)))


def test_a_program_that_is_not_there_is_a_failure(capsys):
    outcome = cluster.launch(cluster.Job(("/no/such/file.py",), 1)).outcome
    assert outcome.reason == "rank 0 exited with code 2"
    assert "[0] " in capsys.readouterr().err


def start_and_list_ranks(tmp_path, *options):
    """A launcher whose ranks sleep, and the process numbers of these."""
    code = RANK + f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(os.getpid())); {SLEEP}"
    process = launcher(code, "--hosts=2", *options)
    files = [tmp_path / "0", tmp_path / "1"]
    assert wait_until(lambda: all(f.exists() and f.read_text() for f in files), 20)
    return process, [int(f.read_text()) for f in files]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all(tmp_path, number):
    process, ranks = start_and_list_ranks(tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"cluster: got {number.name}; ended ranks 0, 1" in err
    assert "stopped" in out
    assert not any(map(alive, ranks))


def test_after_a_signal_a_failed_job_is_not_started_again():
    code = RANK + (
        "rank or time.sleep(1) or sys.exit(1);"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); time.sleep(300)"
    )
    process = launcher(code, "--hosts=2", "--restarts=2", "--grace=20", "--timeout=30")
    assert process.stdout
    assert any("asked" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "cluster: got SIGTERM, after rank 0 exited with code 1; ended rank 1" in err
    assert "attempt" not in err


def test_a_killed_launcher_takes_its_processes_along(tmp_path):
    process, ranks = start_and_list_ranks(tmp_path)
    process.kill()
    process.communicate(timeout=20)
    assert wait_until(lambda: not any(map(alive, ranks)))


# ---------------------------------------------------------------- joining a job


def test_a_process_on_its_own_joins_nothing():
    assert distributed.initialize() is False
    assert not jax.distributed.is_initialized()


def test_half_a_job_is_an_error_that_names_what_is_missing(monkeypatch):
    monkeypatch.setenv(distributed.PROCESSES, "2")
    missing = r"missing: coordinator \(JAXCOMM_COORDINATOR\), process_id \(JAXCOMM_PROCESS_ID\)"
    with pytest.raises(ValueError, match=missing):
        distributed.initialize()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", 2, 0), "coordinator must be host:port, .* got 'nowhere'"),
        ((":7777", 2, 0), "coordinator must be host:port, .* got ':7777'"),
        (("a:65536", 2, 0), "coordinator must be host:port, a port up to 65535, got 'a:65536'"),
        (("a:1", 0, 0), "processes must be at least 1, got 0"),
        (("a:1", 2, 2), r"process_id must be in \[0, processes\), got 2 of 2"),
        (("a:1", "two", 0), "processes must be an integer, got 'two'"),
    ],
)
def test_a_job_that_cannot_be_is_an_error(arguments, words):
    with pytest.raises(ValueError, match=words):
        distributed.initialize(*arguments)


def test_arguments_win_over_the_environment(monkeypatch):
    monkeypatch.setenv(distributed.COORDINATOR, "env:1")
    monkeypatch.setenv(distributed.PROCESSES, "4")
    monkeypatch.setenv(distributed.PROCESS_ID, "3")
    assert distributed.explicit() == ("env:1", 4, 3)
    assert distributed.explicit("own:2", 2, 0) == ("own:2", 2, 0)
    assert job.count() == 4


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv(distributed.PROCESSES, "")
    assert job.count() == 1


@pytest.mark.parametrize("bound", [None, "127.0.0.1:{port}", "localhost:{port}"])
def test_a_port_that_is_taken_is_an_error(bound, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        bound = bound and bound.format(port=port)
        with pytest.raises(OSError, match=f"cannot listen at .*:{port}, which is in use") as found:
            distributed._check_free(f"127.0.0.1:{port}", bound)
    assert command_line.exit_code(found.value) == processes.UNSAVED  # it may be free next time
    distributed._check_free(f"127.0.0.1:{port}", bound)


def talk(monkeypatch, said, answer=None):
    """What `tell_all` hears, or raises, where the service ends the barrier with `answer`."""

    def barrier(*_):
        if answer:
            raise answer

    service = SimpleNamespace(
        key_value_set=lambda *_: None,
        wait_at_barrier=barrier,
        key_value_dir_get=lambda key: [(f"{key}{rank}", text) for rank, text in said.items()],
    )
    monkeypatch.setattr(distributed, "client", lambda: service)
    monkeypatch.setattr(distributed, "count", lambda: 3)
    return distributed.tell_all("a", 300.0)


def test_all_are_told_by_rank_and_who_does_not_come_is_named(monkeypatch):
    assert distributed.tell_all("alone", 1.0) == ["alone"]
    everybody = {2: "c", 0: "a", 1: "b"}
    assert talk(monkeypatch, everybody) == ["a", "b", "c"]
    late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
    with pytest.raises(TimeoutError, match=r"^ranks 1, 2 did not come to the others within 0.0 s"):
        talk(monkeypatch, {0: "a"}, late)
    with pytest.raises(jax.errors.JaxRuntimeError, match="DEADLINE_EXCEEDED"):
        talk(monkeypatch, everybody, late)


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"checkpoint_every": 7}, "checkpoint_every must .* got 10 in process 0 and 7"),
        ({"learning_rate.peak": 0.5}, "learning_rate.peak must .* got 0.002 in process 0 and 0.5"),
        ({"tx": "x\ny"}, r"tx must be .* got '' in process 0 and 'x\\ny'"),
        ({"pace": "10mbit", "local_checkpoints": "/disk1", "stuck_seconds": 9.0}, None),
    ],
)
def test_processes_with_other_configs_are_refused(fields, values, monkeypatch):
    first, other, texts = common.digits("smoke"), common.digits("smoke"), []
    other.update_from_flattened_dict(fields)
    monkeypatch.setattr(distributed, "tell_all", lambda text, _: texts.append(text) or [text])
    job.agree(other)
    monkeypatch.setattr(distributed, "tell_all", lambda text, _: [text, text, *texts])
    if values is None:
        job.agree(first)
    else:
        with pytest.raises(ValueError, match=f"config.{values} in process 2"):
            job.agree(first)


def test_a_cluster_is_found_as_jax_finds_it(monkeypatch):
    assert not distributed._cluster_detected()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # any pod, not a job's
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert not distributed._cluster_detected()
    slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID", "STEP_NUM_NODES")
    for name in slurm:
        monkeypatch.setenv(f"SLURM_{name}", "1")
    assert distributed._cluster_detected()


PSUM = """
import jax, os, sys, time
from jaxcomm.training.distributed import initialize
assert initialize() and initialize()
import numpy as np
mesh = jax.make_mesh((4,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.sharding.PartitionSpec("w")
rows = jax.make_array_from_callback(
    (4,), jax.sharding.NamedSharding(mesh, spec), lambda i: np.arange(4, dtype=np.float32)[i] + 1)
sum_ = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x[0], "w"), mesh=mesh, in_specs=spec,
                             out_specs=jax.sharding.PartitionSpec()))
print("sum", float(sum_(rows)), jax.process_count(), jax.local_device_count())
"""


def test_two_processes_add_up_over_gloo(capsys):
    report = launch(PSUM, devices_per_host=2, timeout=120)
    out = capsys.readouterr().out
    assert report.outcome.reason is None, out
    assert all(f"[{rank}] sum 10.0 2 2" in out for rank in range(2))


def test_an_exception_on_one_rank_does_not_wait_for_the_others(capsys):
    code = PSUM + (
        "if jax.process_index() == 1: raise RuntimeError('planted')\n"
        "begin = time.time()\n"
        "while time.time() < begin + 60: time.sleep(.1)\n"
    )
    report = launch(code, devices_per_host=2, timeout=120, grace=1.0)
    assert report.outcome.reason == "rank 1 exited with code 1; ended rank 0"
    assert report.seconds < 40  # JAX's own exit would wait for rank 0's minute
    assert "[1] RuntimeError: planted" in capsys.readouterr().err


# ---------------------------------------------------------------- throttled hosts

GATHER = """
import json, jax, os, sys, time
from jaxcomm.training.distributed import initialize
initialize()
import numpy as np
size = 2_000_000
mesh = jax.make_mesh((2,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
spec = jax.sharding.PartitionSpec("w")
rows = jax.make_array_from_callback(
    (2, size), jax.sharding.NamedSharding(mesh, spec),
    lambda i: np.full((1, size), 1 + (i[0].start or 0), np.uint8))
gather = jax.jit(jax.shard_map(lambda x: jax.lax.all_gather(x[0], "w")[None], mesh=mesh,
                               in_specs=spec, out_specs=spec)).lower(rows).compile()
begin = time.time()
got = np.asarray(gather(rows).addressable_shards[0].data)[0]
seconds = time.time() - begin
assert (got[0] == 1).all() and (got[1] == 2).all()
print("took", seconds, "counter", open(os.environ["JAXCOMM_COUNTER"]).read().strip())
"""


@pytest.mark.usefixtures("throttled")
def test_the_counter_sees_what_travels_and_the_link_is_slow(capsys):
    report = launch(GATHER, rate="100mbit", timeout=120)
    out = capsys.readouterr().out
    assert report.outcome.reason is None, out
    assert report.counters is not None
    for sent, wire in report.counters:  # each host sends its 2,000,000 bytes to the other
        assert 1.00 <= sent / 2_000_000 <= 1.08
        assert 1.04 <= wire / 2_000_000 <= 1.08  # 66 bytes of headers in packets of 1,514
    seen = re.findall(r"\[\d\] took (\S+) counter (\d+)", out)
    assert len(seen) == 2
    for (seconds, counter), (sent, _) in zip(seen, report.counters):
        assert 0 < int(counter) <= sent  # a rank reads its own host's
        assert 0.13 < float(seconds) < 1.0  # 0.16 s at the rate; tokens for 0.01 s are saved up
    assert left_behind(os.getpid()) == []


@pytest.mark.usefixtures("throttled")
def test_hosts_see_each_other_and_nothing_else(capsys):
    code = RANK + (
        "import socket; own = socket.gethostbyname(socket.gethostname());"
        "print(own, os.listdir('/sys/class/net'))"
    )
    report = launch(code, rate="10mbit")
    out = capsys.readouterr().out
    assert report.outcome.reason is None
    for rank in range(2):
        (line,) = (line for line in out.splitlines() if line.startswith(f"[{rank}]"))
        assert f" 10.77.0.{rank + 1} " in line
        assert set(re.findall(r"'(\w+)'", line)) - {"sit0", "tunl0", "ip6tnl0"} == {"lo", "eth0"}


@pytest.mark.usefixtures("throttled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_no_namespace_is_left(tmp_path, number):
    process, ranks = start_and_list_ranks(tmp_path, "--rate=100mbit")
    assert len(left_behind(process.pid)) == 5  # two hosts, a switch, two hosts' files
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number, err
    assert left_behind(process.pid) == []
    assert not any(map(alive, ranks))


@pytest.mark.usefixtures("throttled")
def test_the_next_launcher_removes_what_a_killed_one_left(tmp_path):
    process, ranks = start_and_list_ranks(tmp_path, "--rate=100mbit")
    netns.remove_stale()
    assert len(left_behind(process.pid)) == 5  # it is alive
    process.kill()
    process.communicate(timeout=20)
    assert wait_until(lambda: not any(map(alive, ranks)))
    with netns.Network(1, "100mbit"):
        assert left_behind(process.pid) == []
        assert len(left_behind(os.getpid())) == 3
    assert left_behind(os.getpid()) == []


@pytest.mark.usefixtures("throttled")
def test_connections_between_hosts_use_cubic(tmp_path):
    """Whatever the machine's own do; algorithms that it restricts are none of a namespace's."""
    (tmp_path / "server.py").write_text(
        "import socket\n"
        "with socket.create_server(('0.0.0.0', 5000)) as server:\n"
        "    print(flush=True)\n"
        "    server.accept()[0].recv(1)\n"
    )
    (tmp_path / "client.py").write_text(
        "import socket, sys\n"
        "with socket.create_connection((sys.argv[1], 5000), timeout=20) as end:\n"
        "    print(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).decode())\n"
    )
    with netns.Network(2, "100mbit") as network:
        words = [*network.enter(0), sys.executable, str(tmp_path / "server.py")]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout.readline()
                words = [*network.enter(1), sys.executable, str(tmp_path / "client.py")]
                used = subprocess.check_output([*words, network.addresses[0]], timeout=30)
            finally:
                server.kill()
    assert used.decode().strip("\0\n") == netns.CONGESTION


@pytest.mark.usefixtures("throttled")
def test_an_error_of_the_launcher_itself_leaves_nothing(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("planted")

    monkeypatch.setattr(processes, "run", broken)
    with pytest.raises(RuntimeError, match="planted"):
        launch("1", rate="100mbit")
    assert left_behind(os.getpid()) == []


@pytest.mark.usefixtures("throttled")
def test_half_made_hosts_are_taken_down(monkeypatch):
    def broken(self, name, address):
        raise OSError("planted")

    monkeypatch.setattr(netns.Network, "_configure", broken)
    with pytest.raises(netns.NetworkError, match="planted"):
        launch("1", rate="100mbit")
    assert left_behind(os.getpid()) == []
