"""The `figures` teacher: a scripted oracle that knows the drawn data set's truth, in three styles.

It is no model. TeacherRequest to, it makes mistakes of the kinds that models make, each of a known kind, so that verification can
be measured against the truth.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from siq_vl.data.figures.charts import MAX_VALUE, Chart
from siq_vl.data.figures.dataset import STYLES, FigureSample, rationale
from siq_vl.data.figures.documents import Plate, Receipt, Signs
from siq_vl.data.figures.figure import Figure, Question
from siq_vl.data.figures.lexicon import COLORS, OBJECTS, PLACES, SIGNS
from siq_vl.data.figures.rows import reasoned
from siq_vl.data.figures.scenes import Scene
from siq_vl.distill.teachers.base import Teacher, TeacherLost, TeacherReply, TeacherRequest

REVISION = "1"
_REFUSALS = (
    "I'm sorry, but I can't see any image in your message. Please provide the picture.",
    "I cannot determine this from the picture.",
    "As an AI language model, I am unable to view images.",
)
_FOREIGN = ("首先观察图片中的内容，", "然后读取每一个数值，再进行比较。", "因此可以得出结论，答案如下。")
_EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
_OPPOSITE = {"yes": "no", "no": "yes"}


class FiguresTeacher(Teacher):
    """The oracle in one style.

    Args:
        style: one of `dataset.STYLES`: structured step by step, terse arithmetic, or text first.
        error_rate: share of traces with one fault put in, its kind stated in `TeacherReply.injected`.
        seed: of the faults.
    """

    kind = "figures"
    batch_size = 16

    def __init__(self, style: str = "structured", error_rate: float = 0.0, seed: int = 0):
        if style not in STYLES:
            raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
        if not 0 <= error_rate <= 1:
            raise ValueError(f"error_rate is {error_rate}; it must lie between 0 and 1")
        self.style, self.error_rate, self.seed = style, error_rate, seed
        self.name, self.revision = f"figures-{style}", REVISION

    def settings(self) -> dict:
        return {"style": self.style, "error_rate": self.error_rate, "seed": self.seed}

    async def generate(self, asked: Sequence[TeacherRequest]) -> list[TeacherReply]:
        return [self._answer(one) for one in asked]

    def _answer(self, asked: TeacherRequest) -> TeacherReply:
        drawn = asked.question.drawn
        if drawn is None:
            raise TeacherLost("the figures teacher knows drawn figures alone: leave --questions out, or ask a model")
        rng = Random(f"{self.seed}/{drawn.seed}/{self.style}/{asked.repeat}/error")
        text, finish, injected = reasoned(self._reason(drawn), drawn.question.answer), "stop", ""
        if rng.random() < self.error_rate:
            text, finish, injected = self._mistaken(drawn, rng)
        return TeacherReply(text, finish, len(asked.prompt.split()), len(text.split()), injected=injected)

    def _reason(self, drawn: FigureSample, question: Question | None = None, figure: Figure | None = None) -> str:
        return rationale(figure or drawn.figure, question or drawn.question, self.style)

    def _mistaken(self, drawn: FigureSample, rng: Random) -> tuple[str, str, str]:
        """Return text, finish reason and the kind of the fault; a fault that this question cannot have is redrawn."""
        while True:
            kind = rng.choices(tuple(_FAULTS), [weight for weight, _ in _FAULTS.values()])[0]
            made = _FAULTS[kind][1](self, drawn, rng)
            if made is not None:
                return *made, kind

    def _misread(self, drawn: FigureSample, rng: Random) -> tuple[str, str] | None:
        """A fact that the answer hangs on is taken for another; everything after follows from it without a slip."""
        return self._as_read(drawn, rng, changes_answer=True)

    def _misread_beside(self, drawn: FigureSample, rng: Random) -> tuple[str, str] | None:
        """A fact is taken for another and stated, and the answer comes out right all the same."""
        return self._as_read(drawn, rng, changes_answer=False)

    def _as_read(self, drawn: FigureSample, rng: Random, changes_answer: bool) -> tuple[str, str] | None:
        asked, right = drawn.question, self._reason(drawn)
        for _ in range(5):
            figure = _misread_figure(drawn.figure, rng)
            question = _same_question(asked, figure, rng)
            if question is None or (question.answer != asked.answer) != changes_answer:
                continue
            reasoning = self._reason(drawn, question, figure)
            if reasoning != right:
                return reasoned(reasoning, question.answer), "stop"
        return None

    def _miscalculate(self, drawn: FigureSample, rng: Random) -> tuple[str, str] | None:
        """The last equation comes out wrong, and the answer follows it."""
        asked = drawn.question
        if not _EQUATION.search(asked.steps[-1]):
            return None
        wrong = str(_near(int(asked.answer), rng))
        step = re.sub(r"= \d+$", f"= {wrong}", asked.steps[-1])
        return reasoned(self._reason(drawn, replace(asked, steps=(*asked.steps[:-1], step))), wrong), "stop"

    def _miscompare(self, drawn: FigureSample, rng: Random) -> tuple[str, str] | None:
        """Two numbers are held against each other the wrong way round, and the answer follows it."""
        asked = drawn.question
        compared = re.fullmatch(r"(\d+) ([<>]) (\d+)", asked.steps[-1])
        if not compared:
            return None
        a, sign, b = compared.groups()
        step = f"{a} {'<' if sign == '>' else '>'} {b}"
        labels = [step.rpartition(" ")[0] for step in asked.steps[:2]]
        other = _OPPOSITE.get(asked.answer) or next(label for label in labels if label != asked.answer)
        return reasoned(self._reason(drawn, replace(asked, steps=(*asked.steps[:-1], step))), other), "stop"

    def _misanswer(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        """The reasoning is right and the answer is something else that the picture could have shown."""
        return reasoned(self._reason(drawn), _another(drawn.question.answer, drawn.figure, rng)), "stop"

    def _loop(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        """The last step is repeated, to the end of the output or until the answer comes after all."""
        reasoning = ". ".join((self._reason(drawn), *[drawn.question.steps[-1]] * rng.randint(12, 40)))
        if rng.random() < 0.5:
            return f"<think>{reasoning}", "length"
        return reasoned(reasoning, drawn.question.answer), "stop"

    def _refuse(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        said = rng.choice(_REFUSALS)
        return (said if rng.random() < 0.5 else reasoned(said, rng.choice(("unknown", drawn.question.answer)))), "stop"

    def _cut(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        """The output ends before its answer does."""
        whole = reasoned(self._reason(drawn), drawn.question.answer)
        end = whole.index("<answer>") + len("<answer>")
        return whole[: rng.randint(len("<think>") + 1, end)], "length"

    def _mix(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        """Some of the reasoning is in another language, as half-trained models do."""
        return reasoned("".join(_FOREIGN) + self._reason(drawn), drawn.question.answer), "stop"


_FAULTS: dict[str, tuple[int, Callable]] = {
    "misread": (5, FiguresTeacher._misread),
    "misread beside the point": (2, FiguresTeacher._misread_beside),
    "wrong arithmetic": (3, FiguresTeacher._miscalculate),
    "wrong comparison": (2, FiguresTeacher._miscompare),
    "wrong answer": (3, FiguresTeacher._misanswer),
    "repetition loop": (2, FiguresTeacher._loop),
    "refusal": (2, FiguresTeacher._refuse),
    "cut off": (2, FiguresTeacher._cut),
    "mixed language": (1, FiguresTeacher._mix),
}


def _same_question(asked: Question, figure: Figure, rng: Random) -> Question | None:
    """Return what the same words ask about another figure; None where they cannot be asked of it."""
    for _ in range(60):
        for question in figure.questions(rng):
            if (question.type, question.text) == (asked.type, asked.text):
                return question
    return None


def _near(value: int, rng: Random) -> int:
    """Return a number close by, never the same and never negative."""
    return rng.choice(
        [near for near in (value - 10, value - 2, value - 1, value + 1, value + 2, value + 10) if near >= 0]
    )


def _misread_figure(figure: Figure, rng: Random) -> Figure:
    """Return the figure with one fact read wrongly: a near number, another colour, object, place or word."""
    if isinstance(figure, Chart | Receipt):
        entries = list(figure.entries if isinstance(figure, Chart) else figure.lines)
        place = rng.randrange(len(entries))
        taken = {value for _, value in entries}
        free = [value for value in range(1, MAX_VALUE + 1) if value not in taken]
        label, value = entries[place]
        entries[place] = (label, min(free, key=lambda other: (abs(other - value), rng.random())))
        if isinstance(figure, Chart):
            return replace(figure, entries=tuple(entries))
        return replace(figure, lines=tuple(entries))
    if isinstance(figure, Plate):
        return replace(figure, number=min(99, max(10, _near(figure.number, rng))))
    if isinstance(figure, Signs):
        boards = list(figure.boards)
        place = rng.randrange(len(boards))
        color, word = boards[place]
        if rng.random() < 0.5:
            word = rng.choice([other for other in SIGNS if other not in dict(boards).values()])
        else:
            color = rng.choice([other for other in COLORS if other not in dict(boards)])
        boards[place] = (color, word)
        return replace(figure, boards=tuple(boards))
    if isinstance(figure, Scene):
        objects = list(figure.objects)
        place = rng.randrange(len(objects))
        name, color, where = objects[place]
        if rng.random() < 0.7:
            color = rng.choice([other for other in COLORS if other != color])
        else:
            name = rng.choice([other for other in OBJECTS if other not in {known for known, _, _ in objects}])
        objects[place] = (name, color, where)
        return replace(figure, objects=tuple(objects))
    raise ValueError(f"figures of kind {figure.kind!r} have no misreadings yet: add one to _misread_figure")


def _another(answer: str, figure: Figure, rng: Random) -> str:
    """Return a wrong answer of the same kind, from the picture itself where it has one."""
    if answer in _OPPOSITE:
        return _OPPOSITE[answer]
    if answer.isdigit():
        return str(_near(int(answer), rng))
    words = [word for fact in figure.facts for word in fact if not word.isdigit() and word != answer]
    for family in (COLORS, OBJECTS, PLACES, SIGNS):
        if answer in family:
            return rng.choice([word for word in words if word in family] or [word for word in family if word != answer])
    return rng.choice(words or ["none"])
