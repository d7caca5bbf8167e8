"""What lies in a run directory, and whether a command may begin, go on or has nothing left to do there. Imports no torch.

config.json     the configuration with everything resolved
data/           token shards, unless the text was given as a prepared directory
metrics.jsonl   one event a line
checkpoints/    step-N/
model/          the result for transformers
report.png  report.html
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from stackbert_kernels.config import ConfigError, TrainConfig, differences, from_dict, to_dict
from stackbert_kernels.data import tokenizer
from stackbert_kernels.data.prepare import is_prepared, load_manifest, prepare, require_pairs
from stackbert_kernels.data.prepare import tokenizer as prepared_tokenizer
from stackbert_kernels.data.text import source_files
from stackbert_kernels.growth.source import SOURCE, check_source, source_vocabulary
from stackbert_kernels.plan import model_parameters
from stackbert_kernels.train.teacher import TEACHER, check_teacher

CONFIG, DATA, METRICS, CHECKPOINTS, MODEL, TEXT = "config.json", "data", "metrics.jsonl", "checkpoints", "model", "text"
REPORT, FIGURE = "report.html", "report.png"


@dataclass(frozen=True)
class Run:
    """A run directory that is ready: its text is prepared and `config` says everything that was left open."""

    directory: Path
    config: TrainConfig
    data: Path
    finished: bool

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.directory / METRICS

    @property
    def model(self) -> Path:
        return self.directory / MODEL


def check(config: TrainConfig, directory: Path, *, fresh: bool = False) -> TrainConfig:
    """Looks at everything that can be wrong before work begins and changes nothing; ConfigError says what was wanted and got.

    An earlier run of another configuration is refused unless `fresh`. Returns `config` with absolute paths and what is already known
    of the vocabulary.
    """
    check_source(config)
    config = _with_vocabulary(check_teacher(config))
    directory, data = Path(directory), config.data
    vocab = os.path.abspath(data.vocab) if data.vocab else ""
    config = replace(config, data=replace(data, text=tuple(map(os.path.abspath, data.text)), vocab=vocab))
    config = replace(config, **{role: os.path.abspath(path) for role, path in _others(config)})
    earlier = _earlier(directory)
    if earlier is not None and not fresh:
        config = _the_same(earlier, config, directory)
    text = config.data.text
    if len(text) == 1 and is_prepared(text[0]):
        manifest = load_manifest(text[0])
        config = _resolved(config, manifest["vocab_size"])
        _check_words(config, prepared_tokenizer(text[0]), text[0])
        require_pairs(manifest, config.model.objective)
        return config
    files = source_files(text)
    if not any(os.path.getsize(file) for file in files):
        raise ConfigError(f"text is empty: {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''}")
    if vocab:
        words = tokenizer.load(vocab, data.lowercase)
        _check_words(config, words, vocab)
        return _resolved(config, words.get_vocab_size())
    if config.model.vocab_size > data.train_vocab_size:
        raise ConfigError(
            f"vocab_size must be at most train_vocab_size where the words are learned here, got vocab_size {config.model.vocab_size}, "
            f"train_vocab_size {data.train_vocab_size}"
        )
    return config


def _others(config: TrainConfig) -> list[tuple[str, str]]:
    """The models that the run uses and that were there before it: role, which is also the setting's name, and path."""
    return [(role, path) for role, path in ((SOURCE, config.source), (TEACHER, config.teacher)) if path]


def _with_vocabulary(config: TrainConfig) -> TrainConfig:
    """A run that has a source or a teacher reads text by its words."""
    prepared = len(config.data.text) == 1 and is_prepared(config.data.text[0])
    if not _others(config) or config.data.vocab or prepared:
        return config
    role, path = _others(config)[0]
    vocab = source_vocabulary(path, role)
    if vocab is None:
        raise ConfigError(f"{role}: {path} has no tokenizer.json or vocab.txt; name its vocabulary by --vocab")
    return replace(config, data=replace(config.data, vocab=str(vocab)))


def _check_words(config: TrainConfig, words: Tokenizer, where: str) -> None:
    """Rows of another model's word embedding must mean the words that they mean here; whole words need to be seen in pieces."""
    if config.data.whole_word and tokenizer.continuations(words) is None:
        raise ConfigError(f"whole_word needs a tokenizer that marks pieces inside words (WordPiece's ##), got {where}")
    for role, path in _others(config):
        vocab = source_vocabulary(path, role)
        if vocab is None and role == TEACHER:
            raise ConfigError(f"teacher: {path} has no tokenizer.json or vocab.txt to compare its words with ours by")
        if vocab is not None and os.path.abspath(vocab) != where:
            theirs = tokenizer.load(str(vocab), config.data.lowercase).get_vocab()
            if theirs != words.get_vocab():
                raise ConfigError(f"{role}: {where} has other words than {vocab}")


