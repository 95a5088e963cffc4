"""`GNA_DUMP=<folder>`: what became of each compiled graph, as files to read and to compare.

Each graph gets a numbered folder: `decisions.json`, the graph `before.txt`, and for each variant that
the phases lead to the graph `after-0.txt` and what changed, `change-0.diff`.

Several processes and threads may write to one folder. A graph is written under a hidden name first
and then renamed to the next free number, which one of them gets; so a numbered folder is complete.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from gna_compile.report.graph_text import unified_diff

if TYPE_CHECKING:
    from gna_compile.report.collect import GraphRecord

log = logging.getLogger("gna_compile")

VARIABLE = "GNA_DUMP"

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def folder() -> Path | None:
    """The folder that the environment names, if it names one."""
    name = os.environ.get(VARIABLE)
    return Path(name).expanduser() if name else None


def dump(record: GraphRecord) -> None:
    """Writes one graph if the environment asks for it. A folder that cannot be written is a warning."""
    into = folder()
    if into is None:
        return
    try:
        write(record, into)
    except OSError as error:
        log.warning("%s=%s: a graph was not written: %s", VARIABLE, into, error)


def write(record: GraphRecord, into: Path) -> Path:
    """Writes one graph to the next free number in `into`.

    Returns:
        The numbered folder.

    Raises:
        OSError: if a file or folder cannot be written.
    """
    unfinished = into / f".unfinished-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    try:
        for name, text in _files(record).items():
            (unfinished / name).write_text(text)
        return _numbered(unfinished)
    finally:
        # An interruption, too, leaves nothing behind.
        shutil.rmtree(unfinished, ignore_errors=True)


def _files(record: GraphRecord) -> dict[str, str]:
    decisions = {
        "process": os.getpid(),
        "variant_of_phase": record.variant_of_phase if record.after else {},
        "sites": [row.as_dict() for row in record.rows],
    }
    files = {
        "decisions.json": json.dumps(decisions, indent=2) + "\n",
        "before.txt": record.before + "\n",
    }
    for variant, after in enumerate(record.after):
        files[f"after-{variant}.txt"] = after + "\n"
        files[f"change-{variant}.diff"] = unified_diff(record.before, after) + "\n"
    return files


def _numbered(unfinished: Path) -> Path:
    """Renames a folder to the next free number; a number that somebody else takes is skipped."""
    into = unfinished.parent
    number = max((int(p.name) for p in into.iterdir() if p.name.isdecimal()), default=-1) + 1
    while True:
        try:
            # Fails where the target is a folder with files in it, as every numbered one is.
            return unfinished.rename(into / f"{number:04d}")
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            number += 1
