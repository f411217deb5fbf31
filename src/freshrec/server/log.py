"""The log of the server: lines of JSON on standard error, which never contain the id of a user or an item."""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path


def log_line(line: str) -> None:
    """Write a line of JSON to standard error. It must never contain an id of a user or an item."""
    sys.stderr.write(json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": line}) + "\n")
    sys.stderr.flush()


def log_errors_without_text(logger: logging.Logger) -> None:
    """Log the exceptions of `logger` as their type and place, because their text may contain an id."""
    logger.addFilter(_replace_exception)


def _replace_exception(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if error is None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    log_line(f"Internal error: {type(error).__name__} at {place}.")
    return False
