"""The figures: what is drawn, what is left out, and the errors where there is nothing to draw."""

import json
import math

import matplotlib.figure
import pytest

from creature import finalize
from creature.errors import UserError
from creature.plots import plot_progression, plot_runs, smooth


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, to look into."""
    saved = []
    original = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        return original(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def make_run(folder, steps=60, streams=(), evaluations=True, tail=""):
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, 10 * steps + 1, 10):
        loss = 3 + 7 * math.exp(-step / 60)
        entry = {"step": step, "tokens": step * 1000, "time": step * 30.0, "loss": loss, "loss_internal_text": loss}
        entry |= {"tokens_per_second": 1e5, "mfu": 0.4, **{f"loss_{name}": loss / 2 for name in streams}}
        lines.append(json.dumps(entry))
        if evaluations and step % 100 == 0:
            lines.append(
                json.dumps({"step": step, "tokens": step * 1000, "time": step * 30.0, "eval_loss": loss + 0.1})
            )
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail, encoding="utf-8")
    return folder


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_one_run(tmp_path, figures):
    output = plot_runs([make_run(tmp_path / "text_only")], tmp_path / "loss.png")
    assert output.read_bytes().startswith(b"\x89PNG")
    loss, throughput = figures[0].axes
    assert loss.get_title(loc="left") == "text_only"
    assert len(legend(loss)) == 2 and "validation (last 3.1" in legend(loss)[1]
    dots = loss.lines[-1]
    assert list(dots.get_xdata()) == [100, 200, 300, 400, 500, 600]
    assert throughput.get_xlabel() == "step" and throughput.get_ylim()[0] == 0


def test_the_scale_shows_what_comes_after_the_first_fall(tmp_path, figures):
    plot_runs([make_run(tmp_path / "run", steps=400)], tmp_path / "loss.png")
    assert figures[0].axes[0].get_ylim()[1] < 6  # the curve begins at 8.9


def test_several_runs_over_steps_tokens_and_time(tmp_path, figures):
    runs = [make_run(tmp_path / "a" / "text_only"), make_run(tmp_path / "b" / "text_only", steps=30)]
    plot_runs(runs, tmp_path / "steps.png")
    plot_runs(runs, tmp_path / "tokens.svg", x="tokens")
    plot_runs(runs, tmp_path / "time.pdf", x="time")
    assert "a/text_only" in legend(figures[0].axes[0])  # distinguished by the folder above
    assert [figure.axes[1].get_xlabel() for figure in figures] == ["step", "tokens", "time (hours)"]
    assert [figure.axes[0].lines[0].get_xdata()[-1] for figure in figures] == [600, 600_000, 5.0]
    with pytest.raises(UserError, match="given twice"):
        plot_runs([runs[0], runs[0]], tmp_path / "twice.png")


def test_streams_have_panels_only_when_there_are_several(tmp_path, figures):
    plot_runs([make_run(tmp_path / "one")], tmp_path / "one.png")
    plot_runs([make_run(tmp_path / "two", streams=("audio",))], tmp_path / "two.png")
    labels = [[axes.get_ylabel() for axes in figure.axes] for figure in figures]
    assert labels[0] == ["loss (nats per token)", "tokens/s"]
    assert labels[1] == ["loss (nats per token)", "audio loss", "internal_text loss", "tokens/s"]


def test_throughput_has_mfu_where_it_is_known(tmp_path, figures):
    run, metrics = make_run(tmp_path / "run"), ("tokens_per_second", "mfu")
    plot_runs([run], tmp_path / "known.png", metrics)
    text = (run / "metrics.jsonl").read_text().replace('"mfu": 0.4', '"mfu": null')
    (run / "metrics.jsonl").write_text(text)
    plot_runs([run], tmp_path / "unknown.png", metrics)
    assert [len(figure.axes) for figure in figures] == [2, 1]
    assert figures[0].axes[1].lines[0].get_ydata()[0] == pytest.approx(0.4)


@pytest.mark.parametrize("tail", ['{"step": 61', "\x00\x00\n", '{"step": "x"}\n'])
def test_a_broken_last_line_is_left_out_with_a_warning(tmp_path, tail):
    run = make_run(tmp_path / "run", tail=tail)
    with pytest.warns(UserWarning, match="1 of 67 lines"):
        plot_runs([run], tmp_path / "loss.png")


def test_nan_and_a_single_point_are_drawn_around(tmp_path, figures):
    run = make_run(tmp_path / "run", steps=1, tail='{"step": 20, "loss": NaN}\n', evaluations=False)
    plot_runs([run], tmp_path / "loss.png")
    assert list(figures[0].axes[0].lines[0].get_xdata()) == [10]


def test_a_run_of_a_few_steps_has_no_figure_of_its_speed_and_no_complaint(tmp_path, capsys):
    entries = [{"step": 1, "tokens": 8, "time": 1.0, "loss": 3.0}]
    entries += [{"step": 2, "tokens": 16, "time": 2.0, "eval_loss": 3.0, "eval_drop_audio": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    finalize._plot(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png", "senses.png"]
    assert not capsys.readouterr().out


def test_a_figure_that_cannot_be_drawn_takes_no_other_away(tmp_path, capsys):
    entry = {"step": 1, "tokens": 8, "time": 1.0, "loss": 3.0, "eval_drop_audio": 3.5, "tokens_per_second": 8.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")  # without the loss with all senses
    finalize._plot(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["loss.png", "throughput.png"]
    assert capsys.readouterr().out == "senses.png was not drawn: 'eval_loss'\n"


def test_nothing_to_plot_is_an_error(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no run folder"):
        plot_runs([tmp_path / "missing"], tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        plot_runs([tmp_path / "empty"], tmp_path / "x.png")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing to plot yet: no loss or tokens_per_second has been logged"):
        plot_runs([tmp_path / "empty"], tmp_path / "x.png")
    with pytest.raises(UserError, match="unknown x axis 'epoch'"):
        plot_runs([run], tmp_path / "x.png", x="epoch")
    with pytest.raises(UserError, match="end in .png"):
        plot_runs([run], tmp_path / "x.jpg")
    assert not list(tmp_path.glob("x.*"))


def test_progression(tmp_path, figures):
    rows = [{"step": step, "loss": 6 - step / 10, "bits_per_byte": 2 - step / 100} for step in (5, 10, 20)]
    assert plot_progression(rows, tmp_path / "progression.png", "run").is_file()
    assert list(figures[0].axes[0].lines[0].get_ydata()) == [5.5, 5.0, 4.0]
    plot_progression(rows[:1], tmp_path / "single.png")


def test_smoothing_neither_lags_nor_shifts():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 3) == [0.0, 1.0, 2.0, 1.0, 0.0]
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert smooth([], 7) == []
