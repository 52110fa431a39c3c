"""A pod's file system for processes of tests: a read-only root, volumes, a user without rights.

A container runtime does it with namespaces and bind mounts, and so does `unshare` here, as root.
The pod's root is made of this machine's /usr and some of /etc. All of it ends with the process.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_DEVICES = ("null", "zero", "full", "random", "urandom")
_ETC = ("group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd", "resolv.conf", "ssl")
_USR = ("bin", "sbin", "lib", "lib32", "lib64")


def skip_without_rights() -> None:
    """Skip the test where this process may not make namespaces."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("making a pod's file system takes root and util-linux")
    made = subprocess.run(
        ["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no mount namespace can be made here: {made.stderr.decode().strip()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """Where a process runs, and as whom."""

    root: Path
    """An empty folder to mount everything on."""
    user: int
    group: int
    env: Mapping[str, str]
    """All variables but PATH."""
    writable: Sequence[str]
    """Empty volumes, which the group may write to."""
    read_only: Mapping[str, Path] = field(default_factory=dict)
    """Files and folders by where they are seen."""

    def command(self, *words: str) -> list[str]:
        """What runs `words` in here, as one process that gets its signals."""
        root = shlex.quote(str(self.root))
        lines = ["set -e", "mount --make-rprivate /", f"mount -t tmpfs -o mode=755 none {root}"]
        for name in _USR:
            if (link := Path("/", name)).is_symlink():
                lines.append(f"ln -s {link.readlink()} {root}/{name}")
            elif link.is_dir():
                lines += self._bind(str(link), link)
        # First, because the others may lie in one of them.
        for target in self.writable:
            mode = f"mode=2770,uid=0,gid={self.group}"
            lines += [f"mkdir -p {root}{target}", f"mount -t tmpfs -o {mode} none {root}{target}"]
        shown = [Path("/etc", name) for name in _ETC]
        for path in (Path("/usr"), Path(sys.base_prefix), *filter(Path.exists, shown)):
            lines += self._bind(str(path), path)
        for target, source in self.read_only.items():
            lines += self._bind(target, source)
        for name in _DEVICES:
            lines += self._bind(f"/dev/{name}", Path("/dev", name), "")
        for name in ("proc", "sys"):
            lines += [f"mkdir {root}/{name}", f"mount --rbind /{name} {root}/{name}"]
        lines.append(f"mount -o remount,ro {root}")
        who = f"--userspec={self.user}:{self.group} --groups={self.group}"
        lines.append(f'exec chroot {who} {root} setpriv --no-new-privs env -i "$@"')
        variables = [f"{name}={value}" for name, value in self.env.items()]
        script = "\n".join(lines)
        return ["unshare", "--mount", "sh", "-c", script, "pod", *variables, *words]

    def _bind(self, target: str, source: Path, options: str = ",ro") -> list[str]:
        place = shlex.quote(f"{self.root}{target}")
        make = f"mkdir -p {place}" if source.is_dir() else f"touch {place}"
        bind = f"mount --bind {shlex.quote(str(source))} {place}"
        parent = f"mkdir -p {shlex.quote(os.path.dirname(f'{self.root}{target}'))}"
        return [parent, make, bind, f"mount -o remount,bind{options} {place}"]
