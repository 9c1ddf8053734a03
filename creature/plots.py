"""Curves of one or several runs as a figure: losses, validation, throughput."""

import math
import warnings
from pathlib import Path

from creature.checkpoints import METRICS_FILE, read_metrics
from creature.errors import UserError
from creature.files import replace_file

# Okabe and Ito (2008): told apart with any kind of color vision, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
STREAM_STYLES = {"external_text": "--", "audio": "-.", "animation": ":"}
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


def plot_run(run_folders: list, output: str | Path, x: str = "step") -> Path:
    """
    Losses over tokens per second, one color a run: training raw and smoothed, validation as dots, and a line for each
    stream where a run has more than one.

    Args:
        run_folders: folders with a metrics.jsonl. output: .png, .svg or .pdf. x: "step", "tokens" or "time"; "all" for
            the losses over each of them, side by side.

    Raises:
        UserError: for a folder without metrics or with nothing to plot, an unknown `x` or format.
    """
    return _plot(run_folders, output, x, ("loss", "throughput"))


def plot_throughput(run_folders: list, output: str | Path, x: str = "step") -> Path:
    """Tokens per second of runs and, where the card is known, the share of its peak arithmetic; as `plot_run`."""
    return _plot(run_folders, output, x, ("throughput", "mfu"))


def plot_progression(rows: list[dict], output: str | Path, title: str = "") -> Path:
    """The evaluation of a run's checkpoints: rows with "step", "loss" and "bits_per_byte", as dots on a line."""
    import matplotlib

    _check_format(output)
    with matplotlib.rc_context(STYLE):
        return _save(_draw_progression(rows, title), output)


def _draw_progression(rows: list[dict], title: str):
    from matplotlib.ticker import MaxNLocator

    figure = _new_figure(7.2, 5.4)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, label in zip(
        panels, ("loss", "bits_per_byte"), ("loss (nats per token)", "bits per byte"), strict=True
    ):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], "o-", color=COLORS[0], markersize=5)
        best = min(rows, key=lambda row: row[name])
        axes.annotate(
            f"{best[name]:.3f}",
            (best["step"], best[name]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=COLORS[0],
        )
        axes.set_ylabel(label)
        axes.margins(x=0.06, y=0.18)
    panels[0].set_title(title)
    panels[1].set_xlabel("step")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].xaxis.set_major_formatter(_count_formatter())
    figure.align_ylabels(panels)
    return figure


def plot_corpus(
    lengths, counts, frequent: list[tuple[str, int]], output: str | Path, title: str = "", block_size: int | None = None
) -> Path:
    """
    A corpus as three panels: how long its documents are, its most frequent tokens, and how often the others occur.

    Args:
        lengths: [documents], in tokens. counts: [ids], how often each id occurs. frequent: (token, count), most first.
        block_size: drawn into the lengths as a line.
    """
    import matplotlib

    _check_format(output)
    with matplotlib.rc_context(STYLE):
        return _save(_draw_corpus(lengths, counts, frequent, title, block_size), output)


