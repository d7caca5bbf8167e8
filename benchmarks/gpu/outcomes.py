"""A pytest plugin (`-p benchmarks.gpu.outcomes --outcomes FILE`): a line of JSON for each test as soon as it has ended."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

PASSED, FAILED, SKIPPED, LACKING = "passed", "failed", "skipped", "lacking"
OURS = ("stackbert_kernels", "benchmarks", "python_tests")  # if these lack a module, something is broken
LONGEST = 300  # characters of a message


def pytest_addoption(parser):
    parser.addoption("--outcomes", metavar="FILE", help="append the outcome of each test to FILE")


def pytest_configure(config):
    file = config.getoption("--outcomes")
    if file and not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to its controller
        config.pluginmanager.register(Outcomes(Path(file)))


class Outcomes:
    def __init__(self, path: Path):
        self.file = path.open("a", buffering=1)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.note(report, FAILED, _message(report))
        elif report.skipped:
            self.note(report, SKIPPED, _skip_reason(report))
        elif report.when == "call":
            self.note(report, PASSED)

    def pytest_collectreport(self, report):
        """A file whose imports this Python lacks is not run; that is said, and is no failure. Any other broken file is one."""
        if report.failed:
            message = _message(report)
            lacks = re.search(r"ModuleNotFoundError: No module named '(\w+)", message)
            self.note(report, LACKING if lacks and lacks[1] not in OURS else FAILED, message)

    def note(self, report, outcome: str, message: str = "") -> None:
        entry = {"test": report.nodeid, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
        self.file.write(json.dumps(entry | ({"message": message[:LONGEST]} if message else {})) + "\n")


def _message(report) -> str:
    """One line: what was raised. Of a collection error only text exists, whose last line it is."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
    return " ".join(text.removeprefix("E ").split())


def _skip_reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(reason.removeprefix("Skipped: ").split())


def read(path: Path) -> dict:
    """Counts, the failures with their messages, the reasons of skips; the last line of a killed run may be half."""
    entries = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    by_test: dict[str, dict] = {}
    for entry in entries:  # set-up, call and tear-down report each; the first failure tells the cause
        before = by_test.get(entry["test"], {}).get("outcome")
        if before is None or (before != FAILED and entry["outcome"] == FAILED):
            by_test[entry["test"]] = entry
    counts = Counter(entry["outcome"] for entry in by_test.values())
    failures = [f"{_short(e['test'])}: {e['message']}" for e in by_test.values() if e["outcome"] == FAILED]
    skips = Counter(e["message"] for e in by_test.values() if e["outcome"] == SKIPPED)
    lacking = sorted({e["message"] for e in by_test.values() if e["outcome"] == LACKING})
    slowest = sorted(by_test.values(), key=lambda e: -e["seconds"])[:10]
    text = ", ".join(f"{counts[outcome]} {outcome}" for outcome in (PASSED, FAILED, SKIPPED) if counts[outcome])
    return {
        "counts": dict(counts),
        "failures": failures,
        "skips": dict(skips.most_common()),
        "lacking": lacking,
        "explained": bool(lacking),  # pytest ends with 1 for a file that it could not import
        "slowest": {_short(e["test"]): e["seconds"] for e in slowest},
        "lines": [
            text or "no test has ended",
            *(f"{n} skipped: {reason}" for reason, n in skips.most_common(4)),
            *(f"files not run: {reason}" for reason in lacking[:3]),
        ],
    }


def _short(test: str) -> str:
    return test.rpartition("/")[2]
