"""Every plot of the project, drawn by matplotlib and returned as the text of an SVG.

Matplotlib is imported when the first plot is drawn: most commands draw none. The same values give the same bytes, and no
plot opens a window.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Points = Sequence[tuple[int, float]]

COLOURS = ("#2f6fd0", "#d9792b", "#1a7f4b", "#8a4fbf", "#b3372f", "#4c8f99", "#7a6a2f", "#c2477f")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and needs no font of ours
    "svg.hashsalt": "siq-vl",  # names of clipping paths do not differ from run to run
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": "#1c2430",
    "axes.labelcolor": "#1c2430",
    "axes.edgecolor": "#5d6b7c",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dfe4ea",
}


def learning_curve_plot(curves: Mapping[str, Points], title: str) -> str:
    """Return losses over the steps of a training run.

    Args:
        curves: by name, (step, loss) points; the first is drawn on top, and each has its last loss in the legend.
        title: what the plot is of.

    Raises:
        ValueError: there is no point at all.
    """
    if not any(curves.values()):
        raise ValueError("there is no loss to draw: set logging_steps to at most the number of steps")
    figure, (axes,) = _new_figure(width=7.6, height=3.6)
    axes.set_title(title, loc="left")
    named = {}
    for place, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points, strict=True)
        line = _draw_line(axes, steps, losses, colour=_colour(place), width=1.2 if place else 2)
        line.set_zorder(3 - place / len(curves))
        named[f"{name} {losses[-1]:.3f}"] = line
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _add_legend(axes, named, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure)


def running_accuracy_plot(curves: Mapping[str, Sequence[float]]) -> str:
    """Return running accuracies by the number of questions asked.

    Args:
        curves: by model, the share of right answers among the first 1, 2, 3, ... questions.
    """
    figure, (axes,) = _new_figure(width=5.6, height=2.8)
    named = {}
    for place, (name, values) in enumerate(curves.items()):
        # Some four hundred points are as many as the eye can tell apart; the last one is always drawn.
        stride = max(1, len(values) // 400)
        questions = [*range(1, len(values), stride), len(values)]
        shares = [100 * values[question - 1] for question in questions]
        named[name] = _draw_line(axes, questions, shares, colour=_colour(place))
    axes.set_xlabel("questions")
    axes.set_ylabel("running accuracy, %")
    axes.set_ylim(0, 100)
    _add_legend(axes, named, loc="lower right")
    return _svg(figure)


def length_plot(lengths: Mapping[str, Sequence[int]], bins: int = 24) -> str:
    """Return the distribution of the lengths of rationales: the share of a model's outputs in each bin.

    Args:
        lengths: by model, the words, numbers and marks of each rationale.
        bins: bins at most; all have a whole number of words.
    """
    longest = 1
    for found in lengths.values():
        longest = max(longest, *found, 1)
    bin_width = -(-(longest + 1) // bins)
    edges = list(range(0, longest + bin_width + 1, bin_width))
    figure, (axes,) = _new_figure(width=5.6, height=2.8)
    named = {}
    for place, (name, found) in enumerate(lengths.items()):
        if not found:
            continue
        weights = [100 / len(found)] * len(found)
        axes.hist(found, bins=edges, weights=weights, histtype="step", color=_colour(place), linewidth=1.8)
        named[name] = axes.patches[-1]  # the outline that it drew
    axes.set_xlabel("words, numbers and marks of the rationale")
    axes.set_ylabel("outputs, %")
    _add_legend(axes, named, loc="upper right")
    return _svg(figure)


def loss_plot(points: Points) -> str:
    """Return a small loss curve, with its first and its last value in the title."""
    steps, losses = zip(*points, strict=True)
    figure, (axes,) = _new_figure(width=2.6, height=1.5)
    _draw_line(axes, steps, losses, colour=COLOURS[0], width=1.5)
    axes.set_title(f"{losses[0]:.2f}, at step {steps[-1]} {losses[-1]:.3f}", loc="left", fontsize=8)
    axes.set_ylim(bottom=0)
    return _svg(figure)


# Panels of the plot of emergence: title, measure of an entry, and what the measure is multiplied by.
_EMERGENCE_PANELS = (
    ("where: well-formed answers, %", "well_formed", 100),
    ("how long: tokens of the rationale", "length", 1),
    ("how structured: structure score, %", "structure", 100),
    ("with what result: accuracy, %", "accuracy", 100),
)


def emergence_plot(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return how reasoning emerged in training: four panels, in each a line a run over its steps.

    The teacher's own length is a dashed line in the colour of the run.

    Args:
        runs: by name, entries with `step`, `well_formed`, `length`, `teacher_length`, `structure` and `accuracy`.
    """
    figure, panels = _new_figure(width=7.6, height=5.2, rows=2, columns=2)
    named = {}
    for axes, (title, measure, scale) in zip(panels, _EMERGENCE_PANELS, strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        for place, (name, entries) in enumerate(runs.items()):
            steps = [entry["step"] for entry in entries]
            values = [scale * entry[measure] for entry in entries]
            named[name] = _draw_line(axes, steps, values, colour=_colour(place), marker="o")
            if measure == "length":
                teacher_length = entries[-1]["teacher_length"]
                ends = [steps[0], steps[-1]]
                _draw_line(axes, ends, [teacher_length] * 2, colour=_colour(place), dashed=True)
        axes.set_ylim(0, 105 if scale == 100 else None)
    _add_legend(figure, named, loc="outside upper left", ncols=4)
    figure.supxlabel("dashed: the teacher's own length", fontsize=8, x=0.02, ha="left")
    return _svg(figure)


def interval_plot(
    panels: Sequence[tuple[str, Mapping[str, str]]],
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> str:
    """Return measures with their 95% intervals: a row an arm, a panel a unit, in each a dot and a bar a measure.

    Args:
        panels: title of the panel, and by name of a measure its title.
        rows: by arm, by measure: value, lower and upper end of its interval, in percent. A measure may be missing.
    """
    figure, all_axes = _new_figure(width=7.6, height=1.2 + 0.26 * len(rows), columns=len(panels))
    places = list(range(len(rows)))
    colours = iter(COLOURS)
    named = {}
    for axes, (title, measures) in zip(all_axes, panels, strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
        for number, (measure, measure_title) in enumerate(measures.items()):
            # Measures of one panel stand a little above one another, so that their bars can be told apart.
            offset = 0.22 * (number - (len(measures) - 1) / 2)
            colour = next(colours)
            for place, estimates in zip(places, rows.values(), strict=True):
                if measure not in estimates:
                    continue
                value, low, high = estimates[measure]
                axes.plot([low, high], [place + offset] * 2, color=colour, linewidth=1.6)
                dot = f"value-{place}-{measure}"
                axes.plot([value], [place + offset], marker="o", markersize=4, color=colour, gid=dot)
            (named[measure_title],) = axes.plot([], [], marker="o", markersize=4, color=colour)
        axes.set_xlim(left=0)
        axes.set_yticks(places, list(rows) if axes is all_axes[0] else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
    _add_legend(figure, named, loc="outside lower left", ncols=4)
    return _svg(figure)


def histogram_plot(counts: Mapping[int, int]) -> str:
    """Return a small histogram: a bar a bin, with its count above and its lower bound below.

    Args:
        counts: by the lower bound of each bin, in their order.
    """
    figure, (axes,) = _new_figure(width=3.4, height=1.5)
    places = list(range(len(counts)))
    bars = axes.bar(places, list(counts.values()), color=COLOURS[0])
    labels = [str(count) if count else "" for count in counts.values()]
    axes.bar_label(bars, labels, fontsize=7)
    axes.set_xticks(places, [str(bound) for bound in counts], fontsize=7)
    axes.set_yticks([])
    return _svg(figure)


def bar_plot(values: Mapping[str, float], title: str) -> str:
    """Return horizontal bars, the first on top, each with its value at its end.

    Args:
        values: by name.
        title: what they are.
    """
    figure, (axes,) = _new_figure(width=7.6, height=1.0 + 0.2 * len(values))
    axes.set_title(title, loc="left")
    places = list(range(len(values)))
    bars = axes.barh(places, list(values.values()), color=COLOURS[0])
    axes.bar_label(bars, [f"{value:,.0f}" for value in values.values()], padding=2, fontsize=7)
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    return _svg(figure)


def inline(svg: str) -> str:
    """Return a plot for use inside an HTML page, where an SVG needs no namespaces."""
    head, closing, rest = svg.partition(">")
    head = re.sub(r' xmlns(:xlink)?="[^"]*"', "", head)
    return head + closing + rest


def _new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """Return a figure of so many inches, and its axes row by row."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _draw_line(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    *,
    colour: str,
    width: float = 1.8,
    marker: str = "",
    dashed: bool = False,
) -> "Line2D":
    """Draw a line and return it; in the SVG it is a group whose id begins with `curve` or, dashed, with `reference`."""
    number = len(axes.lines)
    place = f"{'reference' if dashed else 'curve'}-{axes.figure.axes.index(axes)}-{number}"
    (line,) = axes.plot(
        x,
        y,
        color=colour,
        linewidth=width,
        linestyle="--" if dashed else "-",
        marker=marker,
        markersize=3,
        gid=place,
    )
    return line


def _add_legend(where: "Axes | Figure", named: Mapping[str, "Artist"], **place: Any) -> None:
    """Name what is drawn. By themselves, matplotlib's legends leave out names that begin with an underscore."""
    where.legend(list(named.values()), list(named), frameon=False, **place)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _svg(figure: "Figure") -> str:
    """Return the figure as an SVG element, with no prolog and no date."""
    import matplotlib
    from matplotlib.text import Text

    # A name with dollar signs is a name, no formula.
    for label in figure.findobj(Text):
        label.set_parse_math(False)
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    written = text.getvalue()
    return written[written.index("<svg") :]
