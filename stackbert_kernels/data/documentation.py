"""Real English prose that every machine with this package has: the documentation of Python and of the installed packages.

`pydoc_data.topics` and the docstrings of the standard library, numpy, torch and transformers, read by parsing their source
files (nothing is imported). Code is stripped: doctests, literal blocks, signatures, tables, headings, reStructuredText and
Markdown marks. What stays are sentences. One document a module or class, one paragraph a line, a blank line between documents.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from stackbert_kernels.data.progress import Progress

PACKAGES = ("numpy", "torch", "transformers")
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "dist-packages",
    "_vendor",
    "_bundled",
    "lib2to3",
    "__pycache__",
}
ADDED_DOCSTRINGS = ("add_docstr", "add_newdoc", "add_docstr_all")  # how numpy and torch document what is written in C
SHORTEST_SENTENCE = 4  # words
SHORTEST_DOCUMENT = 12

BULLET = re.compile(r"^(?:[-*+•]|\d{1,2}[.)]|#\.)\s+")
UNDERLINE = re.compile(r"^([=\-~^*#+\"'`.:_])\1{2,}\s*$")
# `name (type, optional): text`, `name: text`, `first, second: text`
PARAMETER = re.compile(
    r"^[*`]*[A-Za-z_][\w.*]*(?:`*,\s*[*`]*[\w.*]+)*`*\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\)\s*:|:(?=\s|$)|\s:(?=\s|$))\s*"
)
TYPED = re.compile(r"^[*`]*[A-Za-z_][\w.*, `/]* : \S")  # numpy's `name : type`, whose description follows indented
FIELD = re.compile(r"^:(?:param|type|arg|returns?|rtype|raises|keyword|ivar|attr)\b[^:]*:\s*")
DIRECTIVE = re.compile(r"^\.\.\s+(?:([\w-]+)::|_|\[|\|)?\s*(.*)$")
NOTES = {"note", "warning", "important", "tip", "caution", "attention", "hint"}  # directives whose text is prose
SECTIONS = re.compile(
    r"^(?:Arg|Argument|Parameter|Return|Yield|Raise|Example|Note|Warning|Keyword [Aa]rg\w*|Attribute|Input|Output|Shape|Reference"
    r"|See [Aa]lso|Usage|T[Oo][Dd][Oo]|Tip)s?\s*:*$"
)
INLINE = (
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"!?\[\[([^\]]+)\]\]"), r"\1"),
    (re.compile(r"\[`?~?([\w. ]+?)`?\](?!\()"), r"\1"),  # [`Class`] of transformers
    (re.compile(r":(?:[\w+-]+:)+`~?!?([^`<]+?)\s*(?:<[^`>]*>)?`"), r"\1"),  # :role:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <link>`_
    (re.compile(r"\[\d+\]_"), ""),
    (re.compile(r"`{1,3}([^`]*)`{1,3}_{0,2}"), r"\1"),
    (re.compile(r"\*\*([^*\s](?:[^*]*[^*\s])?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s](?:[^*]*[^*\s])?)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s+"), " "),
)
SENTENCE_END = re.compile(r"""(?<=[.!?])\s+(?=["'(]?[A-Z])""")
CODE = re.compile(
    r"""[{}\\|<>=^$@#~%\[\]]|->|::|\w\(\w|\w_\w*_\w|__|https?:|\.\w+\.\w+\.|^\W|,\s*$|\bTODO\b|\s[,.;:]|\(\)\S"""
)


def documentation(out: Path, *, progress: bool = True) -> Path:
    """Writes the prose to `out` (whole or not at all) and returns it. The same installed packages give the same bytes."""
    out = Path(out)
    files = [file for root in _roots() for file in _python_files(root)]
    seen: set[str] = set()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    # spawn: a forked child of a process in which torch has threads may hang.
    workers = ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn"))
    try:
        with (
            Progress("gathering documentation", len(files), "files", shown=progress) as bar,
            partial.open("w", encoding="utf-8") as file,
        ):
            for documents in workers.map(prose_of_file, map(str, files), chunksize=32):
                for paragraphs in documents:
                    fresh = [p for p in dict.fromkeys(paragraphs) if p not in seen]
                    seen.update(fresh)
                    if sum(len(p.split()) for p in fresh) >= SHORTEST_DOCUMENT:
                        file.write("\n".join(fresh) + "\n\n")
                bar.advance(1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(out)
    finally:
        workers.shutdown(cancel_futures=True)
        partial.unlink(missing_ok=True)
    return out


def _roots() -> Iterator[Path]:
    yield Path(sysconfig.get_path("stdlib"))
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield Path(folder)


def _python_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


def prose_of_file(path: str) -> list[list[str]]:
    """The paragraphs of each document in a source file; a file that cannot be parsed has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    if path.endswith(os.path.join("pydoc_data", "topics.py")):
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value
        ]
        documents = [prose(text) for text in texts]
    else:
        documents = [[paragraph for text in texts for paragraph in prose(text)] for texts in _docstrings(tree)]
    return [document for document in documents if document]


def _docstrings(tree: ast.Module) -> Iterator[list[str]]:
    """The docstrings of the module with its functions, then those of each class with its methods, then of C functions one by one."""
    classes, added = [], []

    def collect(node: ast.AST, texts: list[str]) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                texts.append(text)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                own: list[str] = []
                classes.append(own)
                collect(child, own)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.With)):
                collect(child, texts)
            elif (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Call)
                and _called(child.value) in ADDED_DOCSTRINGS
            ):
                strings = (n.value for n in ast.walk(child) if isinstance(n, ast.Constant) and isinstance(n.value, str))
                added.append([text for text in strings if "\n" in text])

    module: list[str] = []
    collect(tree, module)
    yield module
    yield from classes
    yield from added


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def prose(text: str) -> list[str]:
    """The paragraphs of a docstring, code and mark-up stripped, each with its proper sentences only."""
    paragraphs = []
    for block in _blocks(inspect.cleandoc(text).expandtabs().split("\n")):
        for pattern, replacement in INLINE:
            block = pattern.sub(replacement, block)
        kept = [sentence for sentence in SENTENCE_END.split(block.strip()) if _is_sentence(sentence)]
        if kept:
            paragraphs.append(" ".join(kept))
    return paragraphs


def _is_sentence(sentence: str) -> bool:
    """Whether it reads as English: begins with a capital, ends as a sentence does, has words enough and no marks of code."""
    words = sentence.split()
    if (
        len(words) < SHORTEST_SENTENCE
        or not sentence[0].isupper()
        or sentence[-1] not in ".!?:"
        or CODE.search(sentence)
    ):
        return False
    letters = sum(c.isalpha() or c == " " for c in sentence)
    plain = sum(w.strip("(),.;:!?\"'").replace("-", "").replace("'", "").isalpha() for w in words)
    return sentence.isascii() and letters >= 0.9 * len(sentence) and plain >= 0.75 * len(words)


def _blocks(lines: list[str]) -> Iterator[str]:
    """Runs of lines that are text: paragraphs, list items, descriptions of parameters. Code and tables are passed over."""
    block: list[str] = []
    literal: int | None = None  # what is indented deeper than this is a literal block
    fenced = doctest = in_item = False  # in_item: the block began with a bullet or a parameter
    indent = 0
    for number, line in enumerate([*lines, ""]):
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if bare.startswith(("```", "~~~")):
            fenced = not fenced
            yield from _joined(block)
            continue
        if fenced:
            continue
        if not bare:
            yield from _joined(block)
            doctest = False
            continue
        if literal is not None and depth > literal:
            continue
        literal = None
        if bare.startswith((">>>", "... ")):
            yield from _joined(block)
            doctest = True
        if doctest:
            continue
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if UNDERLINE.match(bare) or UNDERLINE.match(following) or bare.startswith(("|", "+-", "%", "$")):
            yield from _joined(block)
            continue
        directive = DIRECTIVE.match(bare) if bare.startswith("..") else None
        if directive:
            yield from _joined(block)
            if directive[1] not in NOTES:
                literal = depth
            elif directive[2]:
                block, indent, in_item = [directive[2]], depth, False
            continue
        if SECTIONS.match(bare):
            yield from _joined(block)
            continue
        if TYPED.match(bare):
            yield from _joined(block)
            continue
        start = BULLET.match(bare) or FIELD.match(bare)
        if not start and (not block or in_item or depth != indent or bare.endswith(":")):
            start = PARAMETER.match(bare)
        if start or (block and depth != indent and depth < indent):
            yield from _joined(block)
        if not block:
            indent, in_item = depth, bool(start)
        elif depth > indent and len(block) == 1:
            indent = depth  # the rest of a list item hangs
        block.append(bare[start.end() :] if start else bare)
        if bare.endswith("::"):
            block[-1] = block[-1].removesuffix(":")
            yield from _joined(block)
            literal = depth


def _joined(block: list[str]) -> Iterator[str]:
    if any(block):
        yield " ".join(filter(None, block))
    block.clear()
