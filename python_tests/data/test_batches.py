"""Batches are pure functions of (seed, step); masks follow Devlin et al.; pairs are labelled right; nothing is lost or padded."""

import dataclasses
import itertools
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackbert_kernels.config import ConfigError, DataConfig
from stackbert_kernels.data import draws, masking, prepare, samples
from stackbert_kernels.data.batches import Batch, Batches, cut, heldout

LETTERS = "abcdefghijklmnop"
DATA = DataConfig(seq_len=24, batch_tokens=300, train_vocab_size=300, heldout=0.1, eval_tokens=700)
OBJECTIVES = ("mlm", "mlm+nsp", "mlm+sop")


def corpus(documents: int = 120, seed: int = 3) -> list[list[str]]:
    """Documents of sentences of words; each document has words of its own."""
    r = np.random.default_rng(seed)

    def word() -> str:
        return "".join(r.choice(list(LETTERS), r.integers(1, 8)))

    return [
        [" ".join(word() for _ in range(r.integers(1, 14))).capitalize() + "." for _ in range(r.integers(1, 12))]
        for _ in range(documents)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    (folder / "text.txt").write_text("\n\n".join("\n".join(d) for d in corpus()), encoding="utf-8")
    return prepare.prepare([str(folder / "text.txt")], folder / "shards", DATA, progress=False)


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


def original(batch: Batch) -> torch.Tensor:
    return batch.input_ids.index_copy(0, batch.masked, batch.labels)


def sequences(batch: Batch) -> list[list[int]]:
    return [s.tolist() for s in original(batch).split(batch.cu_seqlens.diff().tolist())]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_well_formed(directory, objective):
    batches = Batches(directory, DATA, objective, seed=1)
    special = prepare.load_manifest(directory)["special_ids"]
    for step in range(0, 40, 7):
        batch = batches[step]
        cu = batch.cu_seqlens.tolist()
        assert cu[-1] == batch.tokens == len(batch.positions) == len(batch.token_types)
        assert batch.max_seqlen == max(batch.cu_seqlens.diff()) <= DATA.seq_len
        assert batch.sequences == len(batch.sample_ids)
        assert torch.equal(batch.masked, batch.masked.sort().values)
        whole = original(batch)
        assert not set(whole[batch.masked].tolist()) & set(special.values())
        for first, last in itertools.pairwise(cu):
            ids, types = whole[first:last].tolist(), batch.token_types[first:last].tolist()
            assert batch.positions[first:last].tolist() == list(range(last - first))
            assert ids[0] == special["[CLS]"] and ids[-1] == special["[SEP]"]
            ends = [i for i, token in enumerate(ids) if token == special["[SEP]"]]
            assert len(ends) == (1 if objective == "mlm" else 2)
            assert types == [int(i > ends[0]) for i in range(last - first)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_order_another_object_and_a_pickled_one_give_the_same(directory, objective):
    batches = Batches(directory, DATA, objective, seed=1)
    forward = [batches[step] for step in range(60)]
    other = Batches(directory, DATA, objective, seed=1)
    assert all(same(other[step], forward[step]) for step in reversed(range(60)))
    copy = pickle.loads(pickle.dumps(batches))
    assert same(copy[47], forward[47])
    assert not same(Batches(directory, DATA, objective, seed=2)[0], forward[0])


def test_another_process_gives_the_same(directory):
    code = (
        "import sys; from stackbert_kernels.config import DataConfig; from stackbert_kernels.data.batches import Batches;"
        f"b = Batches(sys.argv[1], {DATA!r}, 'mlm+nsp', seed=1)[1234567];"
        "print(b.input_ids.tolist(), b.masked.tolist(), b.sample_ids.tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True
    ).stdout
    batch = Batches(directory, DATA, "mlm+nsp", seed=1)[1234567]
    assert out.strip() == f"{batch.input_ids.tolist()} {batch.masked.tolist()} {batch.sample_ids.tolist()}"


def test_these_masks_stay_as_they_are():
    """A resumed run must see the samples and masks of the run that was cut off, whatever version is installed by then."""
    keys = draws.sample_keys(7, np.array([0, 3]), np.array([0, 11]), draws.MASK)
    assert keys.tolist() == [17888158542414495444, 16319559962919368259]
    assert draws.permutation(7, 1, 6).tolist() == [3, 1, 2, 5, 4, 0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_sample_once_an_epoch_and_the_mean_batch_is_the_budget(directory, objective):
    batches = Batches(directory, DATA, objective, seed=5)
    epochs = 3
    steps = math.ceil(epochs * batches.steps_per_epoch)
    stream = torch.cat([batches[step].sample_ids for step in range(steps)])[: epochs * batches.samples]
    for epoch in stream.split(batches.samples):
        assert torch.equal(epoch.sort().values, torch.arange(batches.samples))
    assert not torch.equal(stream[: batches.samples], stream[batches.samples : 2 * batches.samples])
    if objective != "mlm+nsp":  # there the second part of another document has another length
        total = 0
        for step in range(steps):
            total += batches[step].tokens
            assert 0 <= (step + 1) * DATA.batch_tokens - total < DATA.seq_len


def test_a_batch_larger_than_the_text_spans_epochs(directory):
    small = Batches(directory, DATA, "mlm", seed=0)
    data = dataclasses.replace(DATA, batch_tokens=2 * small.tokens + 100)
    batch = Batches(directory, data, "mlm", seed=0)[0]
    assert batch.tokens <= data.batch_tokens < batch.tokens + DATA.seq_len
    assert set(batch.sample_ids.bincount().tolist()) <= {2, 3}


@given(step=st.integers(0, 10**9), world=st.integers(1, 5), parts=st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_and_parts_cut_the_same_step(directory, step, world, parts):
    whole = Batches(directory, DATA, "mlm+sop", seed=0)[step]
    pieces = []
    for rank in range(world):
        pieces += Batches(directory, DATA, "mlm+sop", seed=0, rank=rank, world_size=world).parts(step, parts)
    for name in ("input_ids", "positions", "token_types", "labels", "pair_labels", "sample_ids"):
        assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), getattr(whole, name)), name
    offsets = np.cumsum([0] + [p.tokens for p in pieces])
    assert torch.equal(torch.cat([p.masked + int(o) for p, o in zip(pieces, offsets, strict=False)]), whole.masked)


@given(lengths=st.lists(st.integers(1, 50), max_size=40), n=st.integers(1, 8))
def test_cut_covers_everything_evenly(lengths, n):
    slices = cut(np.array(lengths, dtype=np.int64), n)
    assert len(slices) == n
    assert [x for s in slices for x in lengths[s]] == lengths
    if len(lengths) >= n:
        assert all(s.start < s.stop for s in slices)
        assert max(sum(lengths[s]) for s in slices) <= sum(lengths) / n + max(lengths) * n


def test_masks_are_15_percent_and_80_10_10(directory):
    batches = Batches(directory, dataclasses.replace(DATA, batch_tokens=60000), "mlm", seed=0)
    mask_id = prepare.load_manifest(directory)["special_ids"]["[MASK]"]
    batch = batches[3]
    count = len(batch.masked)
    per_sequence = torch.bincount(
        torch.searchsorted(batch.cu_seqlens[1:].long(), batch.masked, right=True), minlength=batch.sequences
    )
    candidates = batch.cu_seqlens.diff().long() - 2  # the text has no [UNK]
    assert torch.equal(per_sequence, torch.from_numpy(masking.wanted(candidates.numpy(), 0.15)))
    shown = batch.input_ids[batch.masked]
    masks = int((shown == mask_id).sum())
    kept = int((shown == batch.labels).sum())
    words = batches.vocab_size - 5
    for name, seen, p in (
        ("masked", masks, 0.8),
        ("kept", kept, 0.1 + 0.1 / words),
        ("random", count - masks - kept, 0.1 - 0.1 / words),
    ):
        assert abs(seen - count * p) < 4 * math.sqrt(count * p * (1 - p)), f"{name}: {seen} of {count}"
    # Every place of a sequence is drawn equally often.
    place = batch.positions[batch.masked]
    long = batch.cu_seqlens.diff().long() == 24
    of_long = long[torch.searchsorted(batch.cu_seqlens[1:].long(), batch.masked, right=True)]
    if long.any():
        seen = torch.bincount(place[of_long], minlength=24)[1:23].double()
        expected = float(long.sum()) * 3 / 22
        assert ((seen - expected).abs() < 5 * math.sqrt(expected)).all()


def test_the_mask_of_a_sample_depends_on_epoch_and_seed_only(directory):
    batches = Batches(directory, DATA, "mlm", seed=0)
    wide = Batches(directory, dataclasses.replace(DATA, batch_tokens=2000), "mlm", seed=0)

    def masks(source: Batches, first: int, last: int) -> list[tuple]:
        found = []
        for step in range(first, last):
            batch = source[step]
            for i, sample in enumerate(batch.sample_ids.tolist()):
                a, b = batch.cu_seqlens[i : i + 2].tolist()
                found.append((sample, tuple(batch.input_ids[a:b].tolist())))
        return found

    steps = math.ceil(2 * batches.steps_per_epoch)
    stream = masks(batches, 0, steps)
    assert masks(wide, 0, 2) == stream[: len(masks(wide, 0, 2))]
    first, second = (dict(stream[e * batches.samples : (e + 1) * batches.samples]) for e in range(2))
    assert sum(first[s] != second[s] for s in first) > 0.9 * len(first)


def test_whole_words_are_masked_together(directory):
    data = dataclasses.replace(DATA, whole_word=True, mask_rate=0.3)
    batch = Batches(directory, data, "mlm", seed=0)[0]
    vocab = {number: piece for piece, number in prepare.tokenizer(directory).get_vocab().items()}
    chosen = set(batch.masked.tolist())
    whole = original(batch).tolist()
    for first, last in zip(batch.cu_seqlens.tolist()[:-1], batch.cu_seqlens.tolist()[1:], strict=True):
        words: list[list[int]] = []
        for i in range(first + 1, last - 1):
            if vocab[whole[i]].startswith("##") and words:
                words[-1].append(i)
            else:
                words.append([i])
        assert all(len(chosen & set(word)) in (0, len(word)) for word in words)
        taken = len(chosen & set(range(first, last)))
        assert 1 <= taken <= max(masking.wanted(np.array([last - first - 2]), 0.3)[0], min(map(len, words)))


def test_nsp_and_sop_labels_are_right(directory):
    """Against the text: a true pair is a stretch of the corpus, a false one is not; about half are false."""
    manifest = prepare.load_manifest(directory)
    sep = manifest["special_ids"]["[SEP]"]
    text = np.fromfile(directory / "train.0.tokens", dtype=manifest["dtype"]).tolist()
    joined = "," + ",".join(map(str, text)) + ","

    def follows(a: list[int], b: list[int]) -> bool:
        return "," + ",".join(map(str, a + b)) + "," in joined

    for objective in ("mlm+nsp", "mlm+sop"):
        batches = Batches(directory, dataclasses.replace(DATA, batch_tokens=3000), objective, seed=0)
        labels = []
        for step in range(2):
            batch = batches[step]
            for ids, label in zip(sequences(batch), batch.pair_labels.tolist(), strict=True):
                middle = ids.index(sep)
                a, b = ids[1:middle], ids[middle + 1 : -1]
                assert a and b
                labels.append(label)
                if len(a) + len(b) < 6:
                    continue  # so short a stretch may stand elsewhere by chance
                assert follows(a, b) == (label == 0)
                if objective == "mlm+sop":
                    assert follows(b, a) == (label == 1)
        assert abs(sum(labels) - len(labels) / 2) < 4 * math.sqrt(len(labels) / 4)


def test_nsp_needs_another_document(tmp_path):
    (tmp_path / "t.txt").write_text("a b c d e f g h. i j k.\n\na b c. d e f g h i j k.")
    out = prepare.prepare(
        [str(tmp_path / "t.txt")], tmp_path / "s", dataclasses.replace(DATA, seq_len=8), progress=False
    )
    with pytest.raises(ConfigError, match="at least 2 train documents, got 1"):
        Batches(out, dataclasses.replace(DATA, seq_len=8), "mlm+nsp", seed=0)


def _pack_slowly(documents: list[list[int]], budget: int) -> list[tuple[int, int, int]]:
    found, at = [], 0
    for number, lengths in enumerate(documents):
        pieces = [min(budget, n - done) for n in lengths for done in range(0, n, budget)]
        first = last = at
        for piece in pieces:
            if last + piece - first > budget:
                found.append((number, first, last))
                first = last
            last += piece
        found.append((number, first, last))
        at = last
    return found


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 30))
def test_packing_is_greedy_within_documents(documents, budget):
    sentences = np.cumsum([0] + [n for d in documents for n in d])
    starts = np.cumsum([0] + [len(d) for d in documents])
    table = samples.pack(sentences, starts, budget)
    assert list(map(tuple, table.T.tolist())) == _pack_slowly(documents, budget)


