"""Checkpoints: every file operation fails once, the process dies at random times, and every kind of damage is seen."""

import errno
import json
import os
import random
import select
import signal
import time

import pytest
import torch

from stackbert_kernels.train import checkpoint
from stackbert_kernels.train.checkpoint import CheckpointError, clean, latest, load, save, saved, verify

MUTATING = ("makedirs", "mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


def content(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"bank": torch.randn(4, 33, generator=generator), "word": torch.randn(7, 5, generator=generator)},
        "optimizer": {"exp_avg.bank": torch.randn(4, 33, generator=generator), "steps": torch.tensor([step, 0])},
    }
    return tensors, {"state": {"step": step, "seconds": 0.1 + step, "text": "ü"}}


def assert_holds(path, step):
    assert verify(path) == []
    tensors, documents = load(path)
    expected_tensors, expected_documents = content(step)
    assert documents == expected_documents
    assert {f: set(named) for f, named in tensors.items()} == {f: set(named) for f, named in expected_tensors.items()}
    for file, named in expected_tensors.items():
        for name, tensor in named.items():
            assert torch.equal(tensors[file][name], tensor), f"{file} {name}"


def names(directory):
    return sorted(os.listdir(directory))


class FaultyOs:
    """`os`, but the call number `fail_at` among those that change files fails; with `dead`, all that follow fail too."""

    def __init__(self, fail_at, code=errno.ENOSPC, dead=False):
        self.fail_at, self.code, self.dead, self.calls = fail_at, code, dead, 0

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in MUTATING:
            return function

        def call(*arguments, **keywords):
            self.calls += 1
            if self.calls - 1 == self.fail_at or (self.dead and self.calls > self.fail_at):
                raise OSError(self.code, os.strerror(self.code), str(arguments[0]))
            return function(*arguments, **keywords)

        return call


def test_what_is_saved_is_loaded_bitwise(tmp_path):
    path = save(tmp_path / "checkpoints", 7, *content(7))
    assert path == tmp_path / "checkpoints" / "step-7"
    assert names(path) == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert_holds(path, 7)


def test_views_and_special_values_survive(tmp_path):
    bank = torch.randn(3, 8)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors = {"model": {"row": bank[1], "transposed": bank.clone().t(), "special": special, "none": torch.zeros(0, 4)}}
    loaded, _ = load(save(tmp_path, 0, tensors, {}))
    assert torch.equal(loaded["model"]["row"], bank[1])
    assert torch.equal(loaded["model"]["transposed"], bank.t())
    assert torch.equal(loaded["model"]["special"].view(torch.int32), special.view(torch.int32))
    assert loaded["model"]["none"].shape == (0, 4)


def test_the_newest_is_computed_by_number(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, step, *content(step), keep=9)
    (tmp_path / "step-011").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [p.name for p in saved(tmp_path)] == ["step-10", "step-9", "step-2"]
    assert latest(tmp_path) == tmp_path / "step-10"
    assert latest(tmp_path / "absent") is None


@pytest.mark.parametrize("keep, left", [(1, [40, 50]), (2, [40, 50]), (3, [30, 40, 50])])
def test_old_ones_are_pruned_but_never_the_last_two(tmp_path, keep, left):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, *content(step), keep=keep)
    assert sorted(int(p.name[5:]) for p in saved(tmp_path)) == left


def test_pruning_counts_only_valid_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, *content(step), keep=5)
    os.truncate(tmp_path / "step-30" / "model.safetensors", 10)
    save(tmp_path, 40, *content(40), keep=2)
    assert [p.name for p in saved(tmp_path)] == ["step-40", "step-30", "step-20"]
    assert_holds(tmp_path / "step-20", 20)


def test_a_saved_step_is_left_alone_and_a_damaged_one_is_replaced(tmp_path):
    path = save(tmp_path, 5, *content(5))
    before = os.stat(path / "MANIFEST.json").st_mtime_ns
    save(tmp_path, 5, *content(5))
    assert os.stat(path / "MANIFEST.json").st_mtime_ns == before
    (path / "state.json").unlink()
    save(tmp_path, 5, *content(5))
    assert_holds(path, 5)
    assert names(tmp_path) == ["step-5"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("dead", [False, True])
def test_a_fault_at_any_file_operation_loses_nothing(tmp_path, monkeypatch, code, dead):
    fail_at = 0
    while True:
        directory = tmp_path / str(fail_at)
        for step in (1, 2):
            save(directory, step, *content(step))
        faulty = FaultyOs(fail_at, code, dead)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "os", faulty)
            try:
                save(directory, 3, *content(3))
            except CheckpointError as error:
                assert os.strerror(code) in str(error)
                assert "\n" not in str(error)
            else:
                assert faulty.calls == fail_at, f"file operation {fail_at} failed without an error"
                break
        newest = latest(directory)
        assert_holds(newest, int(newest.name[5:]))
        assert_holds(directory / "step-2", 2)
        if not dead:
            assert not [n for n in names(directory) if n.startswith(".tmp-") and "removed" not in n]
        clean(directory)
        save(directory, 4, *content(4))
        assert all(n.startswith("step-") for n in names(directory))
        assert_holds(latest(directory), 4)
        fail_at += 1
    assert fail_at > 15  # three files, manifest, directories, pruning: fewer means that the proxy missed operations


