"""What every script does around its `main`: logging, and one-line errors that name the fix."""

import logging
import os
import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `ValueError` becomes one line on stderr and exit status 1.

    With `SIQ_VL_DEBUG=1` in the environment the error is raised with its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "datasets", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write(
            "\ninterrupted; training goes on from its last checkpoint when the same command is given again\n"
        )
        sys.exit(130)
    except ValueError as error:
        if os.environ.get("SIQ_VL_DEBUG") == "1":
            raise
        # An error in a loader process arrives with that process's traceback before it.
        line = " ".join(str(error).rpartition("\nValueError: ")[2].split())
        sys.exit(f"error: {line}")


def say(text: str, process: int = 0) -> None:
    """Write a command's own output, from the first of its processes alone."""
    if process == 0:
        sys.stdout.write(text + "\n")
