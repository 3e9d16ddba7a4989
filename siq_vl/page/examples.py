"""The examples that both pages begin with, app.py's and the one with no server."""

from siq_vl.data.figures.dataset import FigureSample, sample

# Figures of the test split, by domain and place, whose questions take more than one step.
_EXAMPLES = (("scenes", 14), ("charts", 2), ("documents", 9), ("scenes", 10), ("charts", 0), ("documents", 4))


def held_out_examples() -> list[FigureSample]:
    """Return drawn figures that no training showed, with their questions."""
    return [sample("test", place, domain=domain, hard=False) for domain, place in _EXAMPLES]
