"""Hostile programs in the sandbox. What they could not do is looked at from outside, never asked of them alone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from components.rewards import Sandbox, SandboxError, UnitTests
from components.rewards.isolation import bubblewrap, shared_python
from tests.unit.hostile import DAEMON_SECONDS, HOSTILE, START

ROOT = Path(__file__).parents[2]
LIBRARIES = {"lib", "lib32", "lib64", "libx32"}


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
        result = attack(HOSTILE["forks without end"])
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
        result = attack(HOSTILE["takes all memory"])
    assert result.status in ("error", "timeout")  # whichever is first
    assert (16 << 20) < max(sizes) < sandbox.limits[1] + (64 << 20)  # bubblewrap and all
    assert "MemoryError" in attack("bytearray(1 << 33)").stderr


def test_files_stay_within_the_size_of_the_private_disk(attack):
    assert 8 <= int(attack(HOSTILE["fills the disk"]).stdout) <= 16
    assert not list(Path("/tmp").glob("ebft-disk-*"))


def test_memory_that_no_limit_counts_is_refused(attack):
    assert attack(HOSTILE["takes memory that no limit counts"]).stdout == "-1 1\n-1 1\nno memfd\n"


def test_a_flood_of_output_is_cut_and_stopped(sandbox, attack):
    result = attack(HOSTILE["floods the output"])
    assert result.status == "output"
    assert len(result.stdout) + len(result.stderr) == sandbox.output_bytes


def test_an_endless_loop_ends_by_processor_time(attack):
    result = attack(HOSTILE["computes without end"])
    assert result.status == "timeout"
    assert result.returncode in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


def test_ignoring_the_signal_of_processor_time_does_not_help(attack):
    result = attack(HOSTILE["ignores the end of its time"])
    assert result.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("name", ["sleeps", "closes all and sleeps"])
def test_a_sleeper_ends_by_wall_clock(attack, name):
    assert attack(HOSTILE[name]).status == "timeout"


def test_endless_recursion_is_an_error(attack):
    assert attack(HOSTILE["calls itself without end"]).status == "error"
    assert attack(HOSTILE["calls itself beyond the stack"]).status in ("error", "timeout")


# ------------------------------------------------------------------------------------------ reaching for others


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith("kills")])
def test_signals_reach_no_process_outside(sandbox, attack, name):
    prefix = sandbox.command("run", filter_fd=0)
    user = prefix[: next(i for i, word in enumerate(prefix) if word.endswith("bwrap"))]
    with subprocess.Popen([*user, "sleep", "60"]) as bystander:  # of the same user
        attack(HOSTILE[name])
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
    assert attack(HOSTILE["looks for the network"]).stdout == "[(1, 'lo')]\n"


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


def test_of_the_system_only_programs_and_libraries_are_seen(attack):
    program = """
import zoneinfo
print(zoneinfo.ZoneInfo("Europe/Berlin"))
print(json.dumps([os.listdir("/usr"), os.listdir("/usr/share")]))
for name in ("/usr/src", "/usr/local/src", "/usr/include", "/sbin"):
    try: print(os.listdir(name))
    except OSError: pass
"""
    zone, listings = attack("import json\n" + program).stdout.splitlines()  # nothing was printed after them
    system, shared = json.loads(listings)
    assert zone == "Europe/Berlin"
    assert set(system) <= {"bin", "local", "share", *LIBRARIES}
    assert shared == ["zoneinfo"]


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
    with sampled(lambda: len(alive(DAEMON_SECONDS))) as counts:
        result = attack(HOSTILE["leaves a daemon"])
    assert (result.status, result.stdout) == ("ok", "done\n")
    assert max(counts) >= 1
    assert gone(DAEMON_SECONDS)


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
    assert attack(HOSTILE["crashes in C"]).returncode == 128 + signal.SIGSEGV


def test_privileges_cannot_be_had_by_system_calls(attack):
    assert attack(HOSTILE["asks for privileges"]).stdout == "False -1 -1 -1 -1\n-1 -1 -1\n1\n"


def test_environment_and_open_files_of_the_trainer_are_not_there(attack, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    with open(tmp_path / "held", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        assert attack(HOSTILE["looks for secrets"]).stdout.startswith("False 6\n")
        assert file.read() == ""


# ------------------------------------------------------------------------------------------------- constructor


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"isolation": "docker"}, "bubblewrap, rlimits_only"),
        ({"memory_mb": 0}, "memory_mb is 0"),
        ({"memory_mb": 4}, "cannot run a program"),
        ({"python": "/nowhere/bin/python3"}, "cannot run a program"),
        ({"python": "/python3"}, "its prefix / holds"),
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


@pytest.fixture
def bwrap(sandbox, monkeypatch, tmp_path):
    """Puts a shell script in bubblewrap's place; the real one is ``$BWRAP``."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    real = shutil.which("bwrap")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(script):
        fake = tmp_path / "bwrap"
        fake.write_text(f"#!/bin/bash\nBWRAP={real}\n{script}\n")
        fake.chmod(0o755)
        return fake

    return write


TO_THE_FILTER = 'while [ "$1" != --seccomp ]; do shift; done\n'


def test_a_bubblewrap_that_does_not_isolate_is_found_out(bwrap):
    bwrap(f'{TO_THE_FILTER} shift 2; exec "$@"')
    with pytest.raises(ValueError, match="did not contain a hostile program .*list .*read .*write .*connect"):
        Sandbox()


