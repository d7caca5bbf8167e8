"""The demonstration with a preset of seconds: it trains, predicts, and knows when it is done."""

from dataclasses import replace

import pytest

from stackbert_kernels import demo
from stackbert_kernels.config import DataConfig, ModelConfig, TrainConfig
from stackbert_kernels.data import documentation
from stackbert_kernels.recipes import MsltOptions, mslt


@pytest.mark.parametrize("preset", [demo.CPU, demo.GPU])
def test_the_presets_make_a_plan(preset):
    config = mslt(replace(preset, data=replace(preset.data, text=("x",))), demo.RECIPE)
    assert config.model.layers == 12 and len(config.stages) == 5


def test_it_trains_predicts_and_knows_when_it_is_done(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    gathered = []

    def prose(out):
        gathered.append(out)
        out.parent.mkdir(parents=True)
        out.write_text("\n\n".join(f"Return the value {i} of the list." for i in range(300)))

    tiny = TrainConfig(
        model=ModelConfig(layers=4, hidden=32, heads=2, max_position=64),
        data=DataConfig(train_vocab_size=80, seq_len=16, batch_tokens=64, heldout=0.1, eval_tokens=64),
        steps=6,
        threads=1,
    )
    monkeypatch.setattr(documentation, "documentation", prose)
    monkeypatch.setattr(demo, "CPU", tiny)
    monkeypatch.setattr(demo, "GPU", tiny)
    monkeypatch.setattr(demo, "RECIPE", MsltOptions(stages=2, joint=0.2))
    out = tmp_path / "demo"
    for expected in ("finished: ", "this run was already finished: "):
        assert demo.run(out) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(expected)
        for sentence in demo.SENTENCES:
            assert sentence in printed
    assert gathered == [out / "text" / "documentation.txt"]
    assert "stage" not in printed.splitlines()[0]
