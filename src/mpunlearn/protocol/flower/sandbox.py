"""Confines a process to a few folders, and its port to its own user.

The idea: Flower's programs and the gateway read what strangers and clients send, and run as the same user as the
program that holds the secret. Two mechanisms of Linux, which need no privileges, keep them apart. With *Landlock*, a
process gives up access to all files except those below some folders, for good and for all its children; it can then
neither read nor trace the processes outside nor, from Linux 6.12 on, signal them. And the kernel's table of connections
(/proc/net/tcp) names the owner of each local connection, so a server on the loopback address can turn other users away.
Flower authenticates neither the users of its control API nor those who read a task's token from a command line; this
does.

Not covered: connections that a confined process makes, and processes of the same user that are not confined.
"""

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on all architectures."""
_NO_NEW_PRIVILEGES = 38
_CAPABILITIES_VERSION = 0x20080522
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_LATER = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights that a later version of Landlock added: to move files between folders, to truncate, and to control devices."""
_OF_FILES = _EXECUTE | _WRITE | _READ | _LATER[3] | _LATER[5]
"""Rights that apply to a file; all others apply to folders."""
_PLANTED = 1 << 6 | 1 << 10 | 1 << 11 | 1 << 12
"""Rights to make devices, pipes and symbolic links, which nobody gets: the programs outside use the same folders."""
_SCOPES = 3
"""Since version 6: no signals and no abstract Unix sockets to processes outside."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix", "/etc", "/proc", "/sys")
"""Where programs and libraries are."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_ESTABLISHED = "01"
_TABLES = {4: Path("/proc/net/tcp"), 16: Path("/proc/net/tcp6")}
"""The kernel's connections, by the length of an address."""


def version() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, 1)))


def confine(read: Iterable[Path], write: Iterable[Path]) -> bool:
    """Gives up access to all files except those below some folders. Call it before any thread is started.

    Python and the system's programs remain readable, as long as no folder that holds them also holds one of `write`:
    that one may hold secrets, too.

    Args:
        read: further files and folders to read and execute.
        write: folders to read and change.

    Returns:
        Whether the kernel could do this; if not, nothing has changed.

    Raises:
        OSError: the kernel refuses, although it has Landlock.
    """
    if not (number := version()):
        return False
    changed = [path.resolve() for path in write]
    handled = (1 << 13) - 1 | sum(right for since, right in _LATER.items() if since <= number)
    fields = (handled, 0, _SCOPES)[: 1 if number < 4 else 2 if number < 6 else 3]
    ruleset = _call(_CREATE_RULESET, struct.pack(f"{len(fields)}Q", *fields), 8 * len(fields), 0)
    try:
        libraries = {Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.path)}
        for path in libraries:
            if path.is_absolute() and not any(folder.is_relative_to(path.resolve()) for folder in changed):
                _allow(ruleset, path, _EXECUTE | _READ | _LIST)
        for path in [*map(Path, SYSTEM), Path(__file__).parents[2], *read]:
            _allow(ruleset, path, _EXECUTE | _READ | _LIST)
        for path in map(Path, DEVICES):
            _allow(ruleset, path, _READ | _WRITE)
        for path in changed:
            _allow(ruleset, path, handled & ~_PLANTED)
        if ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")
        _call(_RESTRICT_SELF, ruleset, 0)
        _drop_capabilities()
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: Path, rights: int) -> None:
    """Adds a rule for a file or folder, unless it does not exist."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights &= -1 if path.is_dir() else _OF_FILES
        _call(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _drop_capabilities() -> None:
    """Gives up what root may do beyond its own files, such as reading the environment of other processes."""
    header, nothing = struct.pack("=Ii", _CAPABILITIES_VERSION, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset failed")


def _call(number: int, *arguments: Any) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock's system call {number} failed: {os.strerror(ctypes.get_errno())}")
    return result


def owner(client: tuple[Any, ...], server: tuple[Any, ...]) -> int | None:
    """The user at the other end of a connection within this machine; None if the kernel does not say.

    Args:
        client: address and port of the end that connected.
        server: address and port of the end that accepted the connection.
    """
    try:
        ends = [_entry(end) for end in (client, server)]
        table = _TABLES[len(_packed(client[0]))].read_text()
    except (OSError, ValueError, IndexError):
        return None
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == [*ends, _ESTABLISHED] and fields[9] != "0":  # 0: the process has closed it
            return int(fields[7])
    return None


def knows_owners() -> bool:
    """Whether this system says who is at the other end of a connection."""
    return _TABLES[4].is_file()


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def _entry(end: tuple[Any, ...]) -> str:
    """An address and a port as in the kernel's table: words in the machine's byte order."""
    packed = _packed(end[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{end[1]:04X}"
