"""Which commit a result stands for, and which ops have changed since.

An op has changed where the digest of its sources differs from that of the measurement: from the result file, else that of the commit it
names. A result of a copy without history names no commit: then it is the one in which the sources were first those of the digests.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import machine

SOURCES = ("csrc", "stackbert_kernels/ops")


def blobs(commit: str) -> dict[str, str]:
    """{path: blob} of the sources at a commit; empty where the history does not have it."""
    listed = machine.git("ls-tree", "-r", commit, "--", *SOURCES) or ""
    lines = [line.split("\t", 1) for line in listed.splitlines()]
    return {path: facts.split()[2] for facts, path in lines}


def whole() -> bool:
    """Whether there is a history here, and all of it."""
    return machine.git("rev-parse", "--is-shallow-repository") == "false"


def commit_of(result: Mapping, folders: Mapping[str, str]) -> str | None:
    """The commit that a result stands for; None where it cannot be found. `folders`: {op: its folder}."""
    if result["machine"].get("commit"):
        return result["machine"]["commit"]
    wanted = {op: digest for op, digest in result.get("sources", {}).items() if digest and op in folders}
    if not wanted:
        return None
    device, found = result["machine"]["device"], None
    for commit in (machine.git("rev-list", "HEAD", "--", *SOURCES) or "").split():
        tree = blobs(commit)
        if all(machine.digest(folders[op], device, tree) == digest for op, digest in wanted.items()):
            found = commit
        elif found:
            break
    return found


def changed(result: Mapping, folders: Mapping[str, str]) -> list[str] | None:
    """The ops of a result whose sources are no longer those that were measured, or gone; None where that cannot be found out."""
    facts = result["machine"]
    measured = result.get("sources") or {}
    if not measured:
        tree = blobs(facts["commit"]) if facts.get("commit") else {}
        measured = {op: machine.digest(folder, facts["device"], tree) for op, folder in folders.items()} if tree else {}
    measured = {op: digest for op, digest in measured.items() if digest}
    if not measured:
        return None
    return [
        op
        for op, digest in measured.items()
        if op not in folders or machine.digest(folders[op], facts["device"]) != digest
    ]


def commits(folder: str, since: str) -> list[str]:
    """A line for each commit after `since` that touched the sources of the op in this folder."""
    log = machine.git("log", "--format=%h %ad %s", "--date=short", f"{since}..HEAD", "--", *machine.places(folder))
    return (log or "").splitlines()
