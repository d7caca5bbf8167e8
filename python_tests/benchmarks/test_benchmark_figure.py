"""The pictures of op benchmarks: one an op, with every contender and the floor; without matplotlib a line that says so."""

import sys

import pytest
from result_samples import MACHINE, op_row

from benchmarks import figure, table


@pytest.fixture
def axes(monkeypatch):
    """The panels of each figure that is drawn, by the title of the figure's file."""
    drawn = {}
    monkeypatch.setattr(
        figure, "_save", lambda drawn_figure, path, mark: drawn.setdefault(path.name, drawn_figure.axes)
    )
    return drawn


def result(*rows):
    return {"machine": MACHINE, "rows": list(rows)}


def test_a_file_an_op(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [op_row(op="layer_norm"), op_row(op="gelu"), op_row(op="gelu", direction="backward")]
    written = figure.write(result(*rows), tmp_path)
    assert [path.name for path in written] == ["layer_norm.png", "gelu.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_panel_shows_every_contender_its_time_and_the_floor(tmp_path, axes):
    pytest.importorskip("matplotlib")
    times = {"native": 100e-6, "triton": 125e-6, "torch": 200e-6, "Liger": 160e-6}
    forward = op_row(times=times, nbytes=360_000_000, copy=4e12)  # 90 us of copying
    backward = op_row(times={"native": 300e-6}, direction="backward", wrong={"triton": "off by 1"})
    figure.write(result(forward, backward), tmp_path)
    (panel,) = axes["layer_norm.png"]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["native", "triton", "Liger", "torch", "native", "triton"]  # ours, then peers by time
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([100, 125, 160, 200, 300])
    texts = " | ".join(text.get_text() for text in panel.texts)
    for part in ("forward", "backward", "100 us   90% of ceiling", "160 us   x 1.60", "wrong: no time"):
        assert part in texts
    floors = [line.get_xdata()[0] for line in panel.lines if line.get_color() == figure.FLOOR]
    assert floors[0] == pytest.approx(90)
    assert panel.get_xscale() == "linear" and panel.get_title("left") == "65536 x 768 bf16 p=0.1"


def test_the_axis_is_logarithmic_only_where_a_bar_would_vanish(tmp_path, axes):
    pytest.importorskip("matplotlib")
    near, far = (
        op_row(case="near", times={"native": 1e-4, "torch": 1e-3}),
        op_row(case="far", times={"native": 1e-4, "torch": 1e-2}),
    )
    figure.write(result(near, far), tmp_path)
    assert [panel.get_xscale() for panel in axes["layer_norm.png"]] == ["linear", "log"]
    assert all(bar.get_width() <= panel.get_xlim()[1] for panel in axes["layer_norm.png"] for bar in panel.patches)


def test_a_wild_spread_moves_nothing_out_of_the_picture(tmp_path, axes):
    pytest.importorskip("matplotlib")
    row = op_row(times={"native": 1e-4, "torch": 2e-4})
    row["seconds"]["torch"]["p80"] = 5e-3
    figure.write(result(row), tmp_path)
    (panel,) = axes["layer_norm.png"]
    assert panel.get_xlim()[1] < 500
    assert all(text.xy[0] < panel.get_xlim()[1] for text in panel.texts if hasattr(text, "xy"))


def test_a_contender_keeps_its_colour(tmp_path, axes):
    pytest.importorskip("matplotlib")
    one = op_row(op="a", times={"native": 1.0, "torch": 2.0, "unheard of": 3.0})
    two = op_row(op="b", times={"native": 3.0, "torch": 2.0, "unheard of": 1.0})
    figure.write(result(one, two), tmp_path)

    def colours(panel):
        names = [label.get_text() for label in panel.get_yticklabels()]
        return {name: bar.get_facecolor() for name, bar in zip(names, panel.patches, strict=True)}

    assert colours(axes["a.png"][0]) == colours(axes["b.png"][0])
    assert len({figure.colour(name) for name in (*table.OURS, "torch")}) == 4


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert figure.write(result(op_row()), tmp_path) == [] and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "stackbert-kernels[plot]" in said