def test_shards_are_invisible(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1500)
    monkeypatch.setattr("stackbert_kernels.data.text.BLOCK", 2000)
    source = prepare.load_manifest(directory)["sources"][0]["path"]
    many = prepare.prepare([source], tmp_path / "many", DATA, progress=False, workers=2)
    assert len(prepare.load_manifest(many)["splits"]["train"]["shards"]) > 2
    for objective in OBJECTIVES:
        one, other = Batches(directory, DATA, objective, seed=0), Batches(many, DATA, objective, seed=0)
        assert all(same(one[step], other[step]) for step in range(20))


def test_a_directory_that_cannot_be_written_to_serves(directory, monkeypatch, tmp_path):
    monkeypatch.setattr(samples.Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    table = samples.sample_table(directory, "train", 17, 1)
    assert table.shape[0] == 3 and not (directory / "train.samples-1-17.npy").exists()


def test_heldout_is_fixed_and_bounded(directory):
    first, second = heldout(directory, DATA, "mlm", 0), heldout(directory, DATA, "mlm", 0)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sum(b.tokens for b in first) <= DATA.eval_tokens
    ids = torch.cat([b.sample_ids for b in first])
    assert len(ids.unique()) == len(ids)
    assert len(heldout(directory, dataclasses.replace(DATA, eval_tokens=1), "mlm", 0)) == 1
    held = {
        tuple(s)
        for b in heldout(directory, dataclasses.replace(DATA, eval_tokens=10**6), "mlm", 0)
        for s in sequences(b)
    }
    train = Batches(directory, DATA, "mlm", 0)
    trained = {tuple(s) for step in range(math.ceil(train.steps_per_epoch)) for s in sequences(train[step])}
    assert not {s for s in held & trained if len(s) > 8}


def test_unigram_entropy_is_the_cross_entropy_of_counting(directory):
    batches = Batches(directory, DATA, "mlm", 0)
    manifest = prepare.load_manifest(directory)
    train, held = (
        np.fromfile(directory / f"{split}.0.tokens", dtype=manifest["dtype"]) for split in ("train", "heldout")
    )
    counts = np.ones(manifest["vocab_size"])
    np.add.at(counts, train, 1)
    counts[list(manifest["special_ids"].values())] = 0
    held = held[counts[held] > 0]
    assert batches.unigram_entropy == pytest.approx(-np.log((counts / counts.sum())[held]).mean())
    assert batches.unigram_accuracy == pytest.approx((held == counts.argmax()).mean())


def test_prefetch_gives_the_same_and_stops(directory):
    batches = Batches(directory, DATA, "mlm", 0)
    stream = batches.prefetch(5, 2)
    for step in range(5, 9):
        assert all(same(a, b) for a, b in zip(next(stream), batches.parts(step, 2), strict=True))
    stream.close()
    with pytest.raises(IndexError, match="step must be >= 0, got -1"):
        next(batches.prefetch(-1))


def test_to_moves_every_tensor(directory):
    moved = Batches(directory, DATA, "mlm+sop", 0)[0].to("meta")
    assert all(v.device.type == "meta" for v in vars(moved).values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "clm"}, "objective must be one of mlm, mlm\\+nsp, mlm\\+sop, got 'clm'"),
        ({"split": "test"}, "split must be one of train, heldout, got 'test'"),
        ({"rank": 2, "world_size": 2}, "rank must be in \\[0, 2\\), got 2"),
        ({"seed": -1}, "seed must be in"),
        (
            {"data": dataclasses.replace(DATA, seq_len=100000, batch_tokens=100000)},
            "one sequence wants seq_len 100000 tokens",
        ),
    ],
)
def test_wrong_arguments_are_refused(directory, arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(directory, **({"data": DATA, "objective": "mlm", "seed": 0} | arguments))
