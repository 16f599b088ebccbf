"""The commands that a sandboxed process is started with: another user, and namespaces that hold next to nothing.

Limits that a process can set on itself are set in ``guest.py``; what is refused here cannot be refused there.
"""

import os
import platform
import shutil
import struct
import sys
from pathlib import Path

NOBODY = 65534
LIBRARIES = ("lib", "lib32", "lib64", "libx32")
SYSTEM_PREFIXES = (Path("/usr"), Path("/usr/local"))
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# System calls that take memory which no limit counts, or open parts of the kernel that programs do not need.
REFUSED_CALLS = {
    #        shmget semget msgget memfd_create/_secret userfaultfd ptrace bpf perf add_key request_key keyctl io_uring_setup
    "x86_64": (0xC000003E, (29, 64, 68, 319, 447, 323, 101, 321, 298, 248, 249, 250, 425)),
    "aarch64": (0xC00000B7, (194, 190, 186, 279, 447, 282, 117, 280, 241, 217, 218, 219, 425)),
}


def unprivileged() -> list[str]:
    """What a command is started with so that it is nobody's: root would pass permissions and limits."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ValueError("root can run generated code only with setpriv; install util-linux, or run as another user")
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]


def shared_python() -> str:
    """The interpreter that runs this, or the system's if the sandbox's user could not read that one, or would see too much."""
    own = Path(sys.base_prefix, "bin", "python3")
    for path in (own, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or "/nowhere"):
        python = Path(path).resolve()
        if (
            python.exists()
            and not _private_folder_in(_prefix(python))
            and (os.geteuid() != 0 or all(folder.stat().st_mode & 0o001 for folder in (python, *python.parents)))
        ):
            return str(python)
    raise ValueError(
        f"{own} cannot be read by unprivileged users or stands among files of yours, and there is no other; name an "
        "interpreter in python, or install the system's (apt-get install python3)"
    )


def private_folders() -> list[Path]:
    """What generated code must not see: the home folder, the one that this was started in, and the checkout."""
    folders = [Path(os.path.expanduser("~")), Path.cwd()]
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").exists():  # otherwise it is a folder of installed packages
        folders.append(checkout)
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def call_filter() -> bytes:
    """A seccomp filter (classic BPF) under which :data:`REFUSED_CALLS` fail with EPERM."""
    if platform.machine() not in REFUSED_CALLS:
        raise ValueError(
            f"bubblewrap (isolation) is set up for {' and '.join(REFUSED_CALLS)}, this machine is {platform.machine()}; "
            "add its system calls to components/rewards/isolation.py"
        )
    architecture, calls = REFUSED_CALLS[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    n = len(calls)
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, architecture),
        (give, 0, 0, 0x80000000),  # SECCOMP_RET_KILL_PROCESS
        (load, 0, 0, 0),  # seccomp_data.nr
        (at_least, n + 1, 0, 0x40000000),  # the same calls by the numbers of the x32 ABI
        *((equal, n - i, 0, call) for i, call in enumerate(calls)),
        (give, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        (give, 0, 0, 0x00050001),  # SECCOMP_RET_ERRNO, EPERM
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def bubblewrap(python: str, *, disk_bytes: int) -> list[str]:
    """The command that gives what follows it a world of its own, but for ``--seccomp`` and the program."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ValueError(
            "generated code needs bubblewrap to be isolated; install the package bubblewrap (apt-get install bubblewrap)"
        )
    command = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    for file in ("/etc/ld.so.cache", "/usr/share/zoneinfo"):
        command += ["--ro-bind-try", file, file]
    for folder in _opened(Path("/")):
        if folder.is_symlink():
            command += ["--symlink", os.readlink(folder), str(folder)]
        else:
            command += ["--ro-bind", str(folder), str(folder)]
    prefix = _prefix(python)
    if private := _private_folder_in(prefix):
        raise ValueError(
            f"python is {python}, and its prefix {prefix} holds {private}, which generated code must not see; name an "
            "interpreter that has a folder of its own, such as /usr/bin/python3"
        )
    for folder in dict.fromkeys((*_opened(Path("/usr")), *_opened(prefix))):
        command += ["--ro-bind", str(folder), str(folder)]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--size", str(disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]


def _prefix(python: str | Path) -> Path:
    return Path(python).resolve().parent.parent


def _opened(prefix: Path) -> list[Path]:
    """What of ``prefix`` an interpreter needs: programs, libraries, and in them its standard library."""
    return [folder for name in ("bin", *LIBRARIES) if (folder := prefix / name).is_dir()]


def _private_folder_in(prefix: Path) -> Path | None:
    """A private folder in ``prefix``; in the system's own, where projects may stand in ``src``, in what is opened of it."""
    seen = [folder.resolve() for folder in _opened(prefix)] if prefix in SYSTEM_PREFIXES else [prefix]
    return next((private for private in private_folders() if any(map(private.is_relative_to, seen))), None)
