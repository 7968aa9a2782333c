"""What a run writes: lines that survive a kill and a restart, a summary, something to watch."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxcomm.training.metrics import (
    MetricsLogger,
    Stopwatch,
    WorkdirError,
    device_arithmetic,
    human_bytes,
    jsonable,
    prepare_workdir,
)

ROOT = Path(__file__).parents[1]


def plain(**options):
    return Console(file=io.StringIO(), width=120, **options)


def shown_on(console) -> str:
    return console.file.getvalue()


def logger_of(workdir, **options):
    options = {"total_steps": 400, "tensorboard": False, "console": plain(), **options}
    return MetricsLogger(workdir, **options)


def row(step):
    return {
        "loss": 1 / step,
        "sent_bytes": 10 * step,
        "seconds": 0.5 * step,
        "sync_step": step // 2,
    }


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_written_at_once(tmp_path):
    with logger_of(tmp_path / "new" / "run") as logger:
        logger.log(1, row(1))
        assert read(tmp_path / "new" / "run") == [{"step": 1, **row(1)}]
        logger.log(jnp.int32(2), row(2))
    assert read(tmp_path / "new" / "run") == [{"step": s, **row(s)} for s in (1, 2)]


def test_values_become_json(tmp_path):
    values = {
        "f32": jnp.float32(0.1),
        "bf16": jnp.bfloat16(1.5),
        "int": np.int64(2**60),
        "bool": np.bool_(True),
        "rows": jnp.arange(3),
        "nested": {"a": (np.float32(0.5), None, "x")},
        "nan": jnp.nan,
        "inf": [np.float32(np.inf), -jnp.inf],
    }
    with logger_of(tmp_path) as logger:
        logger.log(1, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    forbidden = lambda name: pytest.fail(f"{name} is not JSON")
    assert json.loads(text, parse_constant=forbidden) == {
        "step": 1,
        "f32": float(np.float32(0.1)),
        "bf16": 1.5,
        "int": 2**60,
        "bool": True,
        "rows": [0, 1, 2],
        "nested": {"a": [0.5, None, "x"]},
        "nan": "nan",
        "inf": ["inf", "-inf"],
    }
    assert type(json.loads(text)["bool"]) is bool
    assert np.isnan(float(jsonable(np.nan)))


def test_a_run_that_goes_on_leaves_the_same_lines(tmp_path):
    with logger_of(tmp_path / "straight") as logger:
        for step in range(1, 9):
            logger.log(step, row(step))
    with logger_of(tmp_path / "killed") as logger:
        for step in range(1, 6):
            logger.log(step, row(step))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.1')
    with logger_of(tmp_path / "killed") as logger:
        assert logger.truncate(3) == {"step": 3, **row(3)}
        for step in range(4, 9):
            logger.log(step, row(step))
    straight, killed = (tmp_path / name / "metrics.jsonl" for name in ("straight", "killed"))
    assert straight.read_bytes() == killed.read_bytes()


@pytest.mark.parametrize("tail", ['{"step": 2, "los', '{"step": 2}', "\ufffd"])
def test_a_half_line_is_dropped(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5}}\n{tail}')
    with logger_of(tmp_path) as logger:
        logger.log(2, {"loss": 0.25})
    assert read(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_starting_over_empties_the_file(tmp_path):
    with logger_of(tmp_path) as logger:
        assert logger.truncate(0) is None
        logger.log(1, row(1))
        assert logger.truncate(0) is None
        assert read(tmp_path) == []


def test_only_the_main_process_writes(tmp_path):
    with logger_of(tmp_path / "run", is_main=False, tensorboard=True) as logger:
        logger.log(1, row(1))
        logger.truncate(0)
        logger.summary({"steps": 1})
    assert not (tmp_path / "run").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    console = plain()
    with logger_of(tmp_path, console=console) as logger:
        values = {"loss": 0.12345, "sent_bytes": 1_234_567, "seconds": 12.34, "sync_step": 3}
        logger.log(100, values)
        logger.log(200, {"loss": jnp.nan, "validation_loss": 0.5})
    assert shown_on(console) == (
        "step 100/400  loss 0.1235  sent 1.2 MB  12.3 s\n"
        "step 200/400  loss nan  validation_loss 0.5000\n"
    )


def test_a_bar_on_a_terminal(tmp_path):
    console = plain(force_terminal=True, color_system=None)
    with logger_of(tmp_path, console=console) as logger:
        logger.log(100, row(100))
        time.sleep(0.01)
        logger.log(200, row(200))
        logger.summary({"steps": 400})
    shown = shown_on(console)
    assert "step 200/400" in shown
    assert "loss 0.0050  sent 2.0 kB  100.0 s" in shown
    assert "steps/s" in shown
    assert console.is_alt_screen is False
    assert shown.rstrip().endswith("┘")  # the table stands below the ended bar


def test_summary(tmp_path):
    console = plain()
    values = {
        "steps": 12_000,
        "sent_bytes": np.int64(1_234_567),
        "validation_accuracy": jnp.float32(0.97),
        "diverged": False,
        "loss": float("nan"),
        "config": {"lr": 0.1},
    }
    with logger_of(tmp_path, console=console) as logger:
        logger.summary({"steps": 1})
        logger.summary(values)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        **values,
        "validation_accuracy": float(np.float32(0.97)),
        "loss": "nan",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    for text in ("12,000", "1,234,567 (1.2 MB)", "0.97", "nan", "False"):
        assert text in shown_on(console)
    assert "lr" not in shown_on(console)


def test_tensorboard_events(tmp_path):
    with logger_of(tmp_path, tensorboard=True) as logger:
        logger.truncate(0)
        logger.log(1, {"loss": 0.5, "nan": jnp.nan, "name": "x"})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content
    assert b"name" not in content


def test_nothing_warns_in_a_fresh_process(tmp_path):
    code = (
        "import sys; from jaxcomm.training.metrics import MetricsLogger\n"
        "logger = MetricsLogger(sys.argv[1], total_steps=2)\n"
        "logger.log(1, {'loss': 0.5, 'seconds': 1})\n"
        "logger.close()"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("step 1/2  loss 0.5000  1.0 s\n", "")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (1_250_000_000, "1.2 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_human_bytes(n, text):
    assert human_bytes(n) == text


def test_the_clock_starts_after_the_first_step_and_goes_on_after_a_restart():
    clock = Stopwatch()
    time.sleep(0.05)
    assert clock() == 0.0
    time.sleep(0.02)
    assert 0.02 <= clock() < 0.05
    later = Stopwatch(before=7.5)
    assert later() == 7.5
    assert later() > 7.5


def test_device_arithmetic():
    found = device_arithmetic()
    assert json.loads(json.dumps(found)) == found
    assert (found["platform"], found["devices"]) == (jax.default_backend(), jax.device_count())
    assert (found["jax"], found["default_matmul_precision"]) == (jax.__version__, "default")
    with jax.default_matmul_precision("highest"):
        assert device_arithmetic()["default_matmul_precision"] == "highest"


def test_an_unwritable_workdir(tmp_path):
    assert prepare_workdir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    message = r"^cannot write to workdir .*/file/run: Not a directory$"
    with pytest.raises(WorkdirError, match=message):
        MetricsLogger(tmp_path / "file" / "run", total_steps=1)
    with pytest.raises(WorkdirError, match=r"^cannot write to workdir /proc/"):
        prepare_workdir("/proc/run")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_workdir(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError, match=r"^workdir must be in a mounted file system"):
        prepare_workdir(kind("gs://bucket/run"))
    assert not list(tmp_path.iterdir())
