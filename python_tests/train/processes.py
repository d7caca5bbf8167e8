"""Functions run by several processes that are ranks of one run: what torchrun does, without its seconds of start."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback

import torch
import torch.distributed as dist

PRELOADED = ["stackbert_kernels.train.loop", "safetensors.torch", "torch._dynamo"]
"""By the server that forks the processes; the last is imported by the first step that an optimizer takes."""


def _child(work, rank, size, port, folder, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    from stackbert_kernels.train import distributed, loop

    loop.write_report, loop.exportable = (lambda directory: None), (lambda run, console: False)
    distributed.GRACE = 0.5
    try:
        result = work(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = error
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(result))
    os._exit(0)


def store():
    """What torchrun keeps for the processes that it starts, and for those that it starts again."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def ranks(size, work, *arguments, folder, kept=None):
    """What `work(*arguments)` returns, or the error that it raises, in each of `size` processes; None where one was killed."""
    kept = kept or store()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    given = [(work, rank, size, kept.port, folder, arguments) for rank in range(size)]
    processes = [context.Process(target=_child, args=each, daemon=True) for each in given]
    for process in processes:
        process.start()
    results = []
    for rank, process in enumerate(processes):
        process.join(120)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"rank {rank} of {size} hangs")
        file = folder / f"rank-{rank}"
        results.append(pickle.loads(file.read_bytes()) if file.exists() else None)
        file.unlink(missing_ok=True)
    return results
