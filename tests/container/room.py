"""A container without an engine: namespaces, a read-only root, one /tmp, an unprivileged user.

What is in it: the machine's /usr and /etc, its Python, the serving environment in /opt/pathguard,
and what the caller mounts. The machine's own Java is hidden, so that the one of the environment
serves.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.container.dockerfile import ROOT

SCRIPT = Path(__file__).with_name("room.sh")
TOOLS = ("unshare", "nsenter", "setpriv", "chroot", "mount", "ip", "strace")
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc")
DEVICES = ("null", "zero", "full", "random", "urandom")
NAMESPACES = ("--mount", "--net", "--pid", "--ipc")
SECONDS = 120.0


def missing() -> str | None:
    """Say why no room can be made here, None where one can."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or lacking:
        return f"a room needs Linux with {', '.join(lacking or TOOLS)}"
    mounted = ["unshare", *NAMESPACES, "--fork", "mount", "-t", "tmpfs", "room", "/tmp"]
    tried = subprocess.run(["strace", "-o", "/dev/null", *mounted], capture_output=True)
    return "a room needs the right to mount and to trace: root" if tried.returncode else None


@dataclass(frozen=True)
class Room:
    """A room in which a command runs, and which others can enter while it does."""

    process: subprocess.Popen[str]
    root: Path
    user: int
    environment: Mapping[str, str]

    @property
    def init(self) -> psutil.Process:
        """The room's first process: below strace and unshare."""
        (unshare,) = psutil.Process(self.process.pid).children()
        (first,) = unshare.children()
        return first

    def wait_for(self, words: str) -> None:
        """Return when the command has said some words; it ends early where it does not."""
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if words in line:
                return
        raise AssertionError(f"the command ended without saying {words!r}: {''.join(said)}")

    def run(self, command: Sequence[str], *, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside and wait for it, as `docker exec` does."""
        enter = ["nsenter", f"--target={self.init.pid}", *NAMESPACES]
        line = [*enter, *_inside(self.root, self.user, self.environment), *command]
        return subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=SECONDS)


@contextmanager
def opened_room(
    command: Sequence[str],
    *,
    mounts: Sequence[str],
    user: int,
    environment: Mapping[str, str],
    trace: Path,
) -> Iterator[Room]:
    """Run a command in a new room until the block ends.

    mounts: 'source:place', read-only unless ':rw' follows. trace: gets every connection that a
    process in the room asks the kernel for, one line each.
    """
    with TemporaryDirectory(prefix="room-") as folder:
        root = Path(folder).resolve()
        traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect", "-o", str(trace)]
        unshared = ["unshare", *NAMESPACES, "--fork", "--kill-child", str(SCRIPT), str(root)]
        process = subprocess.Popen(
            [*traced, *unshared, *mounts, "--", *_inside(root, user, environment), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Room(process, root, user, environment)
        finally:
            _end(process)


def base_image() -> list[str]:
    """Return the mounts that stand for the base image: a system, a Python, and no Java."""
    mounts = [f"{name}:{name}" for name in SYSTEM if Path(name).exists()]
    mounts += [f"/dev/{name}:/dev/{name}" for name in DEVICES]
    mounts.append(f"{sys.base_prefix}:{sys.base_prefix}")
    if java := shutil.which("java"):
        mounts.append(f"/dev/null:{Path(java).resolve()}")
    return mounts


def serving_image(prefix: Path) -> list[str]:
    """Return the mounts of what serves: the base, and the environment at `prefix`."""
    mounts = [*base_image(), f"{prefix}:/opt/pathguard"]
    if prefix == Path(sys.prefix):  # the environment of the tests: made by `pip install --editable`
        own = [prefix, ROOT / "defense", ROOT / "handlers"]
        mounts += [f"{path}:{path}" for path in own]
    return mounts


def _inside(root: Path, user: int, environment: Mapping[str, str]) -> list[str]:
    """Enter the root without a privilege, in an environment of which nothing is inherited."""
    gone = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    entered = ["chroot", str(root), "setpriv", f"--reuid={user}", f"--regid={user}"]
    variables = [f"{name}={value}" for name, value in environment.items()]
    return [*entered, "--clear-groups", *gone, "env", "-i", "-C", "/tmp", *variables]


def _end(process: subprocess.Popen[str]) -> None:
    """End what still runs: with its first process the kernel ends everything in the room."""
    if process.poll() is None:
        for below in psutil.Process(process.pid).children(recursive=True):
            below.kill()
    process.communicate(timeout=SECONDS)
