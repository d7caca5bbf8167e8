"""python -m stackbert_kernels.demo: pre-trains a small 12-layer BERT by MSLT on the documentation of this machine's Python.

The same code as `stackbert pretrain` with the presets below; the same command goes on, or shows the predictions of a finished run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from stackbert_kernels.cli import BAD_ARGUMENTS, DONE, FAILED, complain, summary
from stackbert_kernels.config import ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stackbert_kernels.plan import cost_table
from stackbert_kernels.recipes import MsltOptions, mslt
from stackbert_kernels.train.checkpoint import CheckpointError

# Many small steps and a high mask rate leave the unigram plateau soonest. Most of them go to the first stage, where a step costs a third
# of a full one and the embeddings learn: attention begins to help only after 2,000 to 4,000 of them, by the seed (at 2e-3, later still). No
# dropout: over these four passes of the text the held-out loss keeps up with the training loss.
# init_std: queries and keys of width 128 start as large as BERT's 0.02 makes those of width 768.
CPU = TrainConfig(
    model=ModelConfig(layers=12, hidden=128, heads=2, max_position=64, dropout=0.0, init_std=0.05),
    data=DataConfig(train_vocab_size=8192, seq_len=64, batch_tokens=512, mask_rate=0.30, eval_tokens=16384),
    optim=OptimConfig(lr=1e-3, warmup=300, beta2=0.98),
    steps=8500,
    checkpoint_every=1000,
    eval_every=500,
    log_every=20,
)
GPU = TrainConfig(
    model=ModelConfig(layers=12, hidden=384, heads=6, max_position=128),
    data=DataConfig(train_vocab_size=16384, seq_len=128, batch_tokens=8192, mask_rate=0.30),
    optim=OptimConfig(lr=1e-3, warmup=500),
    steps=10_000,
    precision="bf16",
    device="cuda",
    checkpoint_every=1000,
    eval_every=1000,
    log_every=50,
)
RECIPE = MsltOptions(stages=4, joint=0.06, stage_weights=(13, 1, 1, 1))

SENTENCES = (
    "Return the [MASK] of the list.",
    "Raises a ValueError if the argument is not [MASK].",
    "This function returns [MASK] if the file exists.",
    "The default [MASK] is None.",
    "If the key is not in the [MASK], raise a KeyError.",
    "The shape of the output [MASK] is the same as the input.",
)


@dataclass(frozen=True)
class Demo:
    """Pre-train a small 12-layer BERT on documentation and look at what it has learned: 2-4 minutes on two CPU cores."""

    out: Path = Path("runs/demo")
    """The run directory."""
    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Start over."""


def main() -> int:
    options = tyro.cli(Demo, prog="python -m stackbert_kernels.demo")
    try:
        return run(options.out, options.fresh)
    except ConfigError as error:
        return complain(error, BAD_ARGUMENTS)
    except (CheckpointError, OSError) as error:
        return complain(error, FAILED)


def run(out: Path, fresh: bool = False) -> int:
    """Gathers the text, trains or goes on, prints what came out."""
    import torch

    from stackbert_kernels.data.documentation import documentation
    from stackbert_kernels.train.loop import execute
    from stackbert_kernels.train.run_directory import TEXT, open_run

    text = out / TEXT / "documentation.txt"
    if not text.exists():
        print(f"gathering the documentation of Python and its packages: {text}", file=sys.stderr)
        documentation(text)
    preset = GPU if torch.cuda.is_available() else CPU
    config = mslt(replace(preset, data=replace(preset.data, text=(str(text),))), RECIPE)
    opened = open_run(config, out, fresh=fresh)
    if not opened.finished:
        print(cost_table(opened.config), file=sys.stderr)
    result = execute(opened)
    print(summary(opened.config, result))
    if result["status"] != "finished":
        return FAILED if result["status"] == "failed" else DONE
    if result["model"]:
        print("\n" + predictions(result["model"]))
    return DONE


def predictions(model: str, sentences: tuple[str, ...] = SENTENCES) -> str:
    """A table: what transformers' fill-mask pipeline makes of `sentences` with the exported model."""
    import transformers

    transformers.logging.disable_progress_bar()
    fill = transformers.pipeline("fill-mask", model=model, device="cpu")
    rows = []
    for sentence in sentences:
        best = fill(sentence, top_k=4)
        rows.append((sentence, "  ".join(f"{p['token_str'].strip()} {p['score']:.2f}" for p in best)))
    width = max(len(sentence) for sentence, _ in rows)
    return "\n".join(f"{sentence:{width}}  {words}" for sentence, words in rows)


if __name__ == "__main__":
    sys.exit(main())