def test_short_writes_are_completed(tmp_path, monkeypatch):
    class ShortWrites(FaultyOs):
        def __getattr__(self, name):
            return (lambda handle, data: os.write(handle, data[:100])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(checkpoint, "os", ShortWrites(-1))
    assert_holds(save(tmp_path, 3, *content(3)), 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_one_line(tmp_path):
    save(tmp_path, 1, *content(1))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written to .*: Permission denied; earlier ones are untouched"
        ):
            save(tmp_path, 2, *content(2))
    finally:
        tmp_path.chmod(0o755)
    assert_holds(latest(tmp_path), 1)


def test_a_kill_at_any_time_leaves_whole_checkpoints(tmp_path):
    """A forked writer saves as fast as it can and is killed 25 times; each time the newest is valid and not older than before."""
    choose = random.Random(0)
    newest = 0
    save(tmp_path, newest, *content(newest))
    for _ in range(25):
        progress, report = os.pipe()
        writer = os.fork()
        if writer == 0:
            try:
                clean(tmp_path)
                step = newest
                while True:
                    step += 1
                    save(tmp_path, step, *content(step))
                    os.write(report, b".")
            finally:
                os._exit(1)
        os.close(report)
        for _ in range(choose.randint(1, 3)):
            assert select.select([progress], [], [], 60)[0], "the writer saved nothing within a minute"
            assert os.read(progress, 1), "the writer ended by itself"
        time.sleep(choose.uniform(0, 0.005))
        os.kill(writer, signal.SIGKILL)
        os.close(progress)
        _, status = os.waitpid(writer, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself"
        path = latest(tmp_path, warn=pytest.fail)
        assert int(path.name[5:]) >= newest
        newest = int(path.name[5:])
        assert_holds(path, newest)
    assert newest >= 25
    clean(tmp_path)
    assert all(n.startswith("step-") for n in names(tmp_path))


def files(path):
    return [path / n for n in names(path)]


def test_every_truncation_is_seen(tmp_path):
    path = save(tmp_path, 1, *content(1))
    for file in files(path):
        whole = file.read_bytes()
        for size in sorted(
            {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 20))}
        ):
            file.write_bytes(whole[:size])
            assert verify(path), f"{file.name} cut to {size} bytes"
        file.write_bytes(whole + b" ")
        assert verify(path), f"{file.name} with a byte more"
        file.write_bytes(whole)
    assert verify(path) == []


def test_every_flipped_bit_is_seen(tmp_path):
    path = save(tmp_path, 1, *content(1))
    choose = random.Random(0)
    for file in files(path):
        whole = file.read_bytes()
        bits = range(8 * len(whole)) if file.name == "MANIFEST.json" else choose.sample(range(8 * len(whole)), 100)
        for bit in bits:
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            assert verify(path), f"{file.name} bit {bit}"
        file.write_bytes(whole)
    assert verify(path) == []


def test_missing_renamed_and_swapped_files_are_seen(tmp_path):
    one, two = (save(tmp_path, step, *content(step)) for step in (1, 2))
    for name in names(one):
        (one / name).rename(one / "away")
        assert verify(one), f"{name} missing"
        assert latest(tmp_path) == two
        (one / "away").rename(one / name)

        kept = (one / name).read_bytes()
        (one / name).write_bytes((two / name).read_bytes())
        assert verify(one), f"{name} taken from another checkpoint"
        (one / name).write_bytes(kept)
    two.rename(tmp_path / "step-3")
    assert verify(tmp_path / "step-3") == ["MANIFEST.json: is of step 2, the folder is step-3"]


def test_a_damaged_newest_one_is_named_and_the_one_before_it_used(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, *content(step))
    (tmp_path / "step-2" / "model.safetensors").write_bytes(b"")
    lines = []
    assert latest(tmp_path, warn=lines.append) == tmp_path / "step-1"
    assert len(lines) == 1
    assert "step-2 is damaged and not used: model.safetensors: " in lines[0] and "0 are there" in lines[0]
    with pytest.raises(CheckpointError, match="step-2 cannot be read"):
        load(tmp_path / "step-2")


def test_a_manifest_cannot_point_outside(tmp_path):
    path = save(tmp_path, 1, *content(1))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    entries = {"../../secret.json": manifest["files"]["state.json"]}
    (path / "MANIFEST.json").write_bytes(checkpoint._manifest(1, entries))
    assert verify(path) == ["MANIFEST.json: is not a manifest of format 1, or is damaged"]


def test_clean_removes_only_what_an_interrupted_save_left(tmp_path):
    save(tmp_path, 1, *content(1))
    (tmp_path / ".tmp-step-2-abc").mkdir()
    (tmp_path / ".tmp-step-2-abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    clean(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-1"]
