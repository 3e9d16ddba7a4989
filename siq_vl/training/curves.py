"""The learning curve as a picture: an SVG that any browser and the Hub's model cards show."""

import html
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[int, float]]

_COLOURS = ("#2563a8", "#b3572f", "#1a7f4b", "#7a4aa0", "#9a7d0a", "#0d7f86", "#a83264", "#5d6b7c")
_WIDTH, _HEIGHT = 760, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 170, 20, 40


def curves_of(history: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    """Return the loss, and the loss of each source, as (step, loss) points from a trainer's log history."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "loss" or name.startswith("loss/"):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def learning_curve_svg(curves: Mapping[str, Points], title: str) -> str:
    """Return a line chart of losses over steps.

    Args:
        curves: by name, (step, loss) points; the first is drawn on top.
        title: what the chart is of.

    Raises:
        ValueError: there is no point at all.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("there is no loss to draw: set logging_steps to at most the number of steps")
    steps, losses = zip(*points, strict=True)
    low, high = min(0.0, *losses), max(losses) or 1.0
    first, last = min(steps), max(steps)

    def place(step: int, loss: float) -> str:
        x = _LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (loss - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for quarter in range(5):
        loss = low + (high - low) * quarter / 4
        x, y = place(first, loss).split(",")
        parts.append(f"<path d='M{x},{y}H{_WIDTH - _RIGHT}' stroke='#dfe4ea'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{float(y) + 4:.1f}' text-anchor='end'>{loss:.3g}</text>")
        step = round(first + (last - first) * quarter / 4)
        x = place(step, low).split(",")[0]
        parts.append(f"<text x='{x}' y='{_HEIGHT - 18}' text-anchor='middle'>{step}</text>")
    parts.append(f"<text x='{(_WIDTH - _RIGHT) / 2}' y='{_HEIGHT - 2}' text-anchor='middle'>step</text>")
    for index, (name, curve) in reversed(list(enumerate(curves.items()))):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(place(*point) for point in curve)
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='{1.2 if index else 2}'/>")
        base = _TOP + 18 * index + 6
        label = f"{html.escape(name)} {curve[-1][1]:.3f}"
        parts.append(f"<path d='M{_WIDTH - _RIGHT + 10},{base - 4}h16' stroke='{colour}' stroke-width='3'/>")
        parts.append(f"<text x='{_WIDTH - _RIGHT + 32}' y='{base}'>{label}</text>")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' font-size='12' "
        f"font-family='system-ui, sans-serif' fill='#1c2430'><title>{html.escape(title)}</title>"
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#fff'/>{''.join(parts)}</svg>\n"
    )
