"""The plan's FLOPs are those that the model executes: counted by torch, product by product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from samples import batch
from torch.utils.flop_counter import FlopCounterMode

from stackbert_kernels import ops
from stackbert_kernels.config import DataConfig, ModelConfig, Stage, TrainConfig
from stackbert_kernels.model import Bert
from stackbert_kernels.plan import flops_per_token

B, S, C, V = 4, 16, 32, 96
STAGES = [
    Stage(steps=1, depth=4),
    Stage(steps=1, depth=2),
    Stage(steps=1, depth=4, embeddings="freeze"),
    Stage(steps=1, depth=4, train_from=2, embeddings="freeze"),
    Stage(steps=1, depth=4, train_from=2, embeddings="output_grad"),
    Stage(steps=1, depth=4, train_from=2, embeddings="untie"),
    Stage(steps=1, depth=4, train_from=2, embeddings="full"),
]


@pytest.mark.parametrize("embedding", [0, 8])
@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda s: f"{s.depth}-{s.train_from}-{s.embeddings}")
def test_matrix_products_are_those_of_the_plan(stage, objective, embedding):
    check(stage, objective=objective, embedding=embedding)


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[3], STAGES[6]], ids=lambda s: f"{s.depth}-{s.train_from}")
@pytest.mark.parametrize("relaxed", [{"rank": 8}, {"score_dim": 4}, {"rank": 5, "score_dim": 9}], ids=str)
def test_those_of_relaxed_layers_too(stage, relaxed):
    check(replace(stage, **relaxed), **relaxed)


def check(stage: Stage, **changes) -> None:
    """All but attention's and the decoder's, which are inside our ops, where torch's counter does not look: those are taken off."""
    config = ModelConfig(layers=4, hidden=C, heads=2, vocab_size=V, max_position=S, **changes)
    objective = config.objective
    tokens, masked = B * S, torch.arange(0, B * S, 4)
    full = replace(batch((S,) * B, pair=objective != "mlm", vocab_size=V), masked=masked, labels=masked % V)
    model = Bert(config)
    model.use(stage.depth, stage.train_from, stage.embeddings)
    with FlopCounterMode(display=False) as counter:
        model(full, rng=ops.new_rng(1, 1)).loss.backward()

    whole = replace(config, rank=0, score_dim=0)  # in a run, layers are relaxed by the stage
    plan = TrainConfig(model=whole, data=DataConfig(seq_len=S, batch_tokens=tokens, mask_rate=len(masked) / tokens))
    learning = stage.depth if stage.embeddings == "full" else stage.depth - stage.train_from
    attention = (4 * stage.depth + 8 * learning) * S * C * tokens
    decoder = (2 if stage.embeddings == "freeze" else 3) * 2 * config.embedding_width * V * len(masked)
    assert counter.get_total_flops() == flops_per_token(plan, stage) * tokens - attention - decoder
