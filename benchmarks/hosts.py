"""Several hosts on one machine: network namespaces on a bridge, with links of a given speed; Linux, as root.

``run`` starts one Python process per host, on gloo over the shaped links, and returns what each wrote as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 29500  # every host set has networks of its own


def missing() -> str | None:
    """Return what this machine lacks to make namespaces, or None."""
    if os.geteuid():
        return "not root"
    try:
        _ip("netns", "add", probe := f"rsprobe{os.getpid()}")
        _ip("netns", "del", probe)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"cannot make a network namespace: {error}"
    return None


@contextmanager
def hosts(count: int, mbit: float | None) -> Iterator[list[str]]:
    """Yield the names of ``count`` namespaces, each linked at ``mbit`` Mbit/s in both directions (None: unshaped)."""
    tag = f"rs{os.getpid() % 100000:05d}"
    switch, names = f"{tag}sw", [f"{tag}n{index}" for index in range(count)]
    made: list[str] = []
    try:
        _ip("netns", "add", switch)
        made.append(switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for index, name in enumerate(names):
            _ip("netns", "add", name)
            made.append(name)
            port = f"p{index}"
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("link", "add", "veth0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", name, "link", "set", "veth0", "name", "eth0")
            _ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            if mbit is not None:
                for space, device in ((name, "eth0"), (switch, port)):  # what leaves the host, what comes to it
                    shape = f"root tbf rate {mbit}mbit burst 256kb latency 50ms".split()
                    _ip("netns", "exec", space, "tc", "qdisc", "replace", "dev", device, *shape)
        yield names
    finally:
        for name in made:
            _ip("netns", "del", name)


def run(script: Path, arguments: list[str], names: list[str], timeout: float) -> list[dict]:
    """Run ``script`` once on each host, as one gloo world, and return what each wrote to the path in RINGSPAN_RESULT.

    Raises:
        RuntimeError: with the last words of a host that failed, or naming those that hung.
    """
    with tempfile.TemporaryDirectory(prefix="ringspan-hosts-") as folder:
        started = []
        for rank, name in enumerate(names):
            out = Path(folder) / f"rank{rank}"
            log = out.with_suffix(".log").open("w")
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(len(names)),
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1",
                "RINGSPAN_RESULT": str(out),
            }
            command = ["ip", "netns", "exec", name, sys.executable, str(script), *arguments]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            started.append((process, out))
        _await(started, time.monotonic() + timeout)
        return [json.loads(out.read_text()) for _, out in started]


def _await(started: list[tuple[subprocess.Popen, Path]], deadline: float) -> None:
    try:
        while any(process.poll() is None for process, _ in started):
            failed = [out for process, out in started if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                words = failed[0].with_suffix(".log").read_text()[-3000:] if failed else ""
                hung = [out.name for process, out in started if process.poll() is None]
                raise RuntimeError(f"{failed[0].name} failed:\n{words}" if failed else f"{hung} did not end in time")
            time.sleep(0.05)
        for process, out in started:
            if process.returncode:
                raise RuntimeError(f"{out.name} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
    finally:
        for process, _ in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
