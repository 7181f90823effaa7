"""The picture of a run: what is drawn, in which unit, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest

from fastgpt.config import DataConfig, TrainConfig
from fastgpt.errors import UserError
from fastgpt.plot import Run, _draw, plot, plot_runs, smoothed

OTHERS = {"uniform": 3.5, "gzip -9 per file": 2.12, "xz -9e per file": 2.10, "xz -9e in one stream": 1.64}


def write_run(folder, *, steps=50, dataset=True, ladder=False):
    folder.mkdir(parents=True)
    data = folder / "data"
    data.mkdir()
    (folder / "config.toml").write_text(TrainConfig(data=DataConfig(path=str(data))).to_toml())
    (folder / "tokenizer.json").write_text("a tokenizer")
    if dataset:
        (data / "tokenizer.json").write_text("a tokenizer")
        split = {"tokens": 1000, "text_bytes": 1990, "documents": 10}
        (data / "dataset.json").write_text(json.dumps({"splits": {"train": split}}))
    if ladder:
        (folder / "ladder.json").write_text(json.dumps({"others": OTHERS}))
    rows = [{"step": s, "seconds": s / 2, "loss": 2.0 + 3.0 / s} for s in range(1, steps + 1)]
    rows.insert(3, {"step": 4, "skipped": True, "samples": [0, 8]})
    rows.insert(5, {"step": 5, "seconds": 2.5, "loss": math.nan})
    rows += [
        {"step": s, "seconds": s / 2, "val_loss": 3.0, "val_bits_per_byte": 2.0 + 1 / (s + 1)} for s in (0, 10, steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(*runs):
    """The axes, drawn."""
    from matplotlib.figure import Figure

    figure = Figure()
    _draw(figure, [Run.read(run) for run in runs])
    return figure.axes[0]


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_a_png_is_made(tmp_path):
    path = plot(write_run(tmp_path / "run", ladder=True))
    assert path == tmp_path / "run" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        ["config.toml", "data", "ladder.json", "loss.png", "metrics.jsonl", "tokenizer.json"]
    )


@pytest.mark.parametrize(("name", "magic"), [("a.svg", b"<?xml"), ("b.pdf", b"%PDF")])
def test_other_formats(tmp_path, name, magic):
    assert plot(write_run(tmp_path / "run"), tmp_path / name).read_bytes().startswith(magic)


def test_every_compressor_is_a_labelled_line(tmp_path):
    axes = drawn(write_run(tmp_path / "run", ladder=True))
    heights = [line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[-1]]
    for name, value in OTHERS.items():
        assert f"{name} {value:.2f}" in words(axes)
        assert value in heights
        assert axes.get_ylim()[0] < value < axes.get_ylim()[1]
    assert "fastgpt, held out 2.02" in words(axes)


def test_labels_do_not_overlap(tmp_path):
    axes = drawn(write_run(tmp_path / "run", ladder=True))
    right = sorted(text.get_position()[1] for text in axes.texts if text.get_transform() is axes.transAxes)
    assert len(right) == len(OTHERS) + 2
    assert min(b - a for a, b in itertools.pairwise(right)) > 0.034


def test_sample_times_are_marked(tmp_path):
    axes = drawn(write_run(tmp_path / "run", ladder=True))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "5", "25"]
    assert "3.00" in words(axes) and "2.09" in words(axes)


def test_the_training_loss_is_in_bits_per_byte_of_the_training_text(tmp_path):
    axes = drawn(write_run(tmp_path / "run"))
    raw = next(line for line in axes.lines if len(line.get_xdata()) == 50)  # the line that is not finite is left out
    # 2 bytes a token in the training text, whatever it is in the validations; the first loss is 5 nats a token
    assert raw.get_ydata()[0] == pytest.approx(5.0 / math.log(2) / 2)
    assert "bits per byte, each text by its own bytes per token" in axes.get_title(loc="left")


def test_data_prepared_anew_with_another_tokenizer_say_nothing_about_the_run(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "data" / "tokenizer.json").write_text("another tokenizer")
    assert drawn(run).get_title(loc="left") == "run: nats per token; less is better"


def test_nats_per_token_where_the_dataset_is_gone(tmp_path):
    axes = drawn(write_run(tmp_path / "run", dataset=False, ladder=True))
    assert "nats per token" in axes.get_title(loc="left")
    assert "held out 3.00" in words(axes)
    assert not any("gzip" in text for text in words(axes))  # those are bits per byte


def test_several_runs_in_one_picture(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=80)
    assert words(drawn(one, two)) == ["two, held out 2.01", "one, held out 2.02"]
    mixed = drawn(one, write_run(tmp_path / "three", dataset=False))
    assert "nats per token" in mixed.get_title(loc="left")


def test_several_runs_leave_the_pictures_of_each_alone(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    alone = plot(one).read_bytes()
    assert plot_runs([one, two]) == tmp_path / "loss-2-runs.png"
    assert plot_runs([one, two, one]) == tmp_path / "loss-3-runs.png"
    assert plot(one).read_bytes() == alone


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([5.0, 1.0])[0] == 5.0


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        plot(tmp_path)
    with pytest.raises(UserError, match=r"\.png, \.svg, \.pdf"):
        plot(run, tmp_path / "a.bmp")
    with pytest.raises(UserError, match="cannot write"):
        plot(run, tmp_path / "nowhere" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no losses yet"):
        plot(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot(run)
