"""Figures: the losses and the speed of runs, the evaluation of a run's checkpoints, the lengths of documents."""

import math
import warnings
from pathlib import Path

from creature.checkpoints import METRICS_FILE, read_metrics
from creature.errors import UserError
from creature.files import replace_file

# Okabe and Ito (2008): distinguishable with any kind of color vision, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "lines.solid_capstyle": "round",
}
X_AXES = ("step", "tokens", "time")
FORMATS = ("png", "svg", "pdf")
LABELS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte", "tokens_per_second": "tokens/s"}
LABELS |= {"mfu": "MFU"}


def plot_runs(run_folders: list, output: str | Path, metrics=("loss", "tokens_per_second"), x: str = "step") -> Path:
    """
    Draw one panel per metric and one color per run: training raw and smoothed, validation as dots. Returns `output`.

    Args:
        run_folders: folders with a metrics.jsonl.
        output: .png, .svg or .pdf.
        metrics: names in metrics.jsonl. One that no run has gets no panel. "loss" is followed by a panel for each
            stream where a run trains more than one.
        x: "step", "tokens" or "time".

    Raises:
        UserError: for a folder without metrics or with nothing to plot, an unknown `x` or format.
    """
    if x not in X_AXES:
        raise UserError(f"unknown x axis {x!r}: use one of {', '.join(X_AXES)}")
    _check_format(output)
    runs = {label: _read(folder) for label, folder in zip(_labels(run_folders), run_folders, strict=True)}
    streams = {name for entries in runs.values() for entry in entries for name in entry if name.startswith("loss_")}
    if "loss" in metrics and len(streams) > 1:
        place = metrics.index("loss") + 1
        metrics = (*metrics[:place], *sorted(streams), *metrics[place:])
    panels = [name for name in metrics if any(_points(e, x, n)[0] for e in runs.values() for n in _keys(name))]
    if not panels:
        raise UserError(f"there is nothing to plot yet: no {' or '.join(metrics)} has been logged")
    times = [entry["time"] for entries in runs.values() for entry in entries if _is_finite(entry.get("time"))]
    hours = max(times, default=0) >= 7200
    label, scale = (f"time ({'hours' if hours else 'minutes'})", 3600 if hours else 60) if x == "time" else (x, 1)

    def draw(axes, name):
        lows, highs = [], []
        for index, (run, entries) in enumerate(runs.items()):
            color = COLORS[index % len(COLORS)]
            training, validation = (_points(entries, x, key) for key in _keys(name))
            span = max(1, len(training[0]) // 40)
            if training[0]:
                at, values = [place / scale for place in training[0]], training[1]
                smoothed = smooth(values, span)
                if span > 1:
                    axes.plot(at, values, color=color, alpha=0.28, linewidth=0.9)
                axes.plot(at, smoothed, color=color, linewidth=1.9, label="training" if len(runs) == 1 else run)
                lows.append(min(values))
                highs.append(max(smoothed[len(smoothed) // 20 :]))  # the fall of the first steps is cut off
            if validation[0]:
                at, values = [place / scale for place in validation[0]], validation[1]
                dots = f"{'' if len(runs) == 1 else f'{run}, '}validation (last {values[-1]:.3f})"
                color = COLORS[1] if len(runs) == 1 else color
                axes.plot(at, values, "o", color=color, markersize=5.5, markeredgecolor="white", label=dots, zorder=5)
                lows.append(min(values))
                highs.append(max(values[len(values) // 20 :]))
        margin = 0.06 * (max(highs) - min(lows)) or 0.1
        axes.set_ylim(
            *(min(lows) - margin, max(highs) + 2 * margin) if name.startswith("loss") else (0, 1.1 * max(highs))
        )

    title = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs"
    return _draw_panels(panels, draw, output, title, label)


def plot_progression(rows: list[dict], output: str | Path, title: str = "") -> Path:
    """The evaluation of a run's checkpoints: rows with "step", "loss" and "bits_per_byte", as dots on a line."""
    _check_format(output)

    def draw(axes, name):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], "o-", color=COLORS[0], markersize=5)

    return _draw_panels(("loss", "bits_per_byte"), draw, output, title, "step")


def plot_senses(folder: str | Path, output: str | Path) -> Path | None:
    """
    What each sense is worth, by the last evaluation of a round: the loss with all senses as a line, beside it bars of
    the loss without each of them and with that of another clip. Returns None where nothing of the kind was evaluated.
    """
    _check_format(output)
    entry = next((one for one in reversed(_read(folder)) if any(name.startswith("eval_drop_") for name in one)), None)
    if entry is None:
        return None
    senses = [name.removeprefix("eval_drop_") for name in entry if name.startswith("eval_drop_")]

    def draw(axes, name):
        for place, (how, label) in enumerate((("drop", "without it"), ("wrong", "with another clip's"))):
            bars = [entry.get(f"eval_{how}_{sense}", math.nan) for sense in senses]
            at = [number + 0.36 * (place - 0.5) for number in range(len(senses))]
            axes.bar(at, bars, width=0.34, color=COLORS[place], label=label, zorder=3)
        axes.axhline(entry["eval_loss"], color=COLORS[6], linewidth=1.4, label=f"all senses ({entry['eval_loss']:.3f})")
        axes.set_xticks(range(len(senses)), [sense.replace("_", " ") for sense in senses])

    return _draw_panels(
        ("validation loss",), draw, output, f"{Path(folder).resolve().name}: what each sense is worth", ""
    )


def plot_lengths(lengths, output: str | Path, title: str = "", block_size: int | None = None) -> Path:
    """A histogram of the lengths of documents; lengths: [documents], tokens; block_size: drawn as a line."""
    import numpy as np

    _check_format(output)
    edges = np.unique(np.geomspace(max(lengths.min(), 1), max(lengths.max(), 2) + 1, 61).round())

    def draw(axes, name):
        axes.hist(np.maximum(lengths, 1), edges, color=COLORS[0], edgecolor="white", linewidth=0.5)
        axes.axvline(max(np.median(lengths), 1), color=COLORS[1], label=f"median {np.median(lengths):,.0f}")
        if block_size:
            axes.axvline(block_size, color=COLORS[2], label=f"block {block_size:,}")
        axes.set_xscale("log")

    return _draw_panels(("documents",), draw, output, title, "document length (tokens)")


def smooth(values: list[float], span: int) -> list[float]:
    """
    Mean over `span` values around each one; unlike a running average it does not lag behind a falling curve.

    Towards both ends the window shrinks with the distance to the end, so that it stays centered.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        reach = min(span // 2, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def _draw_panels(names, draw, output: str | Path, title: str, x_label: str) -> Path:
    """One panel per name below each other, drawn by `draw(axes, name)`; written whole or not at all."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, whose list of figures would keep each of them
    from matplotlib.ticker import EngFormatter, PercentFormatter

    with matplotlib.rc_context(STYLE):
        heights = [3.0 if index == 0 else 1.5 for index in range(len(names))]
        figure = Figure(figsize=(8.4, 1.1 + 1.45 * sum(heights)), dpi=150, layout="constrained")
        grid = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, name in zip(grid, names, strict=True):
            draw(axes, name)
            axes.set_ylabel(LABELS.get(name, f"{name[5:]} loss" if name.startswith("loss_") else name))
            if name == "mfu":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            elif name in ("tokens_per_second", "documents"):
                axes.yaxis.set_major_formatter(EngFormatter())
            if len(axes.get_legend_handles_labels()[0]) > 1 and name != "mfu":
                axes.legend(loc="best", fontsize=9.5)
        grid[0].set_title(title)
        grid[-1].set_xlabel(x_label)
        if x_label and not x_label.startswith("time"):  # of which it would write 500 m for half an hour
            grid[-1].xaxis.set_major_formatter(EngFormatter())
        figure.align_ylabels(grid)
        with replace_file(output) as file:
            figure.savefig(file, format=_check_format(output))
    return Path(output)


def _read(folder: str | Path) -> list[dict]:
    path = Path(folder) / METRICS_FILE
    if not Path(folder).is_dir():
        raise UserError(f"there is no run folder {folder}: give a folder such as checkpoints/text_only")
    if not path.is_file():
        raise UserError(f"{folder} has no {METRICS_FILE}: give the folder of a run that has begun to train")
    entries = read_metrics(folder)
    lines = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    if lines > len(entries):  # a run that is killed while it writes a line leaves a part of it
        warnings.warn(f"{path}: {lines - len(entries)} of {lines} lines cannot be read and are left out", stacklevel=3)
    return entries


def _keys(name: str) -> tuple[str, str]:
    return name, f"eval_{name}"


def _points(entries: list[dict], x: str, name: str) -> tuple[list[float], list[float]]:
    """The finite values of a metric and their places on the x axis."""
    pairs = [(entry[x], entry[name]) for entry in entries if _is_finite(entry.get(x)) and _is_finite(entry.get(name))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _labels(folders: list) -> list[str]:
    """The shortest ends of the paths that distinguish the runs."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-length:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError("the same run is given twice: leave one out")


def _check_format(output: str | Path) -> str:
    suffix = Path(output).suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise UserError(f"{output} is not a figure: let its name end in .{', .'.join(FORMATS)}")
    return suffix
