"""Runs one Python program that nobody has read, and tells how it ended. `sandbox.py` starts this file as a script.

It imports nothing of ours, so that it starts in milliseconds. Three processes: the *supervisor* leaves the host's
namespaces and builds a file system; *init* is process 1 in there, so that nothing outlives it; the *worker* gives up
its rights and runs the program. Without namespaces, init is left out.

Standard input has a JSON object: program, secret, limits, isolated. Standard output gets one: the secret with "setup",
why the jail could not be built; or with "error", null or why the program failed, once it came to its end. A program
that ends its process leaves it empty. The status is the worker's, 128 and a signal's number where that ended it.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/usr", "/nix")
"""What a Python may load libraries from; its own folder comes on top."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK = "/work"

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    # The program must not reach it under a number that it may guess.
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    try:
        if job["isolated"]:
            _leave_namespaces()
            _build_root(os.getcwd(), job["limits"]["file_bytes"])
    except OSError as error:
        _say(answer, {"secret": job["secret"], "setup": str(error)})
        os._exit(1)
    if child := os.fork():
        _end_as(child)
    if job["isolated"]:
        _die_with_parent()
        if worker := os.fork():
            _end_as(worker)
    _work(job, answer)


def _end_as(child: int) -> NoReturn:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _work(job: dict[str, Any], answer: int) -> NoReturn:
    try:
        _give_up_rights(job["limits"])
    except (OSError, ValueError) as error:
        _say(answer, {"secret": job["secret"], "setup": str(error)})
        os._exit(1)
    timers = ((signal.ITIMER_PROF, "seconds"), (signal.ITIMER_REAL, "wall_seconds"))
    for timer, limit in timers:
        signal.setitimer(timer, job["limits"][limit])
    outcome = _outcome(job["program"])
    for timer, _ in timers:
        signal.setitimer(timer, 0)
    _say(answer, {"secret": job["secret"], "error": outcome})
    os._exit(0)


def _outcome(program: str) -> str | None:
    """None if it runs to its end. SystemExit is a failure: checks stand at the end of a program."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        # Its message may be long, or raise itself.
        with contextlib.suppress(BaseException):
            return f"{type(error).__name__}: {error}"[:200]
        return type(error).__name__
    return None


def _say(answer: int, what: dict[str, Any]) -> None:
    os.write(answer, json.dumps(what).encode())


def _leave_namespaces() -> None:
    """Of mounts, processes, network, IPC and host name. Root can do so itself, others as root of a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    apart = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if uid == 0:
        _check(libc.unshare(apart), "unshare")
        return
    _check(libc.unshare(apart | CLONE_NEWUSER), "unshare")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def _build_root(at: str, most_bytes: int) -> None:
    """A root of libraries that cannot be written to, four devices, and an empty folder in memory, which is the only
    place to write."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", at, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    python = os.path.realpath(sys.base_prefix)
    inside = any(os.path.commonpath([python, os.path.realpath(top)]) == os.path.realpath(top) for top in SYSTEM)
    for path in (*SYSTEM, *([] if inside else [python])):
        _bind(path, at)
    for path in DEVICES:
        target = at + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT, 0o644))
        _mount(path, target, None, MS_BIND)
    os.makedirs(at + WORK)
    _read_only(at)
    _mount("tmpfs", at + WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"size={most_bytes},mode=777")
    os.chdir(at)
    number = SYS_PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"not known how to change the root on {platform.machine()}")
    # The old root lies on the new one, until it is taken away.
    _check(libc.syscall(number, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir(WORK)


def _bind(path: str, at: str) -> None:
    target = at + path
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
    elif os.path.isdir(path):
        os.makedirs(target)
        _mount(path, target, None, MS_BIND | MS_REC)


def _read_only(path: str) -> None:
    """With all that is mounted in it."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    done = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    _check(done, "mount_setattr")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(libc.mount(*given, ctypes.c_ulong(flags), options.encode() if options else None), f"mount {target}")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _give_up_rights(limits: dict[str, int]) -> None:
    """Root becomes nobody; all lose what a namespace's root may do, and the way back."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if sys.platform == "linux":
        capability = 0
        while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        _check(libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()), "capset")
        _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # A change of user takes this away.
    _die_with_parent()
    for name, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["kernel_seconds"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (most, most))


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
