"""cluster.yaml against the schema that ships inside ray, and against what the schema does not say."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_it_fits_the_schema(cluster):
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(cluster, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "no_such_field": 1}, SCHEMA)


def test_fields_that_ray_dropped_are_not_used(cluster):
    assert not {"min_workers", "initial_workers", "head_node", "worker_nodes"} & set(cluster)
    assert {"cluster_name", "provider"} <= set(cluster)


def test_node_types_are_there_and_fit(cluster):
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert len(types) > 1
    for name, node in types.items():
        assert node["node_config"]
        assert node["resources"]["CPU"] >= 1
        assert node.get("min_workers", 0) <= node["max_workers"] <= cluster["max_workers"], name
    assert types[cluster["head_node_type"]]["max_workers"] == 0
    assert any(node["resources"].get("GPU") for node in types.values())


def test_the_head_starts_as_head_and_workers_join_it_all_with_a_token(cluster):
    head, worker = (" ".join(cluster[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--head" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--head" not in worker
    [address] = re.findall(r"--address=(\S+)", worker)
    [port] = re.findall(r"--port=(\d+)", head)
    assert address == f"$RAY_HEAD_IP:{port}"
    for commands in (head, worker):
        assert "RAY_AUTH_MODE=token" in commands
    assert any(path.endswith(".ray/auth_token") for path in cluster["file_mounts"])


def test_what_is_installed_is_what_is_mounted(cluster):
    text = " ".join(cluster["setup_commands"])
    [folder] = [path for path, source in cluster["file_mounts"].items() if source == "."]
    assert f"--constraint {folder}/constraints.txt" in text
    assert (ROOT / "constraints.txt").is_file()
    assert {".git", ".venv", "outputs"} <= set(cluster["rsync_exclude"])
