"""Text -> a directory of memory-mapped token shards, once.

    manifest.json            sources, settings, special ids, counts, and the SHA-256 of every other file
    tokenizer.json           the word pieces
    {split}.N.tokens         token ids of whole documents one after the other, uint16 or uint32, split = train or heldout
    {split}.sentences.npy    int64 [sentences + 1], the token at which each sentence begins, counted over all shards
    {split}.documents.npy    int64 [documents + 1], the sentence at which each document begins

Built in a hidden directory beside `out` and renamed, so `out` is whole or absent. Which documents are held out depends on
their text alone: it stays the same when text is added, reordered or found in another file.
"""

from __future__ import annotations

import collections
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stackbert_kernels.config import ConfigError, DataConfig
from stackbert_kernels.data import tokenizer as word_pieces
from stackbert_kernels.data.progress import Progress
from stackbert_kernels.data.text import documents, sentences, source_files

FORMAT = 1
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 27
# A WordPiece of 30,000 words no longer changes visibly with more text than this, and counting it takes seconds.
VOCABULARY_SAMPLE_BYTES = 16_000_000
SENTENCES_PER_CALL = 2048


def is_prepared(path: Path | str) -> bool:
    return (Path(path) / "manifest.json").is_file()


def load_manifest(directory: Path | str) -> dict:
    """The manifest of a prepared directory whose files are all there with the recorded sizes."""
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        found = manifest["format"]
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{directory} is not a prepared directory: no readable manifest.json") from None
    if found != FORMAT:
        raise ConfigError(f"{directory} must have shard format {FORMAT}, got {found}; prepare the text again")
    for name, entry in files.items():
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size != entry["bytes"]:
            raise ConfigError(
                f"{directory / name} must have {entry['bytes']} bytes, got {'no file' if size is None else size}"
            )
    return manifest


def tokenizer(directory: Path | str) -> Tokenizer:
    return Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))


def require_tokens(manifest: dict, seq_len: int) -> None:
    have = manifest["splits"]["train"]["tokens"]
    if have < seq_len:
        raise ConfigError(f"text is too small: one sequence wants seq_len {seq_len} tokens, the text has {have}")


def require_pairs(manifest: dict, objective: str) -> None:
    """Sentence order is of sentences: a document of one has none."""
    train = manifest["splits"]["train"]
    if objective == "mlm+sop" and train["sentences"] == train["documents"]:
        raise ConfigError(
            f"objective mlm+sop needs documents of at least 2 sentences, got {train['documents']} of one sentence each; "
            "a blank line parts documents, a line or a full stop sentences"
        )


def prepare(
    text: Sequence[str], out: Path, data: DataConfig, *, progress: bool = True, workers: int | None = None
) -> Path:
    """Tokenises `text` into the shard directory `out` and returns it.

    A directory that holds the same sources and settings is returned as it is; one that holds others is refused with what
    differs. Where `text` is one prepared directory, that is returned. `workers` (default: one per CPU) changes the speed only.
    ConfigError says what is wrong with the input.
    """
    out = Path(out)
    if len(text) == 1 and is_prepared(text[0]):
        return _given(Path(text[0]), data)
    files = source_files(text)
    settings = _settings(data)
    if is_prepared(out):
        return _reused(out, files, settings, data)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} must be absent, empty or a prepared directory, got something else")

    out.parent.mkdir(parents=True, exist_ok=True)
    with _building(out) as building:
        sources = _fingerprints(files, None, progress)
        limit, count = _scan(files, data.heldout, progress)
        pieces = _tokenizer(files, data, limit, sum(s["bytes"] for s in sources), progress)
        pieces.save(str(building / "tokenizer.json"))
        manifest = {"format": FORMAT, "sources": sources, "settings": settings, "documents": count}
        manifest |= _write_shards(building, files, pieces, limit, progress, workers or os.cpu_count() or 1)
        require_tokens(manifest, data.seq_len)
        _finish(building, manifest)
        try:
            building.rename(out)
        except OSError:
            if not is_prepared(out):  # another process may have finished the same directory meanwhile
                raise
            return _reused(out, files, settings, data)
        _sync(out.parent)
    return out


# Inputs and settings


def _settings(data: DataConfig) -> dict:
    """What decides the content of the shards, beside the text."""
    settings = {
        "vocab": "",
        "train_vocab_size": data.train_vocab_size,
        "lowercase": data.lowercase,
        "heldout": data.heldout,
    }
    if data.vocab:
        word_pieces.load(data.vocab, data.lowercase)
        settings |= {"vocab": hashlib.sha256(Path(data.vocab).read_bytes()).hexdigest(), "train_vocab_size": None}
    return settings


