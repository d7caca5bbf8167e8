"""Data-parallel training: the processes that torchrun started train one model together, each on its share of every batch.

Nothing wraps the model. What learns changes from stage to stage and even from step to step, so each step sums the gradients of exactly that: the
rows of the bank's window that its layers read, as they become ready during the backward pass, and the always-on parameters that learn. All ranks
then hold the same sums, bit for bit, and take the same update; a row outside the window is not even looked at.

A step of N ranks is one of a single process whose batch is cut into N parts more: the loss of each part counts by what it predicts, of all that is predicted
in the whole batch. Rank 0 alone writes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stackbert_kernels.config import ConfigError, TrainConfig, from_dict, to_dict
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.train.run_directory import Run, open_run
from stackbert_kernels.train.torchrun import DistributedError, Place

TIMEOUT = timedelta(minutes=10)
"""A rank that has not come to a sum by then is lost. Longer than any checkpoint takes."""
BUCKET = 25 * 2**20
"""Bytes of gradients that travel together at least, so that few messages are sent and most of them while the backward pass goes on."""
SMALL = 2**20
"""Bytes below which an always-on gradient is copied into a message with others."""
FEED_FORWARD = ("inner_", "outer_", "norm2_")
"""How the names of parameters of a layer's feed-forward half begin."""
GRACE = 2.0
"""Seconds in which a rank that failed can say why, before the others say that they lost it."""


class _Told(ConfigError):
    """What rank 0 refused and has said."""


