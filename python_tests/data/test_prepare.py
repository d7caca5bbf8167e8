"""prepare: what it writes is the text; the same inputs are reused and others refused; bad input is one clear line; no half directory."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackbert_kernels.config import ConfigError, DataConfig
from stackbert_kernels.data import prepare as prepare_module
from stackbert_kernels.data.prepare import is_prepared, load_manifest, prepare, tokenizer
from stackbert_kernels.data.text import documents, sentences

DATA = DataConfig(seq_len=8, batch_tokens=64, train_vocab_size=120, heldout=0.2)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "far", "away", "from", "it"]


def text_of(count: int = 30, seed: int = 0) -> list[str]:
    r = np.random.default_rng(seed)
    return [
        "\n".join(" ".join(r.choice(WORDS, 6)) + "." for _ in range(r.integers(1, 5))) + f"\nnumber {i}."
        for i in range(count)
    ]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(text_of()) + "\n", encoding="utf-8")
    return path


def read(directory, split="train") -> list[list[str]]:
    """Documents of decoded sentences."""
    manifest = load_manifest(directory)
    shards = manifest["splits"][split]["shards"]
    tokens = np.concatenate([np.fromfile(directory / s["file"], dtype=manifest["dtype"]) for s in shards])
    starts, documents = (np.load(directory / f"{split}.{name}.npy") for name in ("sentences", "documents"))
    pieces = tokenizer(directory)
    decoded = [pieces.decode(tokens[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    return [decoded[a:b] for a, b in itertools.pairwise(documents)]


def test_decoding_gives_the_text_back(source, tmp_path):
    out = prepare([str(source)], tmp_path / "out", DATA, progress=False)
    both = read(out) + read(out, "heldout")
    assert sorted(both) == sorted(list(d.split("\n")) for d in text_of())
    manifest = load_manifest(out)
    assert manifest["documents"] == 30 == sum(manifest["splits"][s]["documents"] for s in ("train", "heldout"))
    assert manifest["special_ids"] == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert manifest["vocab_size"] == tokenizer(out).get_vocab_size()
    assert sorted(p.name for p in out.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert not list(tmp_path.glob(".*"))


def test_plain_text_json_lines_directories_and_globs_are_the_same_text(tmp_path):
    docs = text_of()
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(
        "\ufeff" + "\r\n\r\n \r\n".join(d.replace("\n", "\r\n") for d in docs[:20]), encoding="utf-8"
    )
    (folder / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": d, "id": 1}) for d in docs[20:]) + "\n\n", encoding="utf-8"
    )
    (folder / "ignored.bin").write_bytes(b"\xff")
    names = {"directory": [str(tmp_path / "folder")], "glob": [str(tmp_path / "**" / "?.*")]}
    outs = [prepare(text, tmp_path / name, DATA, progress=False) for name, text in names.items()]
    assert read(outs[0]) + read(outs[0], "heldout") == read(outs[1]) + read(outs[1], "heldout")
    assert sorted(d[-1] for d in read(outs[0]) + read(outs[0], "heldout")) == sorted(f"number {i}." for i in range(30))


def test_heldout_depends_on_the_text_of_a_document_alone(source, tmp_path):
    first = prepare([str(source)], tmp_path / "first", DATA, progress=False)
    more = tmp_path / "more.txt"
    more.write_text("\n\n".join(reversed([*text_of(), "something else. entirely new."])), encoding="utf-8")
    second = prepare([str(more)], tmp_path / "second", DATA, progress=False)
    known = {d[-1] for d in read(first, "heldout")}
    assert {d[-1] for d in read(second, "heldout")} - {"entirely new."} == known
    assert 1 <= len(known) <= 12


def test_workers_and_blocks_do_not_change_the_result(source, tmp_path, monkeypatch):
    one = prepare([str(source)], tmp_path / "one", DATA, progress=False, workers=1)
    monkeypatch.setattr("stackbert_kernels.data.text.BLOCK", 100)
    two = prepare([str(source)], tmp_path / "two", DATA, progress=False, workers=3)
    assert load_manifest(one)["files"] == load_manifest(two)["files"]


def test_the_same_is_reused_and_another_refused(source, tmp_path):
    out = prepare([str(source)], tmp_path / "out", DATA, progress=False)
    written = (out / "manifest.json").stat().st_mtime_ns
    moved = tmp_path / "moved.txt"
    shutil.copy(source, moved)
    for text in (source, moved, out):
        assert prepare([str(text)], out, DATA, progress=False) == out
    # What the shards do not depend on may differ.
    prepare([str(source)], out, dataclasses.replace(DATA, seq_len=16, mask_rate=0.3, whole_word=True), progress=False)
    assert (out / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"lowercase \(there True, wanted False\)"):
        prepare([str(source)], out, dataclasses.replace(DATA, lowercase=False), progress=False)
    with pytest.raises(
        ConfigError, match=r"train_vocab_size \(there 120, wanted 99\); heldout \(there 0.2, wanted 0.3\)"
    ):
        prepare([str(source)], out, dataclasses.replace(DATA, train_vocab_size=99, heldout=0.3), progress=False)
    source.write_text("other\n\n" + source.read_text())
    with pytest.raises(ConfigError, match=r"text \(there 1 files, wanted 1, 0 of them the same\)"):
        prepare([str(source)], out, DATA, progress=False)


def vocabulary(path, extra=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    letters = sorted(set("".join(WORDS) + "0123456789.Tnumber"))
    path.write_text(
        "\n".join([*extra, *dict.fromkeys([*WORDS[:6], "Cat", *letters]), *(f"##{c}" for c in letters)]) + "\n"
    )
    return str(path)


def test_a_given_vocabulary_is_used(source, tmp_path):
    vocab = vocabulary(tmp_path / "vocab.txt")
    data = dataclasses.replace(DATA, vocab=vocab, lowercase=False)
    source.write_text(source.read_text() + "\n\nCat\n")
    out = prepare([str(source)], tmp_path / "out", data, progress=False)
    assert "Cat" in str(read(out) + read(out, "heldout"))
    assert tokenizer(out).token_to_id("[MASK]") == 4
    assert tokenizer(out).encode("the Cat").tokens == ["[CLS]", "the", "Cat", "[SEP]"]
    again = prepare(
        [str(source)], tmp_path / "again", dataclasses.replace(data, vocab=str(out / "tokenizer.json")), progress=False
    )
    assert read(again) == read(out)
    with pytest.raises(ConfigError, match=r"vocab \(there"):
        prepare([str(source)], out, DATA, progress=False)
    other = vocabulary(tmp_path / "other.txt", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"))
    with pytest.raises(ConfigError, match=r"was prepared with another vocabulary than .*other.txt"):
        prepare([str(out)], tmp_path / "unused", dataclasses.replace(DATA, vocab=other), progress=False)


def test_large_vocabularies_take_32_bits(source, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(70000)), *WORDS[:6], "##x", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
    out = prepare(
        [str(source)], tmp_path / "out", dataclasses.replace(DATA, vocab=str(tmp_path / "vocab.txt")), progress=False
    )
    assert load_manifest(out)["dtype"] == "uint32"
    assert "the" in str(read(out))


def test_a_text_without_blank_lines_is_cut_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("stackbert_kernels.data.text.LONGEST_DOCUMENT", 200)
    (tmp_path / "t.txt").write_text("\n".join(text_of()).replace("\n\n", "\n"))
    (tmp_path / "one_line.txt").write_text(" ".join(text_of(seed=1)).replace("\n", " "))
    for name in ("t", "one_line"):
        manifest = load_manifest(prepare([str(tmp_path / f"{name}.txt")], tmp_path / name, DATA, progress=False))
        assert manifest["documents"] > 5


@given(st.text(st.sampled_from("ab .!?\"”')\n"), max_size=60))
def test_sentences_lose_nothing_but_space(document):
    assert "".join("".join(sentences(document)).split()) == "".join(document.split())


def test_sentence_ends():
    assert sentences('He said "no." Then (he left!) He did... So?\nnew line v1.2 ok') == [
        'He said "no."',
        "Then (he left!)",
        "He did...",
        "So?",
        "new line v1.2 ok",
    ]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_documents_do_not_depend_on_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr("stackbert_kernels.data.text.BLOCK", block)
    (tmp_path / "t.txt").write_text("\n\nä b\nc\n \t\n\n\nd\n\ne f", encoding="utf-8")
    read = list(documents(tmp_path / "t.txt"))
    assert [d for _, found in read for d in found] == ["ä b\nc", "d", "e f"]
    assert sum(taken for taken, _ in read) == (tmp_path / "t.txt").stat().st_size


BAD_FILES = {
    "empty.txt": (b"", "text is empty: .*empty.txt"),
    "blank.txt": (b"\n \n\n", "text is empty"),
    "latin.txt": (b"good line\n\ncaf\xe9 there\n", "latin.txt is not UTF-8 at byte 14"),
    "cut.txt": (b"abc \xe2\x82", "cut.txt is not UTF-8 at byte 4"),
    "one.txt": (b"only one document. It has two sentences.", "at least 2 different documents .* got 1"),
    "short.txt": (b"a.\n\nb.\n\nc.", "one sequence wants seq_len 8 tokens, the text has"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl:2: not JSON"),
    "without.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', "without.jsonl:3: wanted an object with a string `text`"),
    "number.jsonl": (b'{"text": 3}', "number.jsonl:1: wanted"),
    "list.jsonl": (b'["text"]', "list.jsonl:1: wanted"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        prepare([str(tmp_path / name)], tmp_path / "out", DATA, progress=False)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_missing_text_is_refused(tmp_path):
    for text, message in (
        ([], "at least one file"),
        ([str(tmp_path / "none.txt")], "no such file, directory or glob: .*none.txt"),
        ([str(tmp_path / "*.txt")], "no such file, directory or glob"),
        ([str(tmp_path)], "a directory without .txt or .jsonl files"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(text, tmp_path / "out", DATA, progress=False)


def test_unreadable_text_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(source), "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ConfigError, match=r"cannot read .*text.txt: Permission denied"):
        prepare([str(source)], tmp_path / "out", DATA, progress=False)


def test_bad_vocabularies_are_refused(source, tmp_path):
    bad = {
        "without.txt": ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"must contain .*got none of \[MASK\]"),
        "twice.txt": ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nthe\n", "each piece once, got 'the' twice"),
        "not.json": ("{}", "not.json is not a tokenizer.json"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            prepare(
                [str(source)], tmp_path / "out", dataclasses.replace(DATA, vocab=str(tmp_path / name)), progress=False
            )
    (tmp_path / "latin.txt").write_bytes(b"[PAD]\n\xe9\n")
    for name, message in (("none.txt", "cannot read .*none.txt: No such file"), ("latin.txt", "not UTF-8 at byte 6")):
        with pytest.raises(ConfigError, match=message):
            prepare(
                [str(source)], tmp_path / "out", dataclasses.replace(DATA, vocab=str(tmp_path / name)), progress=False
            )
    with pytest.raises(ConfigError, match="train_vocab_size must be >= 10, got 3"):
        prepare([str(source)], tmp_path / "out", dataclasses.replace(DATA, train_vocab_size=3), progress=False)


def test_a_foreign_or_damaged_directory_is_refused(source, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("precious")
    with pytest.raises(ConfigError, match="must be absent, empty or a prepared directory"):
        prepare([str(source)], tmp_path / "foreign", DATA, progress=False)
    (tmp_path / "empty").mkdir()
    out = prepare([str(source)], tmp_path / "empty", DATA, progress=False)
    (out / "train.0.tokens").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train.0.tokens must have \d+ bytes, got 0"):
        prepare([str(source)], out, DATA, progress=False)
    (out / "train.0.tokens").unlink()
    with pytest.raises(ConfigError, match="got no file"):
        load_manifest(out)
    (out / "manifest.json").write_text('{"format": 0, "files": {}}')
    with pytest.raises(ConfigError, match="must have shard format 1, got 0"):
        load_manifest(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a prepared directory"):
        load_manifest(out)


def test_a_failure_in_the_middle_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare_module, "_finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        prepare([str(source)], tmp_path / "out", DATA, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_a_kill_in_the_middle_leaves_nothing_half_valid(source, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from stackbert_kernels.config import DataConfig;"
        "from stackbert_kernels.data import prepare as p; p._finish = lambda *_: (print('now', flush=True), time.sleep(60));"
        f"p.prepare([sys.argv[1]], Path(sys.argv[2]), {DATA!r}, progress=False)"
    )
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "now\n"
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    # One that is still being built is left alone ...
    prepare([str(source)], tmp_path / "out", DATA, progress=False)
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    shutil.rmtree(out)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not is_prepared(out)
    # ... and one that a killed process left is swept away.
    prepare([str(source)], out, DATA, progress=False)
    assert is_prepared(out) and not list(tmp_path.glob(".out.partial-*"))


def test_two_at_once_both_succeed(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from stackbert_kernels.config import DataConfig;"
        f"from stackbert_kernels.data.prepare import prepare; prepare([sys.argv[1]], Path(sys.argv[2]), {DATA!r}, progress=False)"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "out")]) for _ in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert is_prepared(tmp_path / "out") and not list(tmp_path.glob(".out*"))


def test_plain_lines_are_shown_where_there_is_no_terminal(source, tmp_path, capsys):
    prepare([str(source)], tmp_path / "out", DATA)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "checking text",
        "reading text",
        "learning word pieces",
        "making tokens",
    ]
    assert all("(100%)" in line for line in lines)
