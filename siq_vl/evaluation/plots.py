"""Plots as inline SVG: running accuracy, lengths of rationales, curves of training losses."""

import html
from collections.abc import Mapping, Sequence

COLOURS = ("#2f6fd0", "#d9792b", "#1a7f4b", "#8a4fbf", "#b3372f", "#4c8f99", "#7a6a2f", "#c2477f")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 280, 46, 14, 32, 34


def running_accuracy_plot(curves: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG of running accuracies, each a share for every number of questions asked so far."""
    longest = max(map(len, curves.values()))
    drawn = _axes(longest, 1.0, "questions", lambda value: f"{100 * value:.0f}%")
    for colour, values in zip(_cycled(len(curves)), curves.values(), strict=True):
        kept = range(0, len(values), max(1, len(values) // 400))
        points = [(place + 1, values[place]) for place in (*kept, len(values) - 1)]
        drawn += _line([_at(x / longest, y) for x, y in points], colour)
    return _figure(drawn + _legend(list(curves)), "Running accuracy by number of questions asked")


def length_plot(lengths: Mapping[str, Sequence[int]], bins: int = 24) -> str:
    """Return an SVG of the distribution of rationale lengths, in pieces: the share of outputs in each bin."""
    longest = max(1, *(max(found, default=0) for found in lengths.values()))
    width = -(-(longest + 1) // bins)
    count = longest // width + 1
    shares = {
        name: [sum(length // width == place for length in found) / max(1, len(found)) for place in range(count)]
        for name, found in lengths.items()
    }
    highest = max(max(found) for found in shares.values())
    drawn = _axes(
        count * width, highest, "words, numbers and marks of the rationale", lambda value: f"{100 * value:.0f}%"
    )
    for colour, found in zip(_cycled(len(shares)), shares.values(), strict=True):
        steps = [(edge / count, share / highest) for place, share in enumerate(found) for edge in (place, place + 1)]
        drawn += _line([_at(0, 0), *(_at(x, y) for x, y in steps), _at(1, 0)], colour)
    return _figure(drawn + _legend(list(lengths)), "Share of outputs by length of the rationale")


def loss_plot(points: Sequence[tuple[int, float]], width: int = 260, height: int = 130) -> str:
    """Return an SVG of a loss curve with its first and last value written at the ends."""
    last_step, top = max(step for step, _ in points), max(loss for _, loss in points)
    line = " ".join(
        f"{8 + step / last_step * (width - 16):.1f},{height - 18 - loss / top * (height - 36):.1f}"
        for step, loss in points
    )
    (_, first), (_, last) = points[0], points[-1]
    return (
        f"<svg width={width} height={height} role=img aria-label='Training loss'>"
        f"<polyline points='{line}' fill=none stroke='{COLOURS[0]}' stroke-width=1.5 />"
        f"<text x=8 y=14>{first:.2f}</text>"
        f"<text x={width - 8} y={height - 4} text-anchor=end>{last:.3f} at step {last_step}</text></svg>"
    )


_PANELS = (
    ("where: well-formed answers, %", "well_formed", 100),
    ("how long: tokens of the rationale", "length", 1),
    ("how structured: structure score, %", "structure", 100),
    ("with what result: accuracy, %", "accuracy", 100),
)
_PANEL_WIDTH, _PANEL_HEIGHT = 380, 230


def emergence_plot(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return a standalone SVG of how reasoning emerged: four panels, in each a line a run over its steps.

    The teacher's own length is a dashed line in the colour of the run.

    Args:
        runs: by name, entries with `step`, `well_formed`, `length`, `teacher_length`, `structure` and `accuracy`.
    """
    entries = [entry for run in runs.values() for entry in run]
    last_step = max(1, *(entry["step"] for entry in entries))
    longest = max(1.0, *(max(entry["length"], entry["teacher_length"]) for entry in entries))
    drawn = ""
    for place, (title, measure, scale) in enumerate(_PANELS):
        left, above = place % 2 * _PANEL_WIDTH, 30 + place // 2 * _PANEL_HEIGHT
        top = 100.0 if scale == 100 else 4 * -(-longest // 4)  # whole numbers at the grid lines
        panel = _panel_axes(title, last_step, top)
        for colour, run in zip(_cycled(len(runs)), runs.values(), strict=True):
            points = [(entry["step"] / last_step, scale * entry[measure] / top) for entry in run]
            panel += _line([_in_panel(*point) for point in points], colour)
            panel += "".join(
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.4' fill='{colour}' />"
                for x, y in map(lambda p: _in_panel(*p), points)
            )
            if measure == "length":
                teacher = [_in_panel(x, run[-1]["teacher_length"] / top) for x in (0, 1)]
                panel += _line(teacher, colour, dashed=True)
        drawn += f"<g transform='translate({left},{above})'>{panel}</g>"
    width, height = 2 * _PANEL_WIDTH, 2 * _PANEL_HEIGHT + 52
    note = f"<text x='{_LEFT}' y='{height - 8}'>dashed: the teacher's own length</text>"
    return _standalone(drawn + _legend(list(runs)) + note, width, height, "How reasoning emerged in training")


def _in_panel(x: float, y: float) -> tuple[float, float]:
    """Return the place in a panel of a point whose axes run from 0 to 1."""
    return _LEFT + x * (_PANEL_WIDTH - _LEFT - _RIGHT), _PANEL_HEIGHT - _BOTTOM - y * (_PANEL_HEIGHT - 28 - _BOTTOM)


def _panel_axes(title: str, last_step: float, top: float) -> str:
    drawn = f"<text x='{_LEFT}' y='16' font-weight='600'>{html.escape(title)}</text>"
    for share in (0, 0.25, 0.5, 0.75, 1):
        (left, y), (right, _), (x, bottom) = _in_panel(0, share), _in_panel(1, share), _in_panel(share, 0)
        drawn += f"<line x1='{left}' y1='{y:.1f}' x2='{right}' y2='{y:.1f}' stroke='#dfe4ea' />"
        drawn += f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor='end'>{share * top:.0f}</text>"
        drawn += f"<text x='{x:.1f}' y='{bottom + 15:.1f}' text-anchor='middle'>{round(share * last_step)}</text>"
    x, bottom = _in_panel(0.5, 0)
    return drawn + f"<text x='{x}' y='{bottom + 29:.1f}' text-anchor='middle'>step</text>"


def _standalone(drawn: str, width: int, height: int, title: str) -> str:
    """Return a file of its own: with a namespace and a background."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' font-size='12' "
        f"font-family='system-ui, sans-serif' fill='#1c2430'><title>{html.escape(title)}</title>"
        f"<rect width='{width}' height='{height}' fill='#fff'/>{drawn}</svg>\n"
    )


def _cycled(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _at(x: float, y: float) -> tuple[float, float]:
    """Return the place on the picture of a point whose axes run from 0 to 1."""
    return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM)


def _line(points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = " stroke-dasharray='5 4'" if dashed else ""
    return f"<polyline points='{joined}' fill='none' stroke='{colour}' stroke-width='1.8' stroke-linejoin='round'{dashes} />"


def _axes(right: int, top: float, name: str, label) -> str:
    drawn = ""
    for share in (0, 0.25, 0.5, 0.75, 1):
        (left, y), (end, _), (x, bottom) = _at(0, share), _at(1, share), _at(share, 0)
        drawn += f"<line x1={left} y1={y:.1f} x2={end} y2={y:.1f} stroke='#dfe4ea' />"
        drawn += f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{label(share * top)}</text>"
        drawn += f"<text x={x:.1f} y={bottom + 15:.1f} text-anchor=middle>{round(share * right)}</text>"
    x, _ = _at(0.5, 0)
    return drawn + f"<text x={x} y={_HEIGHT - 4} text-anchor=middle>{name}</text>"


def _legend(names: Sequence[str]) -> str:
    """Return the names in one line above the axes, each after its colour."""
    drawn, x = "", _LEFT
    for name, colour in zip(names, _cycled(len(names)), strict=True):
        drawn += f"<line x1='{x}' y1='12' x2='{x + 14}' y2='12' stroke='{colour}' stroke-width='3' />"
        drawn += f"<text x='{x + 19}' y='16'>{html.escape(name)}</text>"
        x += 34 + 7 * len(name)
    return drawn


def _figure(drawn: str, title: str) -> str:
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width={_WIDTH} height={_HEIGHT} role=img "
        f"aria-label='{html.escape(title, quote=True)}'>{drawn}</svg>"
    )
