"""A command in a network namespace whose only name server notes what it is asked, and answers that there is none.

Run as a program inside the namespace, this file is that name server and starts the command.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Watched", "needs_namespaces", "watch"]

# As root of a user namespace this works for everybody, where the kernel permits it.
_UNSHARE = ["unshare", "--map-root-user", "--net", "--mount"]
_SET_UP = """
ip link set lo up || exit 3
for file in resolv.conf nsswitch.conf; do
  if [ -e /etc/$file ]; then mount --bind "$0/$file" /etc/$file || exit 3; fi
done
exec "$@"
"""
# What a user or a machine may have set already, and what says that this is no user's machine.
_HIDDEN = (
    "CI",
    "TF_BUILD",
    "JENKINS_URL",
    "NNCF_CI",
    "NNCF_DEV",
    "ORT_DISABLE_TELEMETRY",
    "MPLCONFIGDIR",
    "XDG_CACHE_HOME",
)
_FOLDERS = ("home", "tmp", "work")


def _permitted() -> bool:
    if not all(map(shutil.which, ("unshare", "ip", "mount"))):
        return False
    tried = subprocess.run([*_UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return tried.returncode == 0


needs_namespaces = pytest.mark.skipif(not _permitted(), reason="needs the right to make network namespaces")


@dataclass(frozen=True)
class Watched:
    """What a command did: its exit code and standard error, the names it asked for, and what it left behind:
    files and empty folders.

    left: relative to the folder that holds its `home`, its `tmp` and its `work`, all empty before.
    """

    code: int
    stderr: str
    asked: tuple[str, ...]
    left: tuple[str, ...]


def watch(command: list[str], folder: Path, **environment: str) -> Watched:
    """Run `command` with fresh folders for its home, its temporary files and its work, all inside `folder`."""
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True)
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (folder / "nsswitch.conf").write_text("passwd: files\nhosts: files dns\n")
    kept = {name: value for name, value in os.environ.items() if name not in _HIDDEN and name[:9] != "AGLN_FAST"}
    inside = [*_UNSHARE, "sh", "-c", _SET_UP, str(folder), sys.executable, __file__, *command]
    done = subprocess.run(
        inside,
        cwd=folder / "work",
        env=kept | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    code, asked = json.loads(done.stdout)
    left = (path for name in _FOLDERS for path in (folder / name).rglob("*") if not any(_content(path)))
    return Watched(code, done.stderr, tuple(asked), tuple(sorted(str(path.relative_to(folder)) for path in left)))


def _content(path: Path) -> Iterator[Path]:
    return path.iterdir() if path.is_dir() else iter(())


def _serve(server: socket.socket, asked: set[str]) -> None:
    while True:
        query, client = server.recvfrom(4096)
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += 1 + query[at]
        asked.add(".".join(labels))
        refusal = query[:2] + b"\x81\x83" + query[4:6] + bytes(6) + query[12 : at + 5]
        server.sendto(refusal, client)


def main() -> None:
    """Serve, run the command, and print its exit code and the names it asked for."""
    asked: set[str] = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        threading.Thread(target=_serve, args=(server, asked), daemon=True).start()
        done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False)
        print(json.dumps([done.returncode, sorted(asked)]))


if __name__ == "__main__":
    main()
