"""Programs that take too much or reach for what is not theirs; each is looked at from outside, and each scores nothing."""

import os

START = "import ctypes, os, signal, socket, subprocess, sys, time\n"
DAEMON_SECONDS = f"1000{os.getpid()}"  # shows in the command line of the sleeper

# Each runs behind START.
HOSTILE = {
    "forks without end": "while True:\n    try: os.fork()\n    except OSError: pass",
    "takes all memory": "kept = []\nwhile True: kept.append(b'x' * (1 << 22))",
    "takes memory that no limit counts": """
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0, 4096, 0o1600), ctypes.get_errno())
print(libc.msgget(0, 0o1600), ctypes.get_errno())
try: os.memfd_create("x")
except PermissionError: print("no memfd")
""",
    "fills the disk": """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
total = 0
for number in range(50):
    try:
        with open(f"/tmp/ebft-disk-{number}", "wb", buffering=0) as file:
            for _ in range(50):
                total += file.write(bytes(1 << 20))
    except OSError: pass
print(total >> 20)
""",
    "floods the output": "while True:\n    print('x' * 1000)\n    print('y' * 1000, file=sys.stderr)",
    "floods the channel": """
while True:
    for fd in range(3, 64):
        try: os.write(fd, b"x" * 4096)
        except OSError: pass
""",
    "says that it is ready": """
for fd in range(3, 64):
    try: os.write(fd, b"READY\\n" * 3)
    except OSError: pass
os._exit(0)
""",
    "computes without end": "while True: pass",
    "ignores the end of its time": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "sleeps": "time.sleep(100)",
    "closes all and sleeps": "sys.stdout.close(); os.closerange(0, 64); time.sleep(100)",
    "calls itself without end": "def f(): f()\nf()",
    "calls itself beyond the stack": "sys.setrecursionlimit(10**9)\ndef f(x): return [f([x])]\nf(1)",
    "nests too deep to be compiled": "x = " + "(" * 10_000 + "0" + ")" * 10_000,
    "kills all": "os.kill(-1, 9)",
    "kills its group": "os.killpg(0, 9)",
    "kills its parent": "os.kill(os.getppid(), 9)",
    "kills the first process": "os.kill(1, 9)",
    "crashes in C": "ctypes.string_at(0)",
    "leaves a daemon": f"""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.execvp("sleep", ["sleep", "{DAEMON_SECONDS}"])
    os._exit(0)
time.sleep(0.5)
print("done")
""",
    "looks for the network": """
print(socket.if_nameindex())
for address in (("1.1.1.1", 53), ("deb.debian.org", 80)):
    try: print(socket.create_connection(address, timeout=2))
    except OSError: pass
""",
    "looks for secrets": """
print("SECRET_TOKEN" in os.environ, len(os.environ))
for fd in range(3, 64):
    try: print(fd, os.readlink(f"/dev/fd/{fd}"), os.fstat(fd))
    except OSError: pass
    try: os.write(fd, b"secret")
    except OSError: pass
""",
    "asks for privileges": """
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid() == 0, libc.setuid(0), libc.setgid(0), libc.unshare(0x10000000), libc.unshare(0x20000))
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"), libc.ptrace(16, 1, 0, 0))
print(libc.prctl(39, 0, 0, 0, 0))  # PR_GET_NO_NEW_PRIVS: setuid programs give none either
import resource
for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC):
    try: resource.setrlimit(kind, (-1, -1)); print("raised")
    except ValueError: pass
""",
}
