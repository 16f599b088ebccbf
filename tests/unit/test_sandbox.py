"""Hostile programs in the sandbox. What they could not do is looked at from outside, never asked of them alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from components.rewards import Sandbox

ROOT = Path(__file__).parents[2]
LIBRARIES = {"lib", "lib32", "lib64", "libx32"}
START = "import ctypes, os, signal, socket, subprocess, sys, time\n"


def alive(token):
    """Processes of this machine, by number, with ``token`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if token.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            pass
    return found


def token_of(sandbox):
    return str(sandbox.limits[1])


def gone(token, seconds=5.0):
    """Whether such processes end; those of a run that was stopped may take an instant."""
    deadline = time.monotonic() + seconds
    while (found := alive(token)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not found


@pytest.fixture
def attack(sandbox):
    """Runs a program; afterwards none of its processes may be left."""

    def run(program):
        result = sandbox.run(START + program)
        assert gone(token_of(sandbox))
        assert result.seconds < sandbox.wall_seconds + 2
        return result

    return run


@contextmanager
def sampled(measure):
    """The largest value of ``measure()`` while the block runs."""
    values, stop = [0], threading.Event()

    def sample():
        while not stop.wait(0.02):
            values.append(measure())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield values
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------- harmless


def test_a_program_reads_its_input_and_its_output_comes_back(sandbox):
    result = sandbox.run("import sys\nprint(input()[::-1])\nprint('note', file=sys.stderr)", stdin="abc\n")
    assert (result.status, result.stdout, result.stderr, result.returncode) == ("ok", "cba\n", "note\n", 0)
    assert 0 < result.seconds < 5


def test_a_failing_program_is_an_error_with_its_traceback_and_exit_code(sandbox):
    assert "ZeroDivisionError" in sandbox.run("1 / 0").stderr
    results = sandbox.map(["1 / 0", "def f(:", "exit(3)", "import os\nos.abort()"])
    assert [result.status for result in results] == ["error"] * 4
    assert [result.returncode for result in results] == [1, 1, 3, 128 + signal.SIGABRT]


def test_results_come_in_order_and_one_run_leaves_nothing_for_the_next(sandbox):
    programs = [f"import os\nprint({i}, os.listdir('/tmp'))\nopen('/tmp/{i}', 'w')" for i in range(8)]
    assert [result.stdout for result in sandbox.map(programs)] == [f"{i} []\n" for i in range(8)]


def test_a_program_is_a_module_that_libraries_can_look_up(sandbox):
    program = """
import dataclasses, pickle, typing
@dataclasses.dataclass
class Point:
    x: "int"
def f(x: 1 + 1): pass
print(pickle.loads(pickle.dumps(Point(3))), typing.get_type_hints(Point), __name__, f.__annotations__)
"""
    assert sandbox.run(program).stdout == "Point(x=3) {'x': <class 'int'>} __main__ {'x': 2}\n"


def test_equal_programs_see_equal_hashes(sandbox):
    assert len({result.stdout for result in sandbox.map(["print(hash('a'))"] * 3)}) == 1


def test_what_is_installed_beside_the_standard_library_is_not_there(sandbox):
    assert "ModuleNotFoundError" in sandbox.run("import torch").stderr


# ----------------------------------------------------------------------------------------------- taking too much


def test_a_fork_bomb_stays_within_the_number_of_processes(sandbox, attack):
    with sampled(lambda: len(alive(token_of(sandbox)))) as counts:
        result = attack("while True:\n    try: os.fork()\n    except OSError: pass")
    assert result.status == "timeout"
    assert 4 < max(counts) <= 8 + 2  # and bubblewrap's two


def test_memory_stays_within_its_limit(sandbox, attack):
    def resident():
        total = 0
        for pid in alive(token_of(sandbox)):
            with suppress(OSError):  # it has ended
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total

    with sampled(resident) as sizes:
        result = attack("kept = []\nwhile True: kept.append(b'x' * (1 << 22))")
    assert result.status in ("error", "timeout")  # whichever is first
    assert (16 << 20) < max(sizes) < sandbox.limits[1] + (64 << 20)  # bubblewrap and all
    assert "MemoryError" in attack("bytearray(1 << 33)").stderr


def test_files_stay_within_the_size_of_the_private_disk(attack):
    program = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
total = 0
for number in range(50):
    try:
        with open(f"/tmp/ebft-disk-{number}", "wb", buffering=0) as file:
            for _ in range(50):
                total += file.write(bytes(1 << 20))
    except OSError: pass
print(total >> 20)
"""
    assert 8 <= int(attack(program).stdout) <= 16
    assert not list(Path("/tmp").glob("ebft-disk-*"))


def test_memory_that_no_limit_counts_is_refused(attack):
    program = """
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0, 4096, 0o1600), ctypes.get_errno())
print(libc.msgget(0, 0o1600), ctypes.get_errno())
try: os.memfd_create("x")
except PermissionError: print("no memfd")
"""
    assert attack(program).stdout == "-1 1\n-1 1\nno memfd\n"


def test_a_flood_of_output_is_cut_and_stopped(sandbox, attack):
    result = attack("while True:\n    print('x' * 1000)\n    print('y' * 1000, file=sys.stderr)")
    assert result.status == "output"
    assert len(result.stdout) + len(result.stderr) == sandbox.output_bytes


def test_an_endless_loop_ends_by_processor_time(attack):
    result = attack("while True: pass")
    assert result.status == "timeout"
    assert result.returncode in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


def test_ignoring_the_signal_of_processor_time_does_not_help(attack):
    result = attack("signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass")
    assert result.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("program", ["time.sleep(100)", "sys.stdout.close(); os.closerange(0, 64); time.sleep(100)"])
def test_a_sleeper_ends_by_wall_clock(attack, program):
    assert attack(program).status == "timeout"


def test_endless_recursion_is_an_error(attack):
    assert attack("def f(): f()\nf()").status == "error"
    assert attack("sys.setrecursionlimit(10**9)\ndef f(x): return [f([x])]\nf(1)").status in ("error", "timeout")


# ------------------------------------------------------------------------------------------ reaching for others


@pytest.mark.parametrize("program", ["os.kill(-1, 9)", "os.killpg(0, 9)", "os.kill(os.getppid(), 9)", "os.kill(1, 9)"])
def test_signals_reach_no_process_outside(sandbox, attack, program):
    prefix = sandbox.command("run", filter_fd=0)
    user = prefix[: next(i for i, word in enumerate(prefix) if word.endswith("bwrap"))]
    with subprocess.Popen([*user, "sleep", "60"]) as bystander:  # of the same user
        attack(program)
        assert bystander.poll() is None
        bystander.kill()


def test_no_socket_of_this_machine_is_reached(attack, tmp_path):
    tmp_path.chmod(0o777)
    path, abstract = str(tmp_path / "socket"), f"\0ebft{os.getpid()}"
    with (
        socket.create_server(("", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        local.bind(path)
        hidden.bind(abstract)
        port = tcp.getsockname()[1]
        addresses = ["127.0.0.1", "::1", *socket.gethostbyname_ex("localhost")[2]]
        with suppress(OSError):
            addresses += socket.gethostbyname_ex(socket.gethostname())[2]
        program = f"""
for family, address in [(socket.AF_UNIX, {path!r}), (socket.AF_UNIX, {abstract!r})] + [
    (socket.AF_INET6 if ":" in a else socket.AF_INET, (a, {port})) for a in {addresses!r}
]:
    try:
        socket.socket(family).connect(address)
        print("reached", address)
    except OSError: pass
"""
        for server in (tcp, local, hidden):
            server.listen()
            server.setblocking(False)
        assert attack(program).stdout == ""
        for server in (tcp, local, hidden):
            with pytest.raises(BlockingIOError):
                server.accept()


def test_there_is_no_network_beyond_this_machine(attack):
    program = """
print(socket.if_nameindex())
for address in (("1.1.1.1", 53), ("deb.debian.org", 80)):
    try: print(socket.create_connection(address, timeout=2))
    except OSError: pass
"""
    assert attack(program).stdout == "[(1, 'lo')]\n"


def test_home_project_and_other_files_cannot_be_read(attack, tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    (tmp_path / "secret").write_text("secret")
    files = [
        str(tmp_path / "secret"),
        str(ROOT / "README.md"),
        __file__,
        "/etc/passwd",
        "/etc/hostname",
        "/proc/1/environ",
    ]
    folders = ["/home", "/root", "/proc", "/sys", "/run", "/var", str(Path.home()), str(ROOT), str(tmp_path)]
    program = f"""
for path in {files!r}:
    try: print(open(path).read())
    except OSError: pass
for name in {folders!r}:
    try: print(os.listdir(name))
    except OSError: pass
print(sorted(os.listdir("/")), os.listdir("/tmp"))
"""
    listing, private = attack(program).stdout.strip().rsplit(" ", 1)  # one line: nothing was printed before it
    assert set(json.loads(listing.replace("'", '"'))) <= {"bin", "dev", "etc", "sbin", "tmp", "usr", *LIBRARIES}
    assert private == "[]"


def test_nothing_outside_can_be_written(attack, tmp_path):
    tmp_path.chmod(0o777)
    folders = [
        str(tmp_path),
        str(ROOT),
        "/",
        "/usr",
        "/usr/lib",
        "/usr/bin",
        "/etc",
        "/dev",
        "/dev/shm",
        "/var/tmp",
        "/run",
    ]
    name = f"written{os.getpid()}"
    program = f"""
for folder in {folders!r}:
    try:
        open(folder + "/{name}", "w")
        print(folder)
    except OSError: pass
open("/tmp/{name}", "w")
"""
    assert attack(program).stdout == ""
    assert not [folder for folder in [*folders, "/tmp"] if os.path.exists(f"{folder}/{name}")]


def test_a_daemon_ends_with_the_run_that_made_it(attack):
    seconds = f"1000{os.getpid()}"  # shows in the command line of the sleeper
    program = f"""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.execvp("sleep", ["sleep", "{seconds}"])
    os._exit(0)
time.sleep(0.5)
print("done")
"""
    with sampled(lambda: len(alive(seconds))) as counts:
        result = attack(program)
    assert (result.status, result.stdout) == ("ok", "done\n")
    assert max(counts) >= 1
    assert gone(seconds)


def test_runs_end_when_the_process_that_started_them_is_killed():
    program = (
        "from components.rewards import Sandbox\n"
        "Sandbox(wall_seconds=60, memory_mb=517).run('import time; time.sleep(60)')"
    )
    token = str(517 << 20)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as trainer:
        deadline = time.monotonic() + 60
        seen = 0
        while seen < 5 and time.monotonic() < deadline:  # the probe's run comes and goes
            seen = seen + 1 if alive(token) else 0
            time.sleep(0.1)
        trainer.kill()
    assert seen == 5
    assert gone(token)


def test_a_crash_in_c_ends_only_its_own_process(attack):
    assert attack("ctypes.string_at(0)").returncode == 128 + signal.SIGSEGV


def test_privileges_cannot_be_had_by_system_calls(attack):
    program = """
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid() == 0, libc.setuid(0), libc.setgid(0), libc.unshare(0x10000000), libc.unshare(0x20000))
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"), libc.ptrace(16, 1, 0, 0))
print(libc.prctl(39, 0, 0, 0, 0))  # PR_GET_NO_NEW_PRIVS: setuid programs give none either
import resource
for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
    try: resource.setrlimit(kind, (-1, -1)); print("raised")
    except ValueError: pass
"""
    assert attack(program).stdout == "False -1 -1 -1 -1\n-1 -1 -1\n1\n"


def test_environment_and_open_files_of_the_trainer_are_not_there(attack, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    with open(tmp_path / "held", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
print("SECRET_TOKEN" in os.environ, len(os.environ))
for fd in range(3, 64):
    try: print(fd, os.readlink(f"/dev/fd/{fd}"), os.fstat(fd))
    except OSError: pass
    try: os.write(fd, b"secret")
    except OSError: pass
"""
        assert attack(program).stdout.startswith("False 6\n")
        assert file.read() == ""


# ------------------------------------------------------------------------------------------------- constructor


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"isolation": "docker"}, "bubblewrap, rlimits_only"),
        ({"memory_mb": 0}, "memory_mb is 0"),
        ({"memory_mb": 4}, "cannot run a program"),
        ({"python": "/nowhere/python3"}, "cannot run a program"),
    ],
)
def test_what_cannot_work_is_refused_when_built(sandbox, options, said):
    with pytest.raises(ValueError, match=said):
        Sandbox(**options)


def test_a_missing_bubblewrap_is_named_with_its_package(monkeypatch, tmp_path):
    (tmp_path / "setpriv").write_text("")
    (tmp_path / "setpriv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get install bubblewrap"):
        Sandbox()


def test_a_bubblewrap_that_does_not_isolate_is_found_out(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/bash\nwhile [ "$1" != --seccomp ]; do shift; done\nshift 2\nexec "$@"\n')
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="did not contain a hostile program"):
        Sandbox()


def test_limits_alone_must_be_asked_for_by_name_and_are_warned_of():
    with pytest.warns(UserWarning, match="rlimits_only"):
        weak = Sandbox(isolation="rlimits_only", cpu_seconds=1, wall_seconds=5)
    assert weak.run("print(1)").stdout == "1\n"
    assert weak.run("bytearray(1 << 33)").status == "error"
    assert weak.run("while True: pass").status == "timeout"
