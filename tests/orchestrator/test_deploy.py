"""deploy/: the RayJob against the fields of KubeRay's CRD, the Slurm script against srun and scontrol that only write down."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "kuberay-rayjob.yaml"
SLURM = ROOT / "deploy" / "slurm.sh"
TYPES = json.loads(Path(__file__).with_name("kuberay_fields.json").read_text())["types"]
PLAIN = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}


def faults(value, kind, path):
    """What of a manifest's value does not fit the type of this name (see kuberay_fields.json)."""
    if kind in TYPES:
        if not isinstance(value, dict):
            return [f"{path}: a {kind} is wanted"]
        unknown = [f"{path}.{key}: no field of {kind}" for key in value if key not in TYPES[kind]]
        known = [(key, each) for key, each in value.items() if key in TYPES[kind]]
        return unknown + [fault for key, each in known for fault in faults(each, TYPES[kind][key], f"{path}.{key}")]
    if kind.startswith("["):
        if not isinstance(value, list):
            return [f"{path}: a list is wanted"]
        return [fault for n, each in enumerate(value) for fault in faults(each, kind[1:-1], f"{path}[{n}]")]
    if kind == "map":
        fits = isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
    elif kind in PLAIN:
        fits = isinstance(value, PLAIN[kind]) and (kind == "boolean" or not isinstance(value, bool))
    else:
        fits = value in kind.split("|")
    return [] if fits else [f"{path}: {value!r} is no {kind}"]


@pytest.fixture
def job():
    return yaml.safe_load(MANIFEST.read_text())


def test_the_rayjob_has_fields_of_the_crd_alone(job):
    assert faults(job, "Root", "RayJob") == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda spec: spec.update(entryPoint="x"), "RayJob.spec.entryPoint: no field of RayJobSpec"),
        (lambda spec: spec.update(backoffLimit="3"), "RayJob.spec.backoffLimit: '3' is no integer"),
        (lambda spec: spec.update(submissionMode="Job"), "RayJob.spec.submissionMode"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplica=1), "workerGroupSpecs[0].minReplica"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(cpus=4), "rayStartParams"),
    ],
)
def test_what_is_no_field_would_be_found(job, change, told):
    change(job["spec"])
    assert any(told in fault for fault in faults(job, "Root", "RayJob"))


def test_the_rayjob_asks_for_a_token_runs_a_sweep_and_shares_a_folder(job):
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "cavs-ray-token"}
    assert spec["entrypoint"].startswith("python -m orchestrator.sweep ")
    assert "--name" in spec["entrypoint"]  # a further try goes on
    assert (
        f'rayVersion: "{re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]}"'
        in MANIFEST.read_text()
    )
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "0.0.0.0" not in MANIFEST.read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        outputs = next(each["value"] for each in container["env"] if each["name"] == "CAVS_OUTPUTS")
        [mount] = container["volumeMounts"]
        assert Path(outputs).is_relative_to(mount["mountPath"])
        assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
        assert all("value" not in each for each in container["env"] if each["name"] == "MLFLOW_TRACKING_URI")
    gpu, cpu = cluster["workerGroupSpecs"]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for group in (gpu, cpu):
        assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    assert gpu["minReplicas"] >= 1  # what fits at a time is counted at the start


# One write a call: steps run side by side.
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
"""
STUBS = {
    "scontrol": "printf 'node1\\nnode2\\n'\n",
    # What holds a step open ends when it is told to.
    "srun": "case $* in *hostname*) echo 10.0.0.1 fe80::1;; *) sleep 60 & trap 'kill $!' TERM; wait $!;; esac\n",
    "ray": "",
    "python": "[[ $* == *check* ]] && exit $CHECK_STATUS\n[[ -s $RAY_AUTH_TOKEN_PATH ]] && "
              "echo token $(stat -c %a $RAY_AUTH_TOKEN_PATH) $RAY_AUTH_MODE $RAY_ADDRESS >> \"$CALLS\"\nexit $SWEEP_STATUS\n",
}  # fmt: skip


def slurm(folder, check_status=0, sweep_status=0, **environment):
    """Runs the script with stubs in place of Slurm, ray and python; its exit status and the calls it made."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in STUBS.items():
        (tools / name).write_text(STUB + body)
        (tools / name).chmod(stat.S_IRWXU)
    calls = folder / "calls"
    calls.touch()
    told = subprocess.run(
        ["bash", str(SLURM), "tones", "--name", "a name", "--trials", "2"],
        cwd=folder,
        env={
            "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder), "CALLS": str(calls), "CAVS_BIN": str(tools),
            "CAVS_OUTPUTS": str(folder / "outputs"), "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "1",
            "CHECK_STATUS": str(check_status), "SWEEP_STATUS": str(sweep_status), **environment,
        },
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return told, calls.read_text().splitlines()


def test_slurm_starts_a_head_and_workers_with_a_token_and_then_the_sweep(tmp_path):
    told, calls = slurm(tmp_path, sweep_status=3)
    assert told.returncode == 3, told.stderr  # the sweep's own
    port = 20000 + 4242 % 3000 * 3
    head, worker = sorted((call for call in calls if "start --block" in call), key=lambda call: "--head" not in call)
    assert "--nodelist=node1" in head
    assert f"--head --node-ip-address=10.0.0.1 --port={port} --dashboard-host=127.0.0.1" in head
    assert "--nodelist=node2" in worker
    assert f"--address=10.0.0.1:{port}" in worker
    assert "--head" not in worker
    for call in (head, worker):
        assert "--num-cpus=8 --num-gpus=1" in call
    checks, sweeps = (
        [call for call in calls if call.startswith(f"python -m orchestrator.{verb} ")] for verb in ("check", "sweep")
    )
    assert checks == ["python -m orchestrator.check tones --name a name --trials 2 --nodes 2"]
    assert sweeps == ["python -m orchestrator.sweep tones --name a name --trials 2"]
    assert f"token 600 token 10.0.0.1:{port}" in calls
    assert list((tmp_path / ".ray").iterdir()) == []  # the token is gone with the job


def test_slurm_stops_before_the_sweep_where_the_check_finds_a_problem(tmp_path):
    told, calls = slurm(tmp_path, check_status=2)
    assert told.returncode == 2
    assert not [call for call in calls if "orchestrator.sweep" in call]
    assert list((tmp_path / ".ray").iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "named"),
    [({"CAVS_OUTPUTS": ""}, "CAVS_OUTPUTS"), ({"CAVS_HEAD_ADDRESS": "127.0.1.1"}, "CAVS_HEAD_ADDRESS")],
)
def test_slurm_refuses_what_could_not_work(tmp_path, environment, named):
    told, calls = slurm(tmp_path, **environment)
    assert told.returncode != 0
    assert named in told.stderr
    assert not [call for call in calls if "start" in call]