class Ranks:
    """The processes of a run, seen from one of them; `ALONE` does nothing that one process would not do."""

    def __init__(self, place: Place | None = None, device: torch.device | None = None, store: dist.Store | None = None):
        place = place or Place()
        self.rank, self.size, self.device, self._store = place.rank, place.size, device, store
        self._answers = 0

    @property
    def logged(self) -> dict[str, int]:
        """What the log says of it."""
        return {} if self.size == 1 else {"ranks": self.size}

    # ---- what rank 0 does for all

    def first(self, make: Callable[[], object]):
        """What `make` returns on rank 0, on all ranks: plain numbers, strings, lists, dicts. The others wait, however long it takes."""
        if self.size == 1:
            return make()
        self._answers += 1
        key = f"answer {self._answers}"
        if self.rank == 0:
            value = make()
            with self._speaking("handing on what rank 0 found"):
                self._store.set(key, json.dumps(value))
            return value
        with self._speaking("waiting for rank 0"):
            while not self._store.check([key]):
                self._raise_failure()
                time.sleep(0.02)
            return json.loads(self._store.get(key))

    def open(self, config: TrainConfig, directory: Path, *, fresh: bool = False, progress: bool = True) -> Run:
        """`open_run`, done by rank 0."""
        if self.size == 1:
            return open_run(config, directory, fresh=fresh, progress=progress)

        def make() -> dict:
            run = open_run(config, directory, fresh=fresh, progress=progress)
            return {"config": to_dict(run.config), "data": str(run.data), "finished": run.finished}

        found = self.first(make)
        return Run(Path(directory), from_dict(found["config"]), Path(found["data"]), found["finished"])

    # ---- sums

    def sums(self, values: Sequence[float]) -> list[float]:
        """Of each number over all ranks, in float64, without a wait for the device."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self._speaking("adding up numbers"):
            dist.all_reduce(total)
        return total.tolist()

    def sum_(self, tensor: Tensor) -> Tensor:
        """In place, of a tensor on the ranks' devices."""
        if self.size > 1:
            with self._speaking("adding up a loss"):
                dist.all_reduce(tensor)
        return tensor

    def of_first(self, values: Sequence[float]) -> list[float]:
        """Rank 0's numbers: what is decided by them must not hang on how another machine rounds."""
        return self.sums(values if self.rank == 0 else [0.0] * len(values))

    @contextmanager
    def summing(self, model: Bert, gates: Sequence[float] | None = None) -> Iterator[None]:
        """Around the last backward pass of a step: afterwards the gradients of what learns are sums over all ranks.

        Rows of the bank travel while the pass goes on below them, topmost first: the order is the same on all ranks.
        """
        if self.size == 1:
            yield
            return
        buckets = row_buckets(model, gates)
        waiting = [sum(1 for i in range(*rows) for _ in model.bank.layers[i].parameters()) for rows in buckets]
        works, hooks = [], []

        def send(count: int) -> None:
            for first, last in buckets[len(works) : count]:
                with self._speaking("adding up gradients"):
                    works.append(dist.all_reduce(model.bank.grads[first:last], async_op=True))

        def ready(bucket: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                waiting[bucket] -= 1
                while len(works) < len(buckets) and waiting[len(works)] == 0:
                    send(len(works) + 1)

            return hook

        try:
            for bucket, rows in enumerate(buckets):
                hook = ready(bucket)
                for i in range(*rows):
                    hooks += [p.register_post_accumulate_grad_hook(hook) for p in model.bank.layers[i].parameters()]
            yield
        finally:
            for hook in hooks:
                hook.remove()
        send(len(buckets))
        with self._speaking("adding up gradients"):
            works += self._send_others(model)
            for work in works:
                work.wait()
            self._unpack()

    def _send_others(self, model: Bert) -> list[dist.Work]:
        """The always-on gradients, and those of rows of which layers read one half only."""
        # Every rank has samples, so that what has no gradient here has none anywhere: the optimizer leaves it out, too.
        learning = [p for p in model.always_on_parameters().values() if p.requires_grad and p.grad is not None]
        for parameter in learning:
            parameter.grad = parameter.grad.contiguous()
        grads = [*(p.grad for p in learning), *halves(model)]
        large = [g for g in grads if g.nbytes >= SMALL]
        self._small = [g for g in grads if g.nbytes < SMALL]
        self._flat = torch.cat([g.reshape(-1) for g in self._small]) if self._small else None
        messages = large if self._flat is None else [*large, self._flat]
        return [dist.all_reduce(message, async_op=True) for message in messages]

    def _unpack(self) -> None:
        if self._flat is not None:
            parts = self._flat.split([g.numel() for g in self._small])
            torch._foreach_copy_(self._small, [p.view_as(g) for p, g in zip(parts, self._small, strict=True)])
        self._small, self._flat = [], None

    # ---- what must be the same everywhere

    def agreed(self, signals: list[str]) -> list[str]:
        """The signals that any rank has received: all stop after the same step."""
        if self.size == 1:
            return signals
        known = ("SIGTERM", "SIGINT")
        received = self.sums([float(name in signals) for name in known])
        return [name for name, count in zip(known, received, strict=True) if count]

    def require_same(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """DistributedError unless every bit of `tensors` (float32) is the same on all ranks, but for what a sum of bit patterns cannot tell."""
        if self.size == 1:
            return
        sums = torch.stack([t.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors.values()])
        extremes = torch.cat([sums, -sums]).cpu()
        with self._speaking("comparing weights"):
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        highest, lowest = extremes.chunk(2)
        for name, differs in zip(tensors, (highest != -lowest).tolist(), strict=True):
            if differs:
                raise DistributedError(
                    f"{name} is not the same on all {self.size} ranks {when}: do all read the same run directory, with the same version?"
                )

    def dropout_seed(self, seed: int) -> int:
        """Of this rank's dropout masks: those of a rank are independent of the others', and rank 0 has those of one process alone."""
        if self.rank == 0:
            return seed
        digest = hashlib.blake2b(f"{seed} dropout of rank {self.rank}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    # ---- failures

    @contextmanager
    def _speaking(self, doing: str) -> Iterator[None]:
        """An error of the connection becomes one line: what another rank said before it ended, else what broke."""
        try:
            yield
        except DistributedError:
            raise
        except RuntimeError as error:
            until = time.monotonic() + GRACE
            while time.monotonic() < until:
                self._raise_failure(error)
                time.sleep(0.05)
            reason = str(error).strip().splitlines()[0]
            raise DistributedError(f"lost another rank while {doing}: {reason}; the same command goes on from the last checkpoint") from error  # fmt: skip

    def _raise_failure(self, cause: Exception | None = None) -> None:
        try:
            if not self._store.check(["failure"]):
                return
            failure = json.loads(self._store.get("failure"))
        except RuntimeError:
            if cause is None:
                raise
            return  # the store is gone with the rank that kept it
        if failure["rank"] == self.rank:
            return
        if failure["refused"]:
            raise _Told(failure["message"]) from cause
        raise DistributedError(f"rank {failure['rank']} failed: {failure['message']}") from cause

    def _tell_failure(self, error: BaseException) -> None:
        refused = self.rank == 0 and isinstance(error, ConfigError)
        lines = str(error).strip().splitlines()
        message = lines[0] if refused and lines else ": ".join([type(error).__name__, *lines[:1]])
        try:
            if not self._store.check(["failure"]):
                self._store.set("failure", json.dumps({"rank": self.rank, "message": message, "refused": refused}))
        except RuntimeError:
            return  # nobody is left to be told


ALONE = Ranks()


@contextmanager
def joined(place: Place, device: torch.device, *, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Waits until all processes of the run are there. An error of one ends all of them, each with one line that says whose it was."""
    if place.size == 1:
        yield ALONE
        return
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_session(store, place, timeout), store)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DistributedError(f"{place.size} ranks could not be joined: {reason}") from error
    ranks = Ranks(place, device, dist.PrefixStore("run", store))
    try:
        yield ranks
    except BaseException as error:
        if not isinstance(error, (_Told, DistributedError)):
            ranks._tell_failure(error)
        if isinstance(error, ConfigError) and place.rank > 0 and not isinstance(error, _Told):
            raise DistributedError(str(error)) from error
        raise
    finally:
        # A NCCL group that lost a rank would wait for it here; it goes with the process.
        if device.type == "cpu" or sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _session(store: dist.Store, place: Place, timeout: timedelta) -> str:
    """A name that all ranks have agreed upon now. A store can outlive them (torchrun --max-restarts keeps it), and with it what earlier ones wrote:
    each rank believes only an answer to the word that it has just made up."""
    until, word = time.monotonic() + timeout.total_seconds(), secrets.token_hex(8)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if place.rank > 0:
        store.set(f"word {place.rank}", word)
    missing = list(range(1, place.size)) if place.rank == 0 else [0]
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"rank {missing[0]} has not come within {timeout.total_seconds():g} s")
        if place.rank == 0:
            for rank in missing:
                store.set(f"answer to {rank}", f"{read(f'word {rank}')} {word}")
            missing = [rank for rank in missing if read(f"heard by {rank}") != word]
        else:
            theirs, _, session = read(f"answer to {place.rank}").partition(" ")
            if theirs == word:
                store.set(f"heard by {place.rank}", session)
                return session
        time.sleep(0.02)
    return word


def row_buckets(model: Bert, gates: Sequence[float] | None = None) -> list[tuple[int, int]]:
    """Rows [first, last) of the bank whose gradients are sent together, topmost first: those of the window whose both halves a layer reads in
    this step.

    A layer that the step leaves out (gate 0) has no gradient on any rank, and sends none.
    """
    attention, feed_forward = _read(model, gates)
    size = model.bank.grads[0].nbytes
    buckets: list[tuple[int, int]] = []
    for row in reversed(range(*model.bank.window)):
        if row not in attention & feed_forward:
            continue
        if buckets and buckets[-1][0] == row + 1 and (buckets[-1][1] - buckets[-1][0]) * size < BUCKET:
            buckets[-1] = (row, buckets[-1][1])
        else:
            buckets.append((row, row + 1))
    return buckets


def halves(model: Bert) -> list[Tensor]:
    """Gradients in rows of the window that are read as attention or as feed-forward half alone: where layers share one of the two."""
    attention, feed_forward = _read(model)
    return [
        slot.view(model.bank.grads[row])
        for row in range(*model.bank.window)
        if row in attention ^ feed_forward
        for slot in model.bank.layout
        if slot.name.startswith(FEED_FORWARD) == (row in feed_forward)
    ]


def _read(model: Bert, gates: Sequence[float] | None = None) -> tuple[set[int], set[int]]:
    """Rows that layers read for their attention half and for their feed-forward half."""
    runs = [i for i in range(model.depth) if gates is None or gates[i] != 0.0]
    return {model.rows[i] for i in runs}, {model.ffn_rows[i] for i in runs}
