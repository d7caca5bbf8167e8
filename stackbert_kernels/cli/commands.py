"""What each command does. What is slow to load is loaded inside, once everything that can be refused without it has been looked at."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING

from stackbert_kernels.cli.options import Checkpoint, Compare, Doctor, Grow, Prepare, Pretrain, Sweep, section
from stackbert_kernels.config import ConfigError, DataConfig, TrainConfig, differences, to_dict
from stackbert_kernels.plan import cost_table, plan, span_cost
from stackbert_kernels.recipes import RECIPES
from stackbert_kernels.train.torchrun import check_ranks, place, speaks

if TYPE_CHECKING:
    from stackbert_kernels.train.run_directory import Run

DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2
MOST_WORKERS = 1024


def complain(reason: object, code: int) -> int:
    """One line on stderr, and the exit code."""
    print(f"stackbert: {' '.join(str(reason).split())}", file=sys.stderr)
    return code


def _print(result: dict) -> None:
    print(json.dumps(result, indent=1))


def _pretrain(command: Pretrain) -> int:
    from stackbert_kernels.train.run_directory import check, open_run

    config = command.config()
    several = check_ranks(config).size > 1
    if command.dry_run:
        config = check(config, command.out, fresh=command.fresh)
        if not speaks():
            return DONE
        if command.json:
            costs = [span_cost(span) for span in plan(config)]
            _print({"config": to_dict(config), "relative_step_cost": costs})
        else:
            print(_outline(command, config))
        return DONE
    if config.device not in ("auto", "cpu") or config.impl != "auto":
        check(config, command.out, fresh=command.fresh)
        from stackbert_kernels.train.machine import check_machine

        check_machine(config)
    if several:
        from stackbert_kernels.train.loop import execute, together

        with together(config) as ranks:
            run = ranks.open(config, command.out, fresh=command.fresh)
            if ranks.rank == 0:
                _announce(run, command)
            result = execute(run, ranks=ranks)
    else:
        run = open_run(config, command.out, fresh=command.fresh, progress=True)
        _announce(run, command)

        from stackbert_kernels.train.loop import execute

        result = execute(run)
    if not speaks():
        return FAILED if result["status"] == "failed" else DONE
    if command.json:
        _print(result)
    else:
        print(summary(run.config, result))
    return FAILED if result["status"] == "failed" else DONE


def _announce(run: Run, command: Pretrain) -> None:
    if not run.finished:
        print(_outline(command, run.config), file=sys.stderr)


def _outline(command: Pretrain, config: TrainConfig) -> str:
    """Stages and cost of `config`, and what else its recipe has set."""
    lines = [cost_table(config)]
    changed = differences(command.base(), command.config(), leaving=("stages", "recipe"))
    if changed:
        lines.append(f"set by {command.recipe}: {', '.join(changed)}")
    return "\n".join(lines)


def summary(config: TrainConfig, result: dict) -> str:
    """What train.loop.execute returned, for a person: the predicted cost of each stage beside the measured one."""
    lines = [result["message"]]
    if result["status"] == "finished":
        lines += ["", cost_table(config, result["stage_seconds"]), ""]
        lines += [
            f"held-out loss {'not finite' if result['eval_loss'] is None else format(result['eval_loss'], '.3f')} (without context {result['unigram_loss']:.3f}), "
            f"accuracy {result['eval_accuracy']:.3f} (without context {result['unigram_accuracy']:.3f}) "
            f"after {result['tokens']:,} tokens in {result['seconds']:.0f} s of training"
        ]
        lines += [f"model   {result['model'] or '-'}", f"report  {result['report']}"]
    return "\n".join(lines)


def _sweep(command: Sweep) -> int:
    from stackbert_kernels import sweep as sweeps

    if place().size > 1:
        raise ConfigError(f"sweep times its runs in one process, got {place().size}: start it without torchrun")
    recipes = tuple(name for name in command.recipes.split(",") if name)
    chosen = {name: getattr(command, name) for name, (_, options) in RECIPES.items() if fields(options)}
    sweep = sweeps.Sweep(
        base=command.base(),
        methods=recipes,
        directory=command.out,
        seconds=60 * command.minutes,
        seeds=command.seeds,
        warmup=command.warmup_share,
        jobs=command.jobs,
        tune=command.tune,
        tune_seconds=60 * (command.tune_minutes or command.minutes / 4),
        source_share=command.source_share,
        until=time.monotonic() + 60 * command.stop_after if command.stop_after else float("inf"),
        rates=command.rates(recipes),
        options={name: value for name, value in chosen.items() if value != type(value)()},
    )
    sweep = sweeps.checked(sweep, fresh=command.fresh)
    if command.dry_run:
        plan = sweeps.outline(sweep)
        _print({"outline": plan.splitlines(), **sweeps.amount(sweep)}) if command.json else print(plan)
        return DONE
    from stackbert_kernels.train.machine import check_machine

    check_machine(sweep.base)
    if command.fresh:
        sweeps.remove(sweep)
    print(sweeps.outline(sweep), file=sys.stderr)
    result = sweeps.run_sweep(sweep, say=lambda line: print(line, file=sys.stderr, flush=True))
    if command.json:
        _print(result)
    elif result["comparison"]:
        from stackbert_kernels.compare.table import text

        print(text(result["comparison"]))
    if result["status"] == "stopped":
        return complain("stopped; the same command goes on", FAILED)
    if result["status"] == "failed":
        return complain(f"{len(result['failed'])} of the runs failed: {', '.join(result['failed'])}", FAILED)
    return DONE if result["comparison"] else complain(result["why_none"], FAILED)


def _compare(command: Compare) -> int:
    from stackbert_kernels.compare.comparison import compare

    if not command.runs:
        raise ConfigError("compare: wanted at least one run directory, got none")
    result = compare(
        command.runs,
        baseline=command.baseline,
        free_source=command.free_source,
        counting=command.flops,
        clock=command.clock,
    )
    if command.out:
        from stackbert_kernels.compare.output import write

        written = write(result, command.out)
    if command.json:
        _print(result)
    else:
        from stackbert_kernels.compare.table import text

        print(text(result))
        if command.out:
            print("\n" + "\n".join(map(str, written)))
    return DONE


def _prepare(command: Prepare) -> int:
    from stackbert_kernels.data.prepare import load_manifest, prepare

    if not 0 <= command.workers <= MOST_WORKERS:
        raise ConfigError(f"workers must be in [0, {MOST_WORKERS}], got {command.workers}")
    directory = prepare(
        command.data.text, command.out, section(command.data, DataConfig), workers=command.workers or None
    )
    manifest = load_manifest(directory)
    result = {"out": str(directory), "vocab_size": manifest["vocab_size"]}
    result |= {
        split: {k: v for k, v in counts.items() if k != "shards"} for split, counts in manifest["splits"].items()
    }
    if command.json:
        _print(result)
    else:
        train, heldout = result["train"], result["heldout"]
        print(
            f"{directory}: {train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
            f"{heldout['tokens']:,} of {heldout['documents']:,} held out, {result['vocab_size']:,} words"
        )
    return DONE


def _doctor(command: Doctor) -> int:
    from stackbert_kernels.doctor import doctor, render

    report = doctor()
    if command.json:
        _print(report)
    else:
        print(render(report))
    return DONE if report["passed"] else FAILED


def _grow(command: Grow) -> int:
    from stackbert_kernels.growth.checkpoint import grow_checkpoint

    report = grow_checkpoint(
        command.source,
        command.out,
        command.layers,
        command.operator,
        optimizer_state=command.optimizer_state,
        seed=command.seed,
        overwrite=command.overwrite,
    )
    if command.json:
        _print(report.to_dict())
    else:
        print(report)
    return DONE


def _checkpoint(command: Checkpoint) -> int:
    from stackbert_kernels.train.checkpoint import MANIFEST, saved, verify
    from stackbert_kernels.train.run_directory import CHECKPOINTS

    directory = command.directory
    paths = next((p for p in (saved(directory / CHECKPOINTS), saved(directory)) if p), [])
    if not paths and (directory / MANIFEST).exists():
        paths = [directory]
    if not paths:
        raise ConfigError(
            f"checkpoint verify needs a run directory, a checkpoints folder or a checkpoint, got {directory}"
        )
    problems = {str(path): verify(path) for path in paths}
    if command.json:
        _print(problems)
    else:
        for path, found in problems.items():
            print("\n".join(f"{path}: {problem}" for problem in found) or f"{path}: whole")
    return FAILED if any(problems.values()) else DONE


COMMANDS = {
    Pretrain: _pretrain,
    Sweep: _sweep,
    Compare: _compare,
    Prepare: _prepare,
    Doctor: _doctor,
    Grow: _grow,
    Checkpoint: _checkpoint,
}
