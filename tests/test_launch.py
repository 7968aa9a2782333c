"""The launch examples: they parse, name what exists, and start again what is worth it."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from configs import common
from jaxcomm.training import distributed

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "experiments" / "launch"
MANIFESTS = sorted(path.name for path in LAUNCH.glob("*.yaml"))


def pod(name):
    """The pod template, and the number of processes, of a manifest."""
    *_, document = yaml.safe_load_all((LAUNCH / name).read_text())
    spec = document["spec"]
    if document["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    return spec["template"]["spec"], spec["completions"]


def config_fields(arguments):
    """{'workers': '4'} of --config.workers=4."""
    pairs = (a.removeprefix("--config.").split("=") for a in arguments if "--config." in a)
    return dict(pairs)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_starts_the_job_it_describes(name):
    spec, processes = pod(name)
    (container,) = spec["containers"]
    assert container["command"] == ["python", "-m", "experiments.train"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env.keys() == {distributed.COORDINATOR, distributed.PROCESSES, distributed.PROCESS_ID}
    assert int(env[distributed.PROCESSES]) == processes
    assert env[distributed.COORDINATOR].rpartition(":")[2].isdigit()
    fields = config_fields(container["args"])
    assert int(fields["workers"]) == processes
    assert fields.keys() <= set(common.lm().keys())
    (config,) = (a.split("=")[1] for a in container["args"] if a.startswith("--config="))
    assert (ROOT / config).is_file()
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def submit(tmp_path, code, restarts=0, arguments=("configs/lm_diloco.py", "runs/x", "--a=1")):
    """Runs the batch script with an srun that ends with this code; its output and what was said."""
    for tool, body in (
        ("srun", f'echo "srun $@"; exit {code}'),
        ("scontrol", 'echo "scontrol $@"'),
    ):
        path = tmp_path / tool
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    env["SLURM_RESTART_COUNT"] = str(restarts)
    words = ["bash", str(LAUNCH / "train.sbatch"), *arguments]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (137, 9, True), (143, 3, True), (75, 10, False)],
)
def test_a_batch_job_is_requeued_when_that_helps(tmp_path, code, restarts, again):
    result = submit(tmp_path, code, restarts)
    assert result.returncode == code
    assert ("scontrol requeue 42" in result.stdout) is again
    words = result.stdout.splitlines()[0].split()
    assert words[:5] == ["srun", "--kill-on-bad-exit=1", "python", "-m", "experiments.train"]
    assert words[-1] == "--a=1"
    assert config_fields(words).keys() <= set(common.lm().keys())


def test_a_batch_job_needs_a_config(tmp_path):
    result = submit(tmp_path, 0, arguments=())
    assert result.returncode != 0
    assert "usage: sbatch train.sbatch CONFIG WORKDIR" in result.stderr
