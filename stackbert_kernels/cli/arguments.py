"""Arguments to commands; what is wrong with them becomes one line."""

from __future__ import annotations

import contextlib
import io
import re

import tyro

from stackbert_kernels import __version__
from stackbert_kernels.cli.options import Command
from stackbert_kernels.config import ConfigError

DESCRIPTION = f"stackbert {__version__}: pre-train BERT by stacking layers, with fused kernels. `stackbert COMMAND --help` shows the options."


def parse(arguments: list[str]):
    """tyro's objects from the arguments; its page about a wrong one becomes a ConfigError of one line."""
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(Command, prog="stackbert", description=DESCRIPTION, args=arguments)
    except SystemExit as end:
        if not end.code:
            raise
    raise ConfigError(one_line(page.getvalue()))


def one_line(page: str) -> str:
    """The message of a tyro error box: what stands above its first rule, and the option that it takes for the one meant."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", page)
    rows = [row.strip("│ ") for row in plain.splitlines() if not row.startswith(("╭", "╰"))]
    rows = [row for row in rows if row]
    if "╭" not in plain:  # where stdout is not UTF-8, title and rule stand where the box's upper edge would be
        rows = rows[2:]
    end = next((i for i, row in enumerate(rows) if not row.strip("─-")), len(rows))
    message, rest = " ".join(rows[:end]), rows[end:]
    message = re.sub(r"^Error parsing (__tyro-dummy-inner__\.)?\w[\w-]*: (?=[a-z0-9_]+[: ])", "", message)
    message = message.replace("__tyro-dummy-inner__.", "").removeprefix("Error parsing ")
    message = message.replace("invalid literal for int() with base 10:", "wanted a whole number, got")
    message = message.replace("could not convert string to float:", "wanted a number, got")
    message = re.sub(
        r"no type matching \{None\}\|(INT|FLOAT) could be instantiated from \[(.*?)\]\..*", _number_or_none, message
    )
    message = re.sub(r"Could not find valid parse for arguments: \[(.*)\]", r"wanted numbers, got \1", message)
    if not message.startswith("Unrecognized"):
        return message
    message = re.sub(r" \(applied to [^)]*\)| Arguments are applied to .*", "", message)
    first = next((i for i, row in enumerate(rest) if row.startswith("Available subcommands: ")), None)
    if first is not None:
        several = range(first, len(rest))  # rows, where the list is long
        last = next((i for i in several if not rest[i].endswith(",")), first)
        return f"{message}; commands are {' '.join(rest[first : last + 1]).removeprefix('Available subcommands: ')}"
    meant = next((row.split()[0].rstrip(",") for row in rest if row.startswith("--") and row.strip("-")), None)
    return f"{message}; did you mean {meant}?" if meant and meant not in message.split() else message


def _number_or_none(match: re.Match) -> str:
    return f"wanted {'a whole number' if match[1] == 'INT' else 'a number'} or None, got {match[2]}"
