"""What a user calls text -> documents and sentences: plain files (a blank line ends a document), globs, directories, .jsonl.

Everything that can be wrong with the input is found here, with the file and the line or byte, before slow work begins.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stackbert_kernels.config import ConfigError

BLOCK = 1 << 22
# Longer documents are cut at a line end: one huge text without blank lines still gives a held-out part and bounded memory.
LONGEST_DOCUMENT = 1 << 16
SUFFIXES = (".txt", ".jsonl")
SENTENCE_END = re.compile(r"""([.!?]["\u201d\u2019')]*)\s+""")


def source_files(text: Sequence[str]) -> list[Path]:
    """The files that `text` names, in the given order; those of a directory or a glob sorted by name."""
    if not text:
        raise ConfigError("text must name at least one file, glob or directory, got none")
    files: list[Path] = []
    for name in text:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise ConfigError(f"text: {name} is a directory without .txt or .jsonl files")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
            if not found:
                raise ConfigError(f"text: no such file, directory or glob: {name}")
        files += [p for p in found if p not in files]
    for path in files:
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"text: cannot read {path}: {error.strerror}") from None
    return files


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Blocks of whole lines with the bytes they took; the first error in the encoding is reported with its byte."""
    with path.open("rb") as file:
        rest, offset = b"", 0
        while True:
            block = file.read(BLOCK)
            data = rest + block
            cut = data.rfind(b"\n") + 1 if block else len(data)
            whole, rest = data[:cut], data[cut:]
            if whole:
                try:
                    decoded = whole.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ConfigError(f"text: {path} is not UTF-8 at byte {offset + error.start}") from None
                if offset == 0:
                    decoded = decoded.removeprefix("\ufeff")
                yield len(whole), decoded.removesuffix("\n").split("\n")
                offset += len(whole)
            if not block:
                return


def _cut(document: str) -> Iterator[str]:
    while len(document) > LONGEST_DOCUMENT:
        at = document.rfind("\n", 0, LONGEST_DOCUMENT)
        at = at if at > 0 else document.rfind(" ", 0, LONGEST_DOCUMENT)
        at = at if at > 0 else LONGEST_DOCUMENT
        yield document[:at]
        document = document[at:].lstrip()
    if document:
        yield document


def _plain_documents(path: Path) -> Iterator[tuple[int, list[str]]]:
    lines: list[str] = []
    size = 0
    for taken, block in _lines(path):
        documents: list[str] = []
        for line in block:
            line = line.strip()
            if line and size < LONGEST_DOCUMENT:
                lines.append(line)
                size += len(line) + 1
                continue
            if lines:
                documents += _cut("\n".join(lines))
            lines, size = ([line], len(line) + 1) if line else ([], 0)
        yield taken, documents
    if lines:
        yield 0, list(_cut("\n".join(lines)))


def _json_documents(path: Path) -> Iterator[tuple[int, list[str]]]:
    number = 0
    for taken, block in _lines(path):
        documents: list[str] = []
        for line in block:
            number += 1
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"text: {path}:{number}: not JSON: {error.msg}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ConfigError(
                    f"text: {path}:{number}: wanted an object with a string `text`, got {line.strip()[:40]!r}"
                )
            documents += _cut("\n".join(filter(None, map(str.strip, record["text"].splitlines()))))
        yield taken, documents


def documents(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Blocks of documents, each with the bytes of the file that were read for it. A document's lines are its paragraphs."""
    return _json_documents(path) if path.suffix == ".jsonl" else _plain_documents(path)


def sentences(document: str) -> list[str]:
    """A sentence ends at `.`, `!` or `?`, closing quotes and brackets included, before white space, and where a line ends."""
    return [s for s in SENTENCE_END.sub(r"\1\n", document).split("\n") if s]
