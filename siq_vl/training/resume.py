"""Which checkpoint a run goes on from: the last one that is known to be whole.

A trainer's checkpoint is a folder of files that are written one by one. Once all are there, a marker is written last
that lists them with their sizes; a folder without it, or with other sizes, was left by a run that was killed.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MARKER = "complete.json"


def mark_complete(checkpoint: Path, step: int, settings: dict[str, Any]) -> None:
    """Write the marker of a checkpoint whose files are all there.

    Args:
        checkpoint: the folder.
        step: the optimizer step it was taken after.
        settings: what must be the same for a run to go on from here.
    """
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARKER:
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # on disk before the marker says so
            files[str(path.relative_to(checkpoint))] = path.stat().st_size
    scratch = checkpoint / f".{MARKER}"
    scratch.write_text(json.dumps({"step": step, "settings": settings, "files": files}, indent=1, default=str))
    os.replace(scratch, checkpoint / MARKER)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has its marker, and every file the marker lists, in full."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of a run, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is whole."""
    return next(filter(is_complete, _checkpoints(folder)), None)


def discard_incomplete(folder: Path) -> None:
    """Remove the checkpoints that a killed run left half-written."""
    for checkpoint in _checkpoints(folder):
        if not is_complete(checkpoint):
            logger.warning("%s is not complete: a run was ended while it was being written; removing it", checkpoint)
            shutil.rmtree(checkpoint)


def checkpoint_to_resume(folder: Path, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> Path | None:
    """Return the checkpoint that a run with these settings goes on from.

    Args:
        folder: of the run.
        settings: what must be the same.
        defaults: what settings were that a checkpoint does not name: one of a version that did not know them.

    Raises:
        ValueError: the folder's checkpoint was made with other settings.
    """
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return None
    marker = json.loads((checkpoint / MARKER).read_text())
    before = {**(defaults or {}), **marker["settings"]}
    now = json.loads(json.dumps(settings, default=str))  # as the marker would hold them
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        name = changed[0]
        raise ValueError(
            f"{checkpoint} was made with {name} = {before.get(name)!r}, and now it is {now.get(name)!r} ({len(changed)} "
            "settings differ): pass another --output_dir, or remove the checkpoints to start anew"
        )
    logger.info("going on from %s, after step %d", checkpoint, marker["step"])
    return checkpoint
