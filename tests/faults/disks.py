"""Disks that fail: mounted in a child's own namespace, or made to fail by the library that stands before libc's."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18

#: Fails or holds `fsync` of one process, as its controls say.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <unistd.h>
static int calls, failing = -1;
static const char *held;
int fault_calls(void) { return calls; }
void fault_fail(int call) { calls = 0; failing = call; }
void fault_hold(const char *file) { held = file; }
int fsync(int descriptor) {
    while (held && access(held, F_OK) == 0) usleep(1000);
    if (__sync_add_and_fetch(&calls, 1) == failing) { errno = EIO; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, "fsync"))(descriptor);
}
"""


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _checked(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _own_namespace():
    """Let this process mount, for itself alone; needs no right but that of user namespaces."""
    user, group = os.getuid(), os.getgid()
    _checked(_libc().unshare(CLONE_NEWNS | CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _checked(_libc().mount(None, b"/", None, MS_REC | MS_PRIVATE, None))


def mount_small_disk(folder, num_bytes):
    """Mount an empty disk of some size over a folder, in this process."""
    _own_namespace()
    _checked(_libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={num_bytes}".encode()))


def make_read_only(folder):
    """Let nobody write to a disk that this process mounted any more."""
    _checked(_libc().mount(None, os.fsencode(folder), None, MS_REMOUNT | MS_RDONLY, None))


def why_nothing_can_be_mounted():
    """None if it can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux's namespaces"
    child = os.fork()
    if child == 0:
        try:
            _own_namespace()
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == 0 else f"this system does not let a process have its own mounts: {os.strerror(code)}"


def compiled_shim(folder):
    """The library, compiled; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
