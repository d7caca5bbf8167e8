"""Every method on the same text, batches, budget of seconds and evaluation, each seed a run; then their comparison.

    DIR/data/              token shards, once for all, unless the text was given as a prepared directory
    DIR/sweep.json         how many runs there were at a time; of each method how long its steps took, which rates were tried, what follows
    DIR/METHOD-seedN/      run directories
    DIR/sources/           the smaller models that runs train first, where their method needs one and none was given
    DIR/tuning/            trials of rates
    DIR/.logs/             what the processes of the runs wrote, where several run at a time
    DIR/compare.json  compare.png

Same seed, same batches in the same order and the same evaluation, whatever the method. Each method is timed for a few steps of every stage
first; from that follows how many steps fit into the budget, over which the method lays its own stages and everyone the same shape of warm-up
and decay. Runs go seed by seed, so that what was finished at any moment is a fair comparison and a slow hour of the machine meets all
methods alike. The same command goes on where a sweep stopped; more methods and more seeds can be added to it.

settings.py      what is run
check.py         what is refused before work, and the plan for a person
record.py        sweep.json
run.py           the order of things: making.py times the methods and makes their runs, tuning.py finds their rates
work.py          one run, or one timing
performing.py    pieces of work one after another, or by side_by_side.py several at a time, each in a process of its own (process.py)
"""

from __future__ import annotations

from stackbert_kernels.sweep.check import amount, checked, outline
from stackbert_kernels.sweep.run import remove, run_sweep
from stackbert_kernels.sweep.settings import Sweep

__all__ = ["Sweep", "amount", "checked", "outline", "remove", "run_sweep"]