def _given(directory: Path, data: DataConfig) -> Path:
    manifest = load_manifest(directory)
    if data.vocab and _settings(data)["vocab"] != manifest["settings"]["vocab"]:
        raise ConfigError(f"vocab: {directory} was prepared with another vocabulary than {data.vocab}")
    require_tokens(manifest, data.seq_len)
    return directory


def _reused(out: Path, files: list[Path], settings: dict, data: DataConfig) -> Path:
    manifest = load_manifest(out)
    there = manifest["settings"]
    differing = [
        f"{name} (there {there.get(name)!r}, wanted {value!r})"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    sources = _fingerprints(files, manifest["sources"], progress=False)
    old, new = ([s["sha256"] for s in kind] for kind in (manifest["sources"], sources))
    if old != new:
        differing.append(
            f"text (there {len(old)} files, wanted {len(new)}, {len(set(old) & set(new))} of them the same)"
        )
    if differing:
        raise ConfigError(f"{out} was prepared with other inputs: {'; '.join(differing)}")
    require_tokens(manifest, data.seq_len)
    return out


def _fingerprints(files: list[Path], known: list[dict] | None, progress: bool) -> list[dict]:
    """Path, size, time and SHA-256 of each file; the hash is taken from `known` where path, size and time are the same."""
    cached = {(s["path"], s["bytes"], s["mtime_ns"]): s["sha256"] for s in known or []}
    stats = [path.stat() for path in files]
    result = []
    with Progress("checking text", sum(s.st_size for s in stats), "B", shown=progress) as bar:
        for path, stat in zip(files, stats, strict=True):
            entry = {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            digest = cached.get(tuple(entry.values()))
            if digest is None:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            result.append(entry | {"sha256": digest})
            bar.advance(stat.st_size)
    return result


# Held-out split


def _hash(document: str) -> int:
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "little")


def _scan(files: list[Path], heldout: float, progress: bool) -> tuple[int, int]:
    """Reads everything once, which finds every malformed line before slow work. Returns the hash below which a document is
    held out, and the number of documents. At least the document of the smallest hash is held out."""
    smallest, largest, count = 1 << 64, -1, 0
    with Progress("reading text", sum(p.stat().st_size for p in files), "B", shown=progress) as bar:
        for path in files:
            for taken, block in documents(path):
                hashes = [_hash(document) for document in block]
                smallest, largest, count = min([smallest, *hashes]), max([largest, *hashes]), count + len(hashes)
                bar.advance(taken)
    if count == 0:
        raise ConfigError(f"text is empty: {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''}")
    limit = max(round(heldout * 2**64), smallest + 1)
    if largest < limit:
        raise ConfigError(
            f"text is too small: training and evaluation want at least 2 different documents (a blank line between), got {count}"
        )
    return limit, count


# Vocabulary


def _tokenizer(files: list[Path], data: DataConfig, limit: int, size: int, progress: bool) -> Tokenizer:
    if data.vocab:
        return word_pieces.load(data.vocab, data.lowercase)
    share = min(1.0, VOCABULARY_SAMPLE_BYTES / max(size, 1))

    def sample() -> Iterator[str]:
        for path in files:
            for taken, block in documents(path):
                for document in block:
                    number = _hash(document)
                    if number >= limit and number % (1 << 20) < share * (1 << 20):
                        yield from document.split("\n")
                bar.advance(taken)

    with Progress("learning word pieces", 2 * size, "B", shown=progress) as bar:
        return word_pieces.train(sample, data.train_vocab_size, data.lowercase)


# Shards


def _encode(pieces: Tokenizer, block: list[str], limit: int) -> dict[str, tuple[np.ndarray, list[int], list[int]]]:
    """Per split: tokens, tokens of each sentence, sentences of each document; what has no tokens is left out."""
    result = {}
    for split in SPLITS:
        chosen = [sentences(document) for document in block if (_hash(document) < limit) == (split == "heldout")]
        flat = [sentence for document in chosen for sentence in document]
        ids: list[list[int]] = []
        for first in range(0, len(flat), SENTENCES_PER_CALL):
            encoded = pieces.encode_batch_fast(flat[first : first + SENTENCES_PER_CALL], add_special_tokens=False)
            ids += [sentence.ids for sentence in encoded]
        lengths, counts, at = [], [], 0
        for document in chosen:
            own = [len(sentence) for sentence in ids[at : at + len(document)] if sentence]
            at += len(document)
            lengths += own
            if own:
                counts.append(len(own))
        tokens = np.fromiter((number for sentence in ids for number in sentence), dtype=np.uint32, count=sum(lengths))
        result[split] = tokens, lengths, counts
    return result


class _SplitWriter:
    """Appends documents to the shards and the index of one split."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, vocab_size: int):
        self.directory, self.split, self.dtype = directory, split, dtype
        self.shards: list[dict] = []
        self.lengths: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.unigrams = np.zeros(vocab_size, dtype=np.int64)
        self.file = None

    def append(self, tokens: np.ndarray, lengths: list[int], counts: list[int]) -> None:
        if not counts:
            return
        if self.file is None or self.shards[-1]["tokens"] + len(tokens) > SHARD_TOKENS:
            self.close()
            self.shards.append({"file": f"{self.split}.{len(self.shards)}.tokens", "tokens": 0})
            self.file = (self.directory / self.shards[-1]["file"]).open("wb")
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.shards[-1]["tokens"] += len(tokens)
        self.lengths.append(np.array(lengths, dtype=np.int64))
        self.counts.append(np.array(counts, dtype=np.int64))
        self.unigrams += np.bincount(tokens, minlength=len(self.unigrams))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def finish(self) -> dict:
        self.close()
        if not self.shards:
            raise ConfigError(f"text is too small: no word of it is left for the {self.split} documents")
        for name, parts in (("sentences", self.lengths), ("documents", self.counts)):
            starts = np.concatenate([np.zeros(1, dtype=np.int64), *parts]).cumsum()
            np.save(self.directory / f"{self.split}.{name}.npy", starts)
        return {
            "documents": sum(map(len, self.counts)),
            "sentences": sum(map(len, self.lengths)),
            "tokens": int(self.unigrams.sum()),
            "shards": self.shards,
        }


def _write_shards(
    building: Path, files: list[Path], pieces: Tokenizer, limit: int, progress: bool, workers: int
) -> dict:
    vocab_size = pieces.get_vocab_size()
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    writers = {split: _SplitWriter(building, split, dtype, vocab_size) for split in SPLITS}
    pending: collections.deque = collections.deque()

    def write_oldest(bar: Progress) -> None:
        taken, future = pending.popleft()
        for split, encoded in future.result().items():
            writers[split].append(*encoded)
        bar.advance(taken)

    # Threads: the library encodes outside the interpreter lock, so one thread's Python runs beside another's encoding.
    # Results are written in the order of the text, which makes the shards independent of `workers`.
    pool = ThreadPoolExecutor(workers)
    try:
        with Progress("making tokens", sum(p.stat().st_size for p in files), "B", shown=progress) as bar:
            for path in files:
                for taken, block in documents(path):
                    pending.append((taken, pool.submit(_encode, pieces, block, limit)))
                    if len(pending) > workers:
                        write_oldest(bar)
            while pending:
                write_oldest(bar)
    finally:
        pool.shutdown(cancel_futures=True)
        for writer in writers.values():
            writer.close()
    special = word_pieces.special_ids(pieces)
    splits = {split: writer.finish() for split, writer in writers.items()}
    return {
        "vocab_size": vocab_size,
        "special_ids": special,
        "dtype": dtype.name,
        "splits": splits,
        "unigram": _unigram(writers["train"].unigrams, writers["heldout"].unigrams, list(special.values())),
    }


def _unigram(train: np.ndarray, heldout: np.ndarray, special: list[int]) -> dict:
    """What a model without context reaches on held-out text: the cross-entropy (nats) of the training tokens' distribution,
    each count raised by one, and the share of the most frequent training token. Special tokens, never a target, are left out."""
    ordinary = np.setdiff1d(np.arange(len(train)), special)
    p = (train[ordinary] + 1) / (train[ordinary] + 1).sum()
    q = heldout[ordinary] / max(1, heldout[ordinary].sum())
    return {"entropy": float(-(q * np.log(p)).sum()), "accuracy": float(q[p.argmax()])}


# Building in safety


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A locked directory beside `out`, gone at the end unless it was renamed. What a killed process left, which nobody locks, is
    removed first."""
    prefix = f".{out.name}.partial-"
    # Under the parent's lock, so that nobody sweeps away a directory between its creation and its lock.
    with _opened(out.parent) as parent:
        fcntl.flock(parent, fcntl.LOCK_EX)
        for left in out.parent.glob(f"{prefix}*"):
            # Its owner may rename or remove it at any moment.
            with suppress(FileNotFoundError), _opened(left) as handle:
                if _try_lock(handle):
                    shutil.rmtree(left, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        lock = os.open(building, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(lock)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)


def _finish(building: Path, manifest: dict) -> None:
    """Records every file, writes the manifest last, and forces all of it to the disk."""
    entries = {}
    for path in sorted(building.iterdir()):
        with path.open("rb") as file:
            entries[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
        _sync(path)
    (building / "manifest.json").write_text(
        json.dumps(manifest | {"files": entries}, indent=1) + "\n", encoding="utf-8"
    )
    building.chmod(0o755)  # mkdtemp's is 0700: the result is as readable as any directory
    _sync(building / "manifest.json")
    _sync(building)
