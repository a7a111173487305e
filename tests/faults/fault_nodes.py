"""A Ray cluster of several raylets in a process of its own: `python fault_nodes.py CPUS [CPUS ...]`, a node each.

Says "ready ADDRESS DASHBOARD". On standard input, "kill" kills the last node as a power cut would, "left" asks which placement
groups are left and how many CPUs are taken once half a minute has gone or none is, and "end" ends all of them.
"""

from __future__ import annotations

import socket
import sys
import time

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

PATIENCE_SECONDS = 30.0


def left(address: str) -> str:
    """What drivers that are gone have left."""
    ray.init(address=address, log_to_driver=False)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        groups = [each["state"] for each in placement_group_table().values() if each["state"] != "REMOVED"]
        taken = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
        if (not groups and not taken) or time.monotonic() > deadline:
            ray.shutdown()
            return f"left {len(groups)} groups, {taken:g} CPUs"
        time.sleep(0.5)


def port_of_nobody() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> int:
    head, *others = (int(cpus) for cpus in sys.argv[1:])
    # Without a port of its own the agent that takes jobs has none where another cluster runs on the machine.
    shown = {"include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": port_of_nobody()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, **shown})
    nodes = [cluster.add_node(num_cpus=cpus, dashboard_agent_listen_port=port_of_nobody()) for cpus in others]
    print("ready", cluster.address, cluster.head_node.webui_url, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif line.strip() == "left":
            print(left(cluster.address), flush=True)
        elif line.strip() == "end":
            break
    cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
