"""A Ray cluster of real nodes with addresses of their own: a network namespace a node, a cable between them.

    ip netns exec HEAD python fault_namespaces.py HEAD NODE FOLDER

The protocol is fault_nodes.py's; "kill" pulls the cable and then kills all that runs on the other node, so that nothing there
could say good-bye. `namespaces` makes the two and takes them away again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fault_nodes import left

HEAD_ADDRESS, NODE_ADDRESS, PORT, DASHBOARD = "10.231.0.1", "10.231.0.2", 6379, 8265
START_SECONDS = 120.0


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """The names of two namespaces that reach each other and nothing else. PermissionError where none can be made."""
    names = [f"cavs-{os.getpid()}-{which}" for which in ("head", "node")]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", names[0][-14:], "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        _ip("-n", names[0], "link", "set", names[0][-14:], "name", "cable")
        for name, address in zip(names, (HEAD_ADDRESS, NODE_ADDRESS), strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", name, "link", "set", link, "up")
        yield names[0], names[1]
    finally:
        for name in names:
            kill_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def kill_all(name: str) -> None:
    """SIGKILL to every process of a namespace."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in found.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError("there is no command `ip`") from error
    except subprocess.CalledProcessError as error:
        raise PermissionError(f"ip {' '.join(words)}: {error.stderr.strip()}") from error


def main() -> int:
    head, node, folder = sys.argv[1:]
    ray_start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1", "--disable-usage-stats"]
    where = ["--temp-dir", folder, "--port", str(PORT), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(DASHBOARD)]
    address = f"{HEAD_ADDRESS}:{PORT}"
    with open(Path(folder) / "nodes.log", "w") as log:
        first = subprocess.Popen([*ray_start, "--head", "--node-ip-address", HEAD_ADDRESS, *where], stdout=log, stderr=log)
        _until_alive(address, 1)
        inside = ["ip", "netns", "exec", node]
        subprocess.Popen([*inside, *ray_start, "--address", address, "--node-ip-address", NODE_ADDRESS], stdout=log, stderr=log)
        _until_alive(address, 2)
        print("ready", address, f"127.0.0.1:{DASHBOARD}", flush=True)
        for line in sys.stdin:
            if line.strip() == "kill":
                _ip("-n", head, "link", "set", "cable", "down")
                kill_all(node)
            elif line.strip() == "left":
                print(left(address), flush=True)
            elif line.strip() == "end":
                break
        first.terminate()
        first.wait()
    return 0


def _until_alive(address: str, nodes: int) -> None:
    """Waits until so many nodes are alive: asked in another process each time, for one that fails to join may abort."""
    script = (
        f"import json, ray; ray.init({address!r}, log_to_driver=False); print(json.dumps(sum(n['Alive'] for n in ray.nodes())))"
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and json.loads(answer.stdout.splitlines()[-1]) >= nodes:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{nodes} nodes did not come up in {START_SECONDS:.0f} s:\n{answer.stderr}")


if __name__ == "__main__":
    sys.exit(main())
