"""One run at a time in an output folder, for as long as its process lives."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger(__name__)

# What file systems answer that cannot lock.
_CANNOT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_held: dict[Path, int] = {}  # by this process, or by the one that it was forked from


class Lock:
    """Holds a folder, or a file, that one run writes to.

    The lock belongs to the process, not to its children, and goes with it however it ends: after `kill -9` the same
    command may be given again at once. Where the file system cannot lock, a warning says so.

    Args:
        target: a folder, made if need be, or a file in it.
        held: False in the processes of a run that leave the lock to the main one.
        is_file: the target is a file: others in the same folder may be written at the same time.

    Raises:
        ValueError: another run holds it.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, target: str | Path, held: bool = True, *, is_file: bool = False):
        target = Path(target)
        lock = target / ".lock"
        if is_file:
            lock = target.with_name(f".{target.name}.lock")
        self._path = lock.absolute()
        self._file = -1  # the open lock, once this process has it
        if held:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire(target)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the target go; it may be called again."""
        if self._file < 0 or _held.get(self._path) != os.getpid():
            return
        if _is_there(self._path, self._file):
            self._path.unlink(missing_ok=True)  # while it is still held: whoever waits for it looks whether it is there
        os.close(self._file)
        self._file = -1
        del _held[self._path]

    def _acquire(self, target: Path) -> None:
        # A process is never in its own way, and would lose the lock by opening and closing the file a second time.
        if _held.get(self._path) == os.getpid():
            raise ValueError(_refusal(target, f"process {os.getpid()}, which is this one"))
        while self._file < 0:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Whoever has the lock has written down who it is.
                holder = os.pread(file, 200, 0).decode(errors="replace").strip()
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(_refusal(target, holder or "a process that has not said which")) from error
                if error.errno not in _CANNOT:
                    raise
                logger.warning("%s cannot be locked here: see that no other run writes to it", target)
                return
            if _is_there(self._path, file):
                self._file = file
            else:  # its holder has just removed it: the next one makes a new file
                os.close(file)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        _held[self._path] = os.getpid()


def _refusal(target: Path, holder: str) -> str:
    return (
        f"{target} is being written by another process ({holder}): wait for it or end it, or pass another output folder"
    )


def _is_there(path: Path, file: int) -> bool:
    """Return whether an open file is the one at a path: its name may have been removed, and given to another, since."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