def open_run(config: TrainConfig, directory: Path, *, fresh: bool = False, progress: bool = True) -> Run:
    """Checks as `check` does, then makes `directory` ready: prepares the text, writes config.json.

    `fresh` removes what earlier commands wrote there, and nothing else.
    """
    directory = Path(directory)
    config = check(config, directory, fresh=fresh)
    _check_memory(config)
    try:
        if fresh and directory.exists():
            with locked(directory / CHECKPOINTS):
                _start_over(directory)
        data = prepare(config.data.text, directory / DATA, config.data, progress=progress)
        manifest = load_manifest(data)
        require_pairs(manifest, config.model.objective)
        config = _resolved(config, manifest["vocab_size"])
        os.makedirs(directory, exist_ok=True)
        write_json(directory / CONFIG, to_dict(config))
    except OSError as error:
        raise ConfigError(f"{error.filename or directory} cannot be written: {error.strerror}") from error
    finished = any(event["event"] == "end" for event in read_metrics(directory / METRICS))
    return Run(directory, config, data, finished)


def _check_memory(config: TrainConfig) -> None:
    """Weights, gradients and both moments, in float32: whether this machine can hold them at all."""
    if config.device not in ("auto", "cpu"):
        return
    wanted, there = 16 * model_parameters(config), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise ConfigError(
            f"model: weights, gradients and moments of {wanted // 16:,} parameters take {wanted / 1e9:,.0f} GB, "
            f"this machine has {there / 1e9:,.0f} GB"
        )


def _earlier(directory: Path) -> TrainConfig | None:
    """The configuration of the run that began here; None where nothing did."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ConfigError(f"out must be a directory, got a file: {directory}")
    try:
        return from_dict(json.loads((directory / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError:
        foreign = sorted(n for n in os.listdir(directory) if n not in (DATA, TEXT) and not n.startswith("."))
        if foreign:
            raise ConfigError(
                f"out must be new, empty or a run directory, got {directory} with {foreign[0]} and no {CONFIG}"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory / CONFIG} is not the configuration of a run: {error}") from None


def _the_same(earlier: TrainConfig, config: TrainConfig, directory: Path) -> TrainConfig:
    """`config`, with the size of the vocabulary that the earlier command found."""
    if config.model.vocab_size == 0:
        config = replace(config, model=replace(config.model, vocab_size=earlier.model.vocab_size))
    differing = differences(earlier, config)
    if differing:
        raise ConfigError(
            f"{directory} holds a run of another configuration: {'; '.join(differing)} "
            "(there -> wanted); take another --out, or --fresh to start over"
        )
    return config


def _resolved(config: TrainConfig, words: int) -> TrainConfig:
    if config.model.vocab_size not in (0, words):
        raise ConfigError(
            f"vocab_size must be the tokenizer's {words} (or 0, to take it), got vocab_size {config.model.vocab_size}"
        )
    config = replace(config, model=replace(config.model, vocab_size=words))
    check_source(config)
    return check_teacher(config)


def _start_over(directory: Path) -> None:
    """Removes what a run writes, and nothing else that someone may have put beside it."""
    for name in (CONFIG, METRICS, REPORT, FIGURE):
        (directory / name).unlink(missing_ok=True)
    for pattern in ("step-*", ".tmp-*"):
        for path in (directory / CHECKPOINTS).glob(pattern):
            shutil.rmtree(path)
    for pattern in ("*.json", "*.safetensors", "vocab.txt"):
        for path in (directory / MODEL).glob(pattern):
            path.unlink()
    if is_prepared(directory / DATA):
        for path in (directory / DATA).iterdir():
            path.unlink()
    for name in (CHECKPOINTS, MODEL, DATA):
        path = directory / name
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextmanager
def locked(checkpoints: Path) -> Iterator[None]:
    """Keeps a second process from training in the same run directory; the lock goes with the process."""
    os.makedirs(checkpoints, exist_ok=True)
    handle = os.open(checkpoints, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {checkpoints.parent}") from None
        yield
    finally:
        os.close(handle)


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    _write(temporary, json.dumps(value, indent=1).encode() + b"\n")
    os.replace(temporary, path)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# metrics.jsonl


def read_metrics(path: Path) -> list[dict]:
    """The events of a run so far; a line that was cut off by a crash is left out."""
    return [event for _, event in _events(path)]


def _events(path: Path) -> Iterator[tuple[bytes, dict]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(event, dict):
            yield line, event


class Metrics:
    """Appends events, each by one write: a kill leaves whole lines."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, event: str, **values) -> None:
        record = {"event": event} | {name: finite(value) for name, value in values.items()}
        os.write(self.handle, json.dumps(record, allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        os.fsync(self.handle)

    def close(self) -> None:
        os.close(self.handle)


def cut_metrics(path: Path, step: int | None) -> bool:
    """Drops what was logged after the checkpoint of `step` (None: everything), so that it is not logged twice.

    Returns whether the checkpoint itself is in the log: a kill can come between the two.
    """
    kept, found = [], False
    for line, event in _events(path) if step is not None else ():
        if found or event["step"] > step:
            break
        kept.append(line)
        found = event["event"] == "checkpoint" and event["step"] == step
    temporary = path.with_name(f".{path.name}.partial")
    _write(temporary, b"".join(kept))
    os.replace(temporary, path)
    return found


def finite(value):
    """JSON has no NaN: null says that a number could not be computed."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
