"""A result file: what ran where, and its rows. It is replaced as a whole after every case, so that a cut-off run still counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

FORMAT = 1


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict:
    """ValueError, in one line, for a file that is none."""
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path}: wanted a JSON result file of these benchmarks") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT or "machine" not in result:
        raise ValueError(f"{path}: wanted a result file of format {FORMAT} with a machine")
    return result
