"""compare.json and compare.png."""

from __future__ import annotations

import sys
from pathlib import Path

from stackbert_kernels.compare.figure import draw
from stackbert_kernels.config import ConfigError
from stackbert_kernels.train.run_directory import write_json

JSON, FIGURE = "compare.json", "compare.png"
WITHOUT_PLOT = "no compare.png without matplotlib: pip install stackbert-kernels[plot]"


def write(result: dict, out: Path) -> list[Path]:
    """Writes the comparison into the directory `out`; the figure where matplotlib is installed. Returns what was written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / JSON, result)
    except OSError as error:
        raise ConfigError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    try:
        picture = draw(result)
    except ImportError:
        (out / FIGURE).unlink(missing_ok=True)  # an earlier one would show an earlier state
        print(WITHOUT_PLOT, file=sys.stderr)
        return [out / JSON]
    (out / FIGURE).write_bytes(picture)
    return [out / JSON, out / FIGURE]
