"""A container engine whose containers are processes: what kndsim.kind asks of docker and podman.

Invariant: a command runs in the mount and network namespaces of its container's process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kndsim.kind.engine import Engine

_SCRIPT = """#!{python} -IS
import json, os, sys
state = json.loads(open({state!r}).read())
words = sys.argv[1:]
open({asked!r}, "a").write(json.dumps(words) + chr(10))
if words[0] == "version":
    sys.exit("Cannot connect to the daemon") if not state["answers"] else print("{{}}")
elif words[:2] == ["container", "inspect"]:
    pid = state["containers"].get(words[2])
    if pid is None:
        sys.exit(f"Error: No such container: {{words[2]}}")
    said = {{"Running": bool(pid), "Pid": pid, "Status": "running" if pid else "exited"}}
    print(json.dumps([{{"State": said}}]))
elif words[0] == "exec":
    words = words[1:]
    env = dict(os.environ)
    while words[0].startswith("-"):
        if words.pop(0) == "-e":
            name, _, value = words.pop(0).partition("=")
            env[name] = value
    if not state["containers"].get(words[0]):
        sys.exit(f"Error response from daemon: container {{words[0]}} is not running")
    if state["containers"][words[0]] == os.getppid():
        os.execvpe(words[1], words[1:], env)
    nsenter = ["nsenter", "-t", str(state["containers"][words[0]]), "-m", "-n", "--wdns=/", "--"]
    os.execvpe("nsenter", nsenter + words[1:], env)
else:
    sys.exit(f"unknown command: {{words}}")
"""


class FakeEngine:
    """containers maps a name to its process id, 0 for one that has ended."""

    def __init__(self, folder: Path, **containers: int) -> None:
        self._state = folder / "engine.json"
        self._asked = folder / "asked"
        self._asked.touch()
        self.program = folder / "docker"
        words = {"python": sys.executable, "state": str(self._state), "asked": str(self._asked)}
        self.program.write_text(_SCRIPT.format(**words))
        self.program.chmod(0o755)
        self.set(**containers)

    def set(self, *, answers: bool = True, **containers: int) -> None:
        self._state.write_text(json.dumps({"answers": answers, "containers": containers}))

    @property
    def engine(self) -> Engine:
        return Engine(str(self.program))

    def asked(self) -> list[list[str]]:
        """Every command line so far."""
        return [json.loads(line) for line in self._asked.read_text().splitlines()]
