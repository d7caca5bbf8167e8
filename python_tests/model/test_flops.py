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
    """All but attention's and the decoder's, which are inside our ops, where torch's counter does not look: those are taken off."""
    config = ModelConfig(
        layers=4, hidden=C, heads=2, vocab_size=V, max_position=S, objective=objective, embedding=embedding
    )
    tokens, masked = B * S, torch.arange(0, B * S, 4)
    full = replace(batch((S,) * B, pair=objective != "mlm", vocab_size=V), masked=masked, labels=masked % V)
    model = Bert(config)
    model.use(stage.depth, stage.train_from, stage.embeddings)
    with FlopCounterMode(display=False) as counter:
        model(full, rng=ops.new_rng(1, 1)).loss.backward()

    plan = TrainConfig(model=config, data=DataConfig(seq_len=S, batch_tokens=tokens, mask_rate=len(masked) / tokens))
    learning = stage.depth if stage.embeddings == "full" else stage.depth - stage.train_from
    attention = (4 * stage.depth + 8 * learning) * S * C * tokens
    decoder = (2 if stage.embeddings == "freeze" else 3) * 2 * config.embedding_width * V * len(masked)
    assert counter.get_total_flops() == flops_per_token(plan, stage) * tokens - attention - decoder
