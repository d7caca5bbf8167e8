"""Configurations: each refusal names what was wanted and what was given, and JSON brings back what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from stackbert_kernels.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Stage,
    TrainConfig,
    check_growth,
    differences,
    from_dict,
    to_dict,
)

SMALL = ModelConfig(layers=4, hidden=32, heads=2)
GROWN = TrainConfig(model=SMALL, steps=10, stages=(Stage(steps=4, depth=2), Stage(steps=6, depth=4, grow="copy_top")))


def stages(*given: Stage) -> TrainConfig:
    return TrainConfig(model=SMALL, steps=sum(s.steps for s in given), stages=given)


REFUSED = [
    (lambda: ModelConfig(layers=0), "layers must be > 0 and finite, got 0"),
    (lambda: ModelConfig(hidden=100, heads=12), "hidden must be divisible by heads, got hidden 100, heads 12"),
    (lambda: ModelConfig(inner=-1), "inner must be >= 0, got -1"),
    (lambda: ModelConfig(vocab_size=-1), "vocab_size must be >= 0, got -1"),
    (lambda: ModelConfig(activation="relu"), "activation must be one of gelu, gelu_tanh, got 'relu'"),
    (lambda: ModelConfig(norm="none"), "norm must be one of post, pre, got 'none'"),
    (lambda: ModelConfig(objective="clm"), "objective must be one of mlm, mlm+nsp, mlm+sop, got 'clm'"),
    (lambda: ModelConfig(norm_eps=0.0), "norm_eps must be > 0 and finite, got 0.0"),
    (lambda: ModelConfig(dropout=1.0), "dropout must be in [0, 0.998), got 1.0"),
    (lambda: ModelConfig(attention_dropout=-0.1), "attention_dropout must be in [0, 0.998), got -0.1"),
    (lambda: DataConfig(seq_len=4), "seq_len must be >= 8, got 4"),
    (lambda: DataConfig(seq_len=128, batch_tokens=64), "batch_tokens must be >= seq_len, got batch_tokens 64, seq_len 128"),
    (lambda: DataConfig(mask_rate=1.0), "mask_rate must be in [0, 1), got 1.0"),
    (lambda: DataConfig(mask_rate=0.0), "mask_rate must be > 0 and finite, got 0.0"),
    (lambda: DataConfig(heldout=0.0), "heldout must be > 0 and finite, got 0.0"),
    (lambda: DataConfig(eval_tokens=0), "eval_tokens must be > 0 and finite, got 0"),
    (lambda: OptimConfig(lr=-1.0), "lr must be > 0 and finite, got -1.0"),
    (lambda: OptimConfig(lr=float("nan")), "lr must be > 0 and finite, got nan"),
    (lambda: OptimConfig(lr=float("inf")), "lr must be > 0 and finite, got inf"),
    (lambda: OptimConfig(beta2=1.0), "beta2 must be in [0, 1), got 1.0"),
    (lambda: OptimConfig(warmup=-1), "warmup must be >= 0, got -1"),
    (lambda: OptimConfig(constant=-1), "constant must be >= 0, got -1"),
    (lambda: OptimConfig(optimizer="adam"), "optimizer must be one of adamw, lamb, lans, got 'adam'"),
    (lambda: OptimConfig(eps=1e-40), "eps must be >= 1e-30, got 1e-40"),
    (lambda: OptimConfig(accumulate=0), "accumulate must be > 0 and finite, got 0"),
    (lambda: Stage(steps=0, depth=1), "steps must be > 0 and finite, got 0"),
    (lambda: Stage(steps=1, depth=3, train_from=3), "train_from must be in [0, depth), got train_from 3, depth 3"),
    (lambda: Stage(steps=1, depth=3, embeddings="tie"), "embeddings must be one of train, freeze, output_grad, untie, full, got 'tie'"),
    (lambda: Stage(steps=1, depth=3, train_from=1), "embeddings cannot be 'train' where train_from is 1"),
    (lambda: Stage(steps=1, depth=3, optimizer_state="keep"), "optimizer_state must be one of copy, zero, reset, got 'keep'"),
    (lambda: Stage(steps=1, depth=3, lr_policy="cosine"), "lr_policy must be one of global, restart, curve, got 'cosine'"),
    (lambda: Stage(steps=1, depth=3, lr_policy="curve"), "lr_curve belongs to lr_policy 'curve' and to no other, got lr_policy 'curve' with 0 points"),
    (lambda: Stage(steps=1, depth=3, lr_curve=((0, 1), (1, 0))), "lr_curve belongs to lr_policy 'curve' and to no other, got lr_policy 'global'"),
    (lambda: Stage(steps=5, depth=3, lr_policy="curve", lr_curve=((1, 1), (4, 0))), "lr_curve must rise from step 0, got steps [1, 4]"),
    (lambda: Stage(steps=5, depth=3, lr_policy="curve", lr_curve=((0, 1), (0, 0))), "lr_curve must rise from step 0, got steps [0, 0]"),
    (lambda: Stage(steps=5, depth=3, lr_policy="curve", lr_curve=((0, -1), (5, 0))), "lr_curve must hold pairs (step, share >= 0), got"),
    (lambda: ModelConfig(embedding=-1), "embedding must be >= 0, got -1"),
    (lambda: DataConfig(max_ngram=0), "max_ngram must be in [1, 16], got 0"),
    (lambda: Stage(steps=5, depth=3, rewarm=6), "rewarm must be in [0, steps], got rewarm 6, steps 5"),
    (lambda: stages(Stage(steps=1, depth=4, grow="stack")), "stages[0]: there is nothing to grow from, got grow='stack'"),
    (lambda: stages(Stage(steps=1, depth=2), Stage(steps=1, depth=4)), "stages[1]: depth 2 -> 4 needs grow, got grow=None"),
    (lambda: stages(Stage(steps=1, depth=4), Stage(steps=1, depth=2)), "stages[1]: depth 4 -> 2 would drop layers"),
    (lambda: stages(Stage(steps=1, depth=4), Stage(steps=1, depth=4, grow="stack")), "stages[1]: depth stays 4, got grow='stack'"),
    (lambda: stages(Stage(steps=1, depth=2), Stage(steps=1, depth=4, grow="double")), "stages[1]: grow must be one of copy_top, stack,"),
    (lambda: stages(Stage(steps=1, depth=1), Stage(steps=1, depth=4, grow="copy_top")), "stages[1]: copy_top can at most double the depth, got 1 -> 4"),
    (lambda: stages(Stage(steps=1, depth=3), Stage(steps=1, depth=4, grow="stack")), "stages[1]: stack needs a multiple of the old depth, got 3 -> 4"),
    (lambda: stages(Stage(steps=1, depth=2)), "stages[0]: the last stage must reach all 4 layers, got depth 2"),
    (lambda: replace(GROWN, steps=11), "stages: their steps must sum to 11, got 10"),
    (lambda: check_growth("random", 4, 4), "random needs 0 < old depth < new depth, got 4 -> 4"),
    (lambda: TrainConfig(steps=0), "steps must be > 0 and finite, got 0"),
    (lambda: TrainConfig(keep=0), "keep must be >= 1, got 0"),
    (lambda: TrainConfig(threads=-1), "threads must be >= 0, got -1"),
    (lambda: TrainConfig(precision="fp8"), "precision must be one of fp32, bf16, got 'fp8'"),
    (lambda: TrainConfig(impl="fast"), "impl must be one of auto, reference, native, triton, got 'fast'"),
    (lambda: TrainConfig(device="cuda:x"), "device must be auto, cpu, cuda or cuda:N, got 'cuda:x'"),
    (lambda: TrainConfig(data=DataConfig(seq_len=1024)), "seq_len must be <= max_position, got seq_len 1024, max_position 512"),
    (lambda: TrainConfig(steps=100, optim=OptimConfig(warmup=100)), "warmup must be < steps, got warmup 100, steps 100"),
    (lambda: TrainConfig(steps=100, optim=OptimConfig(warmup=60, constant=40)), "warmup + constant must be < steps, got warmup 60, constant 40, steps 100"),
    (lambda: from_dict({"stepz": 5}), "TrainConfig has no field 'stepz'; did you mean 'steps'?"),
    (lambda: from_dict({"model": {"xyz": 5}}), "ModelConfig has no field 'model.xyz'; it has layers, hidden,"),
    (lambda: from_dict({"stages": [{"steps": 5, "depht": 4}]}), "Stage has no field 'stages[0].depht'; did you mean 'depth'?"),
    (lambda: from_dict({"stages": [{"steps": 5}]}), "stages[0] needs depth, got steps"),
    (lambda: from_dict({"steps": "5"}), "steps must be int, got '5'"),
    (lambda: from_dict({"steps": 5.0}), "steps must be int, got 5.0"),
    (lambda: from_dict({"steps": True}), "steps must be int, got True"),
    (lambda: from_dict({"optim": {"lr": "fast"}}), "optim.lr must be float, got 'fast'"),
    (lambda: from_dict({"model": {"attention_dropout": "no"}}), "model.attention_dropout must be float or null, got 'no'"),
    (lambda: from_dict({"model": 3}), "model must be an object, got 3"),
    (lambda: from_dict({"stages": 3}), "stages must be a list, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refuses(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_defaults_are_resolved():
    model = ModelConfig(hidden=64, heads=4, dropout=0.2)
    assert (model.inner, model.attention_dropout, model.head_dim) == (256, 0.2, 16)
    assert TrainConfig(model=SMALL, steps=7).stages == (Stage(steps=7, depth=4, name="all layers"),)


def test_json_brings_a_configuration_back():
    config = replace(
        GROWN, data=DataConfig(text=("a.txt", "b.txt"), whole_word=True), optim=OptimConfig(lr=3e-4, warmup=2)
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict({}) == TrainConfig()
    assert from_dict({"optim": {"lr": 1}}).optim.lr == 1.0


def test_differences_name_the_fields():
    assert differences(GROWN, GROWN) == []
    assert differences(GROWN, replace(GROWN, checkpoint_every=1, keep=9, log_every=1)) == []
    other = replace(
        GROWN,
        seed=3,
        threads=1,
        optim=OptimConfig(lr=2e-4),
        stages=(GROWN.stages[0], replace(GROWN.stages[1], rewarm=2)),
    )
    assert differences(GROWN, other) == [
        "lr: 0.0001 -> 0.0002",
        "stages[1].rewarm: 0 -> 2",
        "seed: 0 -> 3",
        "threads: 0 -> 1",
    ]
    assert differences(GROWN, replace(GROWN, stages=())) == ["stages: 2 stages -> 1 stages"]


def test_field_names_are_unique_over_the_sections():
    """They become options of the command line without a prefix."""
    names = [f.name for cls in (ModelConfig, DataConfig, OptimConfig, TrainConfig) for f in fields(cls)]
    assert len(names) == len(set(names))


def test_nothing_heavy_is_imported():
    code = "import sys, stackbert_kernels.config, stackbert_kernels.plan, stackbert_kernels.recipes, stackbert_kernels.growth.depth; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
