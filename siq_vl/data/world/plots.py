"""Charts drawn by matplotlib: another hand than `chart_drawing`'s, in styles of which some are kept out of training."""

import io
from random import Random
from typing import TYPE_CHECKING, Any

from PIL import Image

from siq_vl.data.world.canvas import RGB, Drawn, Letter, Region, bare, pixel
from siq_vl.data.world.figure import NATIVE, Look

if TYPE_CHECKING:
    from siq_vl.data.world.charts import Chart

STYLES = ("default", "ggplot", "grayscale", "bmh", "seaborn-v0_8-whitegrid", "dark_background")
UNSEEN_STYLES = ("Solarize_Light2", "fivethirtyeight", "seaborn-v0_8-darkgrid")
_FAMILIES = ("DejaVu Sans", "DejaVu Serif", "STIXGeneral")
_DPI = 100


def plot(chart: "Chart", look: Look, rng: Random) -> tuple[Drawn, RGB]:
    """Draw a chart with matplotlib. Returns the picture and its background.

    Args:
        chart: columns, rows, a line or a pie.
        look: `charts` is `"matplotlib unseen"` for a style kept out of training.
        rng: decides size, style, colours and what is shown besides.
    """
    # Here, because only this function needs it and importing it takes longer than drawing a thousand other pictures.
    import matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = rng.choice(UNSEEN_STYLES if look.charts == "matplotlib unseen" else STYLES)
    scale = rng.uniform(1.0, 1.7) if not look.large else rng.uniform(2.2, 3.2)
    width, height = round(NATIVE * scale * rng.uniform(1.0, 1.3)), round(NATIVE * scale)
    size = rng.uniform(9.5, 12.5) * (scale if not look.large else 1.1)  # pixels
    if chart.kind != "rows":
        # Labels side by side have to fit: a letter is some 0.62 of the size wide.
        longest = max(len(label) for label, _ in chart.entries)
        size = max(6.0, min(size, 0.8 * width / len(chart.entries) / (0.62 * longest)))
    size *= 72 / _DPI  # points
    settings: dict[Any, Any] = {
        "font.family": rng.choice(_FAMILIES),
        "font.size": size,
        "axes.titlesize": size * 1.15,
        "axes.labelsize": size,
        "xtick.labelsize": size,
        "ytick.labelsize": size,
        "lines.linewidth": rng.uniform(1, 2.5),
        "axes.linewidth": 0.8,
        "savefig.facecolor": "auto",
    }
    with matplotlib.style.context(style), matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        texts = _draw(axes, chart, rng)
        if chart.title:
            texts.append((axes.set_title(chart.title), ("title", chart.title)))
        stored = io.BytesIO()
        canvas.print_rgba(stored)
        image = Image.frombytes("RGBA", canvas.get_width_height(), stored.getvalue()).convert("RGB")
        letters: list[Letter] = []
        regions: list[Region] = []
        for text, facts in texts:
            _remember(text, facts, image.height, letters, regions)
        for text in _numbers(axes, chart, {text for text, _ in texts}):
            _remember(text, (), image.height, letters, regions)
        for patch, facts in _bodies(axes, chart):
            regions.append(Region(_flipped(patch.get_window_extent(canvas.get_renderer()), image.height), facts=facts))
    return Drawn(image, tuple(letters), tuple(regions)), pixel(image, 0, 0)


def _draw(axes, chart: "Chart", rng: Random) -> list[tuple]:
    """Draw the chart's body, and return matplotlib's texts with the facts that they belong to."""
    labels = [label for label, _ in chart.entries]
    values = [value for _, value in chart.entries]
    facts = [(label, str(value)) for label, value in chart.entries]
    cycle = [f"C{index}" for index in range(len(values))] if rng.random() < 0.4 else None
    positions = range(len(values))
    if chart.kind == "pie":
        wedges, texts, numbers = axes.pie(values, labels=labels, autopct=lambda _: "", startangle=rng.uniform(0, 360))
        for number, value, wedge in zip(numbers, values, wedges, strict=True):
            number.set_text(str(value))
            number.set_color("white" if sum(wedge.get_facecolor()[:3]) < 1.4 else "black")
        axes.set_xlim(-1.75, 1.75)  # room for the labels
        return [*zip(texts, facts, strict=True), *zip(numbers, facts, strict=True)]
    if chart.kind == "line":
        axes.plot(positions, values, marker=rng.choice(("o", "s", "")))
        printed = [
            axes.annotate(str(value), (at, value), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom")
            for at, value in zip(positions, values, strict=True)
            if chart.printed
        ]
    else:
        draw = axes.bar if chart.kind == "columns" else axes.barh
        thickness = {"width" if chart.kind == "columns" else "height": rng.uniform(0.5, 0.9)}
        bars = draw(positions, values, color=cycle, **thickness)
        printed = axes.bar_label(bars, labels=[str(value) for value in values], padding=2) if chart.printed else []
    if chart.kind == "rows":
        axes.set_yticks(positions, labels)
        axes.invert_yaxis()
        axes.set_xlim(0, chart.top * (1.2 if chart.printed else 1.0))
        ticks = axes.get_yticklabels()
    else:
        axes.set_xticks(positions, labels)
        axes.set_ylim(0, chart.top * (1.15 if chart.printed else 1.0))
        axes.set_xlim(-0.6, len(values) - 0.4)
        ticks = axes.get_xticklabels()
    return [*zip(ticks, facts, strict=True), *(zip(printed, facts, strict=True) if chart.printed else ())]


def _numbers(axes, chart: "Chart", known: set) -> list:
    """Return the numbers along the value axis: the axes' labels that are not `known`, inside the axis's ends."""
    if chart.kind == "pie":
        return []
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if chart.kind == "rows" else (axes.yaxis, axes.get_ylim())
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [text for at, text in ticks if low <= at <= high and text not in known]


def _bodies(axes, chart: "Chart") -> list[tuple]:
    """Return the bars with the facts that they belong to; points and slices have theirs in their texts."""
    if chart.kind in ("pie", "line"):
        return []
    return [(patch, (label, str(value))) for patch, (label, value) in zip(axes.patches, chart.entries, strict=True)]


def _flipped(extent, height: int) -> tuple[float, float, float, float]:
    """Turn matplotlib's box, y upwards, into a picture's."""
    return extent.x0, height - extent.y1, extent.x1, height - extent.y0


def _remember(text, facts: tuple[str, ...], height: int, letters: list[Letter], regions: list[Region]) -> None:
    """Note where a level text lies; its characters are taken to be as wide as each other."""
    written = text.get_text()
    left, top, right, bottom = _flipped(text.get_window_extent(), height)
    word = letters[-1].word + 1 if letters else 0
    advance = (right - left) / max(1, len(written))
    for index, character in enumerate(written):
        letters.append(Letter(character, left + (index + 0.5) * advance, 0.55 * bottom + 0.45 * top, word))
    regions.append(Region((left, top, right, bottom), seen=(bare(written),), facts=facts))
