"""What every script does around its `main`: logging, and one-line errors that name the fix."""

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# Values of the Trainer's own `--debug`, which is left to it.
_TRAINER_DEBUG = ("underflow_overflow", "tpu_metrics_debug")

# Libraries written in other languages tell of these by their words alone.
_DISK = {
    errno.ENOSPC: ("No space left on device", "the disk is full: free some space, or pass another folder"),
    errno.EDQUOT: ("Disk quota exceeded", "the quota of this disk is used up: free some space, or pass another folder"),
    errno.EFBIG: ("File too large", "the file is larger than allowed here: raise the limit, or pass another folder"),
    errno.EROFS: ("Read-only file system", "the folder is on a read-only file system: pass another one"),
    errno.EACCES: ("Permission denied", "this user has no permission: change the folder's, or pass another one"),
}
_TORCH_WRITER = ("PytorchStreamWriter failed writing", "basic_ios::clear: iostream error")


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error that our own code raises for bad input becomes one line and exit status 1.

    So does a disk that is full or may not be written. Every other error keeps its traceback. With `--debug` among the
    arguments, or `SIQ_VL_DEBUG=1` in the environment, all do, in the commands that the script starts too.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "datasets", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if _take_debug(sys.argv):
        os.environ["SIQ_VL_DEBUG"] = "1"
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write(
            "\ninterrupted; training goes on from its last checkpoint when the same command is given again\n"
        )
        sys.exit(130)
    except Exception as error:
        line = _about_the_disk(error) or _about_the_input(error)
        if line is None or os.environ.get("SIQ_VL_DEBUG") == "1":
            raise
        sys.exit(f"error: {' '.join(line.split())}")


def say(text: str, process: int = 0) -> None:
    """Write a command's own output, from the first of its processes alone."""
    if process == 0:
        sys.stdout.write(text + "\n")


def _take_debug(arguments: list[str]) -> bool:
    """Take `--debug` out of a command line, unless it is the Trainer's own, which has a value."""
    for place, argument in enumerate(arguments):
        if argument == "--debug" and arguments[place + 1 : place + 2] not in [[value] for value in _TRAINER_DEBUG]:
            del arguments[place]
            return True
    return False


def _about_the_input(error: Exception) -> str | None:
    """Return what an error says that our own code raised for bad input; None for any other."""
    if not isinstance(error, ValueError):
        return None
    text = str(error)
    # An error in a loader process arrives with that process's traceback before it, as text.
    before, _, last = text.rpartition("\nValueError: ")
    if before:
        frames = re.findall(r'^ *File "([^"\n]+)", line \d+.*\n *(.*)', before, flags=re.MULTILINE)
    else:
        frames = [(frame.filename, frame.line or "") for frame in traceback.extract_tb(error.__traceback__)[-1:]]
        last = text
    # Ours is what a `raise` of ours says; what fails inside a statement of ours (torch's errors, for one) is not.
    ours = bool(frames) and _is_our_file(frames[-1][0]) and frames[-1][1].startswith("raise ")
    return last if ours else None


def _is_our_file(name: str) -> bool:
    """Return whether a file is one of this project: in the package, or beside it in the repository."""
    path = Path(name).resolve()
    return path.is_relative_to(_PACKAGE) or path.parent == _PACKAGE.parent


def _about_the_disk(error: BaseException) -> str | None:
    """Return what is wrong with the disk where that is what an error, or one behind it, is about."""
    for cause in _chain(error):
        text = str(cause)
        if isinstance(cause, OSError) and cause.errno in _DISK:
            # Without a file it is about something else, a port for one.
            if cause.filename is None and cause.errno == errno.EACCES:
                continue
            named = f"{cause.filename}: " if cause.filename else ""
            return f"{named}{_DISK[cause.errno][1]} ({cause.strerror})"
        if isinstance(cause, ValueError):
            continue  # input that happens to speak of it
        for number, (words, advice) in _DISK.items():
            if f"{words} (os error {number})" in text or f"[Errno {number}]" in text:
                return f"{advice} ({text})"
        if any(words in text for words in _TORCH_WRITER):
            return (
                f"a checkpoint could not be written: is the disk full? Free some space, or pass another folder ({text})"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