def _draw_corpus(lengths, counts, frequent, title, block_size):
    import numpy as np

    figure = _new_figure(10.0, 8.0)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    axes = top.subplots()
    longest, shortest = max(lengths.max(), 2), max(lengths.min(), 1)
    edges = np.unique(np.geomspace(shortest, longest + 1, 61).round())
    axes.hist(np.maximum(lengths, 1), edges, color=COLORS[0], edgecolor="white", linewidth=0.5)
    axes.axvline(max(np.median(lengths), 1), color=COLORS[1], label=f"median {np.median(lengths):,.0f}")
    if block_size:
        axes.axvline(block_size, color=COLORS[2], label=f"block {block_size:,}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_count_formatter())
    axes.set(xlabel="document length (tokens)", ylabel="documents", title=title)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # beside the title, where no bar is

    left, right = bottom.subplots(1, 2, width_ratios=(1, 1.2))
    total = counts.sum()
    names = [_printable(name) for name, _ in frequent]
    left.barh(range(len(names)), [100 * count / total for _, count in frequent], color=COLORS[0], height=0.75)
    left.set_yticks(range(len(names)), names, fontfamily="monospace", fontsize=8.5)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(xlabel="share of all tokens (%)", title=f"the {len(names)} most frequent tokens")
    found = np.sort(counts[counts > 0])[::-1]
    right.loglog(np.arange(1, len(found) + 1), found, color=COLORS[0], linewidth=2)
    right.set(xlabel="rank of the token", ylabel="occurrences", title=f"{len(found):,} of {len(counts):,} ids occur")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(_count_formatter())
    return figure


def _printable(token: str) -> str:
    """A token as a label: quoted, for its spaces, and without what the font may lack or matplotlib takes for math."""
    text = token if token.isprintable() and token.isascii() else token.encode("unicode_escape").decode("ascii")
    return f'"{text}"'.replace("$", r"\$")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def _load(folder) -> list[dict]:
    path = Path(folder) / METRICS_FILE
    if not Path(folder).is_dir():
        raise UserError(f"there is no run folder {folder}: give a folder such as checkpoints/text_only")
    if not path.is_file():
        raise UserError(f"{folder} has no {METRICS_FILE}: give the folder of a run that has begun to train")
    entries = read_metrics(folder)
    lines = sum(bool(line.strip()) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    if lines > len(entries):
        # One line is cut short when a run is killed in the middle of writing it; the curve can do without.
        warnings.warn(f"{path}: {lines - len(entries)} of {lines} lines cannot be read and are left out", stacklevel=3)
    return entries


def _points(entries: list[dict], x: str, name: str) -> tuple[list[float], list[float]]:
    """The finite values of one metric over the x axis."""
    pairs = [(entry[x], entry[name]) for entry in entries if _is_finite(entry.get(x)) and _is_finite(entry.get(name))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def smooth(values: list[float], span: int) -> list[float]:
    """
    Mean over `span` values around each one: unlike a running average it does not lag behind a falling curve.

    Towards both ends the window shrinks with the distance to the end, and stays centered.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        reach = min(span // 2, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def _labels(folders: list) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(path[-length:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    return labels  # the same folder twice


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def _plot(run_folders: list, output: str | Path, x: str, panels: tuple[str, ...]) -> Path:
    import matplotlib

    if x not in (*X_AXES, "all"):
        raise UserError(f"unknown x axis {x!r}: use one of {', '.join(X_AXES)}, all")
    _check_format(output)
    runs = [(label, _load(folder)) for label, folder in zip(_labels(run_folders), run_folders, strict=True)]
    axes = [name for name in (X_AXES if x == "all" else [x]) if _has_losses(runs, name)]
    if not axes:
        raise UserError("there is nothing to plot yet: no loss has been logged")
    if x == "all":
        with matplotlib.rc_context(STYLE):
            return _save(_draw_side_by_side(runs, axes), output)
    if not any(_points(entries, x, "mfu")[0] for _, entries in runs):
        panels = tuple(panel for panel in panels if panel != "mfu")
    with matplotlib.rc_context(STYLE):
        return _save(_draw(runs, x, panels), output)


def _has_losses(runs: list, x: str) -> bool:
    return any(_points(entries, x, name)[0] for _, entries in runs for name in ("loss", "eval_loss"))


def _draw_side_by_side(runs: list, x_axes: list[str]):
    figure = _new_figure(1.0 + 4.6 * len(x_axes), 5.4)
    panels = figure.subplots(1, len(x_axes), sharey=True, squeeze=False)[0]
    for axes, x in zip(panels, x_axes, strict=True):
        label, scale = _time_unit(runs) if x == "time" else (x, 1.0)
        _draw_loss(axes, runs, x, scale)
        _set_x_axis(axes, label, nbins=6)
        if axes is not panels[0]:
            axes.set_ylabel("")
        if axes is not panels[-1]:
            axes.get_legend().remove()
    panels[0].set_title(_title(runs))
    return figure


def _title(runs: list) -> str:
    return runs[0][0] if len(runs) == 1 else f"{len(runs)} runs"


def _set_x_axis(axes, label: str, nbins: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=nbins, integer=not label.startswith("time")))
    axes.xaxis.set_major_formatter(_count_formatter())
    axes.margins(x=0.02)


def _draw(runs: list, x: str, panels: tuple[str, ...]):
    x_label, scale = _time_unit(runs) if x == "time" else (x, 1.0)
    heights = [3.0 if panel == "loss" else 1.2 for panel in panels]
    figure = _new_figure(8.4, 1.1 + 1.45 * sum(heights))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    draw = {"loss": _draw_loss, "throughput": _draw_throughput, "mfu": _draw_mfu}
    for axes, panel in zip(grid, panels, strict=True):
        draw[panel](axes, runs, x, scale)
    figure.align_ylabels(grid)
    grid[0].set_title(_title(runs))
    if len(runs) > 1 and panels[0] != "loss":
        grid[0].legend(loc="lower right", fontsize=9)
    _set_x_axis(grid[-1], x_label, nbins=9)
    return figure


def _draw_loss(axes, runs, x, scale):
    alone = len(runs) == 1
    highest, lowest = [], []
    for index, (label, entries) in enumerate(runs):
        color = COLORS[index % len(COLORS)]
        places, values = _points(entries, x, "loss")
        places = [place * scale for place in places]
        span = max(1, len(values) // 40)
        if values:
            smoothed = smooth(values, span)
            if span > 1:
                axes.plot(places, values, color=color, alpha=0.28, linewidth=0.9)
            name = "training" if alone else label
            name += f" (smoothed over {span} logs)" if alone and span > 1 else ""
            axes.plot(places, smoothed, color=color, linewidth=1.9, label=name)
            # The first steps fall from the logarithm of the vocabulary; the scale is for what comes after.
            settled = smoothed[len(smoothed) // 20 :]
            highest.append(max(settled))
            lowest.append(min(values))
        for stream, style in _streams(entries, x).items():
            at, losses = _points(entries, x, f"loss_{stream}")
            own = COLORS[1 + list(_streams(entries, x)).index(stream)] if alone else color
            name = stream if alone else f"{label}, {stream}"
            at = [place * scale for place in at]
            axes.plot(at, smooth(losses, span), style, color=own, linewidth=1.4, label=name)
            highest.append(max(losses[len(losses) // 20 :]))
            lowest.append(min(losses))
        at, losses = _points(entries, x, "eval_loss")
        if losses:
            name = f"validation (last {losses[-1]:.3f})" if alone else f"{label}, validation (last {losses[-1]:.3f})"
            axes.plot(
                [place * scale for place in at],
                losses,
                "o",
                color=COLORS[1] if alone and not _streams(entries, x) else color,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.9,
                label=name,
                zorder=5,
            )
            highest.append(max(losses[len(losses) // 20 :]))
            lowest.append(min(losses))
    room = 0.06 * (max(highest) - min(lowest)) or 0.1
    axes.set_ylim(min(lowest) - room, max(highest) + 2 * room)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right", fontsize=9.5 if len(runs) < 4 else 8.5)


def _streams(entries: list[dict], x: str) -> dict[str, str]:
    """Line styles of the streams of a run, {} when it has only one: that is then the loss itself."""
    names = dict.fromkeys(key[5:] for entry in entries for key in entry if key.startswith("loss_") and entry[key])
    names = [name for name in names if _points(entries, x, f"loss_{name}")[0]]
    return {name: STREAM_STYLES.get(name, "--") for name in names} if len(names) > 1 else {}


def _draw_throughput(axes, runs, x, scale):
    for index, (label, entries) in enumerate(runs):
        places, values = _points(entries, x, "tokens_per_second")
        axes.plot([p * scale for p in places], values, color=COLORS[index % len(COLORS)], linewidth=1.4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    axes.yaxis.set_major_formatter(_count_formatter())


def _draw_mfu(axes, runs, x, scale):
    for index, (label, entries) in enumerate(runs):
        places, values = _points(entries, x, "mfu")
        percent = [100 * value for value in values]
        axes.plot([p * scale for p in places], percent, color=COLORS[index % len(COLORS)], linewidth=1.4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MFU (%)")


def _time_unit(runs) -> tuple[str, float]:
    times = [entry["time"] for _, entries in runs for entry in entries if _is_finite(entry.get("time"))]
    longest = max(times, default=0)
    for name, seconds in (("hours", 3600), ("minutes", 60)):
        if longest >= 2 * seconds:
            return f"time ({name})", 1 / seconds
    return "time (seconds)", 1.0


def _count_formatter():
    """1500000 -> 1.5 M."""
    from matplotlib.ticker import FuncFormatter

    def text(value, _):
        for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e4)):
            if abs(value) >= size:
                return f"{value / (1e3 if unit == ' k' else size):.4g}{unit}"
        return f"{value:.4g}"

    return FuncFormatter(text)


def _new_figure(width: float, height: float):
    """A figure of its own, without pyplot's global list of figures; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _check_format(output: str | Path) -> str:
    suffix = Path(output).suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise UserError(f"{output} is not a figure: let its name end in .{', .'.join(FORMATS)}")
    return suffix


def _save(figure, output: str | Path) -> Path:
    suffix = _check_format(output)
    with replace_file(output) as file:
        figure.savefig(file, format=suffix)
    return Path(output)