def test_a_bubblewrap_that_shows_files_is_found_out_though_it_is_offline_and_shows_them_read_only(bwrap):
    bwrap(f'{TO_THE_FILTER} exec "$BWRAP" --unshare-all --ro-bind / / "$@"')
    with pytest.raises(ValueError, match=r"did not contain a hostile program \(list [^;]*read [^;]*\)") as caught:
        Sandbox()
    assert "write" not in str(caught.value)
    assert "connect" not in str(caught.value)


def test_looking_for_leaks_leaves_no_file_behind(sandbox, monkeypatch, tmp_path):
    for name in ("home", "project"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "project")
    Sandbox()
    assert [path for name in ("home", "project") for path in (tmp_path / name).iterdir()] == []


def opened(python):
    command = bubblewrap(str(python), disk_bytes=1)
    return {command[i + 1] for i, word in enumerate(command) if word == "--ro-bind"}


def test_of_an_interpreters_prefix_only_programs_and_libraries_are_opened(sandbox, tmp_path):
    for name in ("bin", "lib", "lib64", "share", "src"):
        (tmp_path / name).mkdir()
    inside = {path for path in opened(tmp_path / "bin" / "python3") if path.startswith(str(tmp_path))}
    assert inside == {str(tmp_path / name) for name in ("bin", "lib", "lib64")}


@pytest.mark.parametrize("private", ["home", "project"])
@pytest.mark.parametrize("where", [".", "below/it"])
def test_an_interpreter_beside_home_or_project_is_refused(sandbox, monkeypatch, tmp_path, private, where):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HOME", str(folder if private == "home" else "/nowhere"))
    monkeypatch.chdir(folder if private == "project" else "/")
    with pytest.raises(ValueError, match=f"its prefix {tmp_path} holds {folder.resolve()}, which generated code must"):
        bubblewrap(str(tmp_path / "bin" / "python3"), disk_bytes=1)


def test_a_project_in_the_systems_src_is_no_matter_and_one_among_its_libraries_is(sandbox, monkeypatch):
    monkeypatch.setenv("HOME", "/usr/src/app")
    assert "/usr/lib" in opened("/usr/bin/python3")
    assert not any(path.startswith("/usr/src") for path in opened("/usr/bin/python3"))
    monkeypatch.setenv("HOME", "/usr/lib/app")
    with pytest.raises(ValueError, match="its prefix /usr holds /usr/lib/app"):
        opened("/usr/bin/python3")


def test_an_own_interpreter_among_private_files_gives_way_to_the_systems(sandbox, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    shutil.copy(sandbox.python, tmp_path / "bin" / "python3")
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert shared_python() == str(tmp_path / "bin" / "python3")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not shared_python().startswith(str(tmp_path))


# ------------------------------------------------------------------------------------- failures that are our own

WORKS = 'exec "$BWRAP" "$@"'


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        ("exit 0", "exit code 0"),
        ("kill -9 $$", "exit code -9"),
        (None, "No such file"),
    ],
)
def test_a_sandbox_that_stops_working_scores_nothing_and_says_so(bwrap, script, said):
    bwrap(WORKS)
    broken = Sandbox(workers=1)
    file = bwrap(script)
    if script is None:
        file.unlink()
    record = {"tests": [{"expression": "f()", "expected": "1"}]}
    check = {"entry_point": "f", "check": "def check(candidate): assert candidate() == 1"}
    for call in (
        lambda: broken.run("print(1)"),
        lambda: UnitTests(sandbox=broken)(["def f(): return 1"], [record]),
        lambda: UnitTests(sandbox=broken)(["def f(): return 1"], [check]),
    ):
        with pytest.raises(
            SandboxError, match=f"the sandbox cannot run a program with .*{said}.*; it needs bubblewrap"
        ):
            call()


def test_a_program_that_never_starts_is_an_error_of_ours(bwrap, monkeypatch):
    bwrap(WORKS)
    late = Sandbox()
    bwrap("sleep 100")
    monkeypatch.setattr("components.rewards.process.START_SECONDS", 0.3)
    with pytest.raises(SandboxError, match="it did not start within"):
        late.run("print(1)")


def test_the_time_of_a_program_begins_when_it_does(bwrap):
    bwrap(WORKS)
    slow = Sandbox(wall_seconds=2)
    bwrap(f"sleep 3; {WORKS}")
    assert slow.run("print(1)").stdout == "1\n"
    assert slow.run("import time; time.sleep(100)").status == "timeout"


def test_programs_that_end_at_once_have_started(sandbox):
    programs = ["def f(:", "import os\nos._exit(0)", "import os\nos.abort()", "\0", "print('x' * 200_000)"]
    statuses = [result.status for result in sandbox.map(programs)]
    assert statuses == ["error", "ok", "error", "error", "output"]


def test_limits_alone_must_be_asked_for_by_name_and_are_warned_of():
    with pytest.warns(UserWarning, match="rlimits_only"):
        weak = Sandbox(isolation="rlimits_only", cpu_seconds=1, wall_seconds=5)
    assert weak.run("print(1)").stdout == "1\n"
    assert weak.run("bytearray(1 << 33)").status == "error"
    assert weak.run("while True: pass").status == "timeout"
