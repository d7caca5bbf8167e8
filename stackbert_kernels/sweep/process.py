"""A process for one piece of work, which is given to it as a file.

    python -m stackbert_kernels.sweep.process WORK.json RESULT.json

It ends as a run does, its step finished and saved, on SIGTERM and when the process that began it is gone: that one holds its stdin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from stackbert_kernels.sweep.work import perform, work_of
from stackbert_kernels.train.run_directory import write_json


def main() -> None:
    given, result = (Path(argument) for argument in sys.argv[1:])
    read = json.loads(given.read_text(encoding="utf-8"))
    if hasattr(os, "sched_setaffinity"):  # before torch is loaded, which counts the cores
        os.sched_setaffinity(0, read["cores"])
    end_with_the_one_that_began()
    write_json(result, perform(work_of(read["work"])))


def end_with_the_one_that_began() -> None:
    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
