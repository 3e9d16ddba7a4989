"""The `figures` teacher: a scripted oracle that knows the drawn data set's truth, in three styles.

It is no model. TeacherRequest to, it makes mistakes of the kinds that models make, each of a known kind, so that verification can
be measured against the truth.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import singledispatch
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
        self.style = style
        self.error_rate = error_rate
        self.seed = seed
        self.name = f"figures-{style}"
        self.revision = REVISION

    def settings(self) -> dict:
        return {"style": self.style, "error_rate": self.error_rate, "seed": self.seed}

    async def generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: TeacherRequest) -> TeacherReply:
        drawn = request.question.drawn
        if drawn is None:
            raise TeacherLost("the figures teacher knows drawn figures alone: leave --questions out, or ask a model")
        rng = Random(f"{self.seed}/{drawn.seed}/{self.style}/{request.repeat}/error")
        if rng.random() < self.error_rate:
            text, finish_reason, injected = self._mistaken(drawn, rng)
        else:
            text, finish_reason, injected = reasoned(self._reason(drawn), drawn.question.answer), "stop", ""
        # Words stand in for tokens, so that budgets and costs can be tried without a model.
        return TeacherReply(text, finish_reason, len(request.prompt.split()), len(text.split()), injected=injected)

    def _reason(self, drawn: FigureSample, question: Question | None = None, figure: Figure | None = None) -> str:
        return rationale(figure or drawn.figure, question or drawn.question, self.style)

    def _mistaken(self, drawn: FigureSample, rng: Random) -> tuple[str, str, str]:
        """Return text, finish reason and the kind of the fault; a fault that this question cannot have is redrawn."""
        kinds = tuple(_FAULTS)
        weights = [weight for weight, _ in _FAULTS.values()]
        while True:
            kind = rng.choices(kinds, weights)[0]
            _, put_in = _FAULTS[kind]
            made = put_in(self, drawn, rng)
            if made is not None:
                text, finish_reason = made
                return text, finish_reason, kind

    def _misread(self, drawn: FigureSample, rng: Random) -> tuple[str, str] | None:
        """A fact that the answer hangs on is taken for another; everything after follows from it without a slip."""
        return self._as_read(drawn, rng, changes_answer=True)

    def _misread_beside(self, drawn: FigureSample, rng: Random) -> tuple[str, str] | None:
        """A fact is taken for another and stated, and the answer comes out right all the same."""
        return self._as_read(drawn, rng, changes_answer=False)

    def _as_read(self, drawn: FigureSample, rng: Random, changes_answer: bool) -> tuple[str, str] | None:
        asked, right = drawn.question, self._reason(drawn)
        # Another figure can be misread, yet make no difference to this question: some tries, then another fault.
        for _ in range(5):
            figure = misread_figure(drawn.figure, rng)
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
        wrong_sign = {"<": ">", ">": "<"}[sign]
        steps = (*asked.steps[:-1], f"{a} {wrong_sign} {b}")
        if asked.answer in _OPPOSITE:
            answer = _OPPOSITE[asked.answer]
        else:
            # The answer is one of the two labels that the first steps read a number for.
            labels = [step.rpartition(" ")[0] for step in asked.steps[:2]]
            answer = labels[1] if labels[0] == asked.answer else labels[0]
        return reasoned(self._reason(drawn, replace(asked, steps=steps)), answer), "stop"

    def _misanswer(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        """The reasoning is right and the answer is something else that the picture could have shown."""
        return reasoned(self._reason(drawn), _another(drawn.question.answer, drawn.figure, rng)), "stop"

    def _loop(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        """The last step is repeated, to the end of the output or until the answer comes after all."""
        repeated = [drawn.question.steps[-1]] * rng.randint(12, 40)
        reasoning = ". ".join([self._reason(drawn), *repeated])
        if rng.random() < 0.5:
            return f"<think>{reasoning}", "length"
        return reasoned(reasoning, drawn.question.answer), "stop"

    def _refuse(self, drawn: FigureSample, rng: Random) -> tuple[str, str]:
        refusal = rng.choice(_REFUSALS)
        if rng.random() < 0.5:
            return refusal, "stop"
        return reasoned(refusal, rng.choice(("unknown", drawn.question.answer))), "stop"

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
    near = [value + step for step in (-10, -2, -1, 1, 2, 10)]
    return rng.choice([number for number in near if number >= 0])


@singledispatch
def misread_figure(figure: Figure, rng: Random) -> Figure:
    """Return the figure with one fact read wrongly: a near number, another colour, object, place or word.

    Each kind of figure has its own function below.
    """
    raise ValueError(f"figures of kind {figure.kind!r} have no misreadings yet: register one with misread_figure")


@misread_figure.register
def _(figure: Chart, rng: Random) -> Figure:
    return replace(figure, entries=_misread_value(figure.entries, rng))


@misread_figure.register
def _(figure: Receipt, rng: Random) -> Figure:
    return replace(figure, lines=_misread_value(figure.lines, rng))


def _misread_value(entries: Sequence[tuple[str, int]], rng: Random) -> tuple[tuple[str, int], ...]:
    """Return labels and values with one value changed for the nearest that no entry has."""
    misread = list(entries)
    place = rng.randrange(len(misread))
    label, value = misread[place]
    taken = {other for _, other in misread}
    free = [number for number in range(1, MAX_VALUE + 1) if number not in taken]
    # Of two that are equally near, either.
    nearest = min(free, key=lambda number: (abs(number - value), rng.random()))
    misread[place] = (label, nearest)
    return tuple(misread)


@misread_figure.register
def _(figure: Plate, rng: Random) -> Figure:
    number = _near(figure.number, rng)
    return replace(figure, number=min(99, max(10, number)))


@misread_figure.register
def _(figure: Signs, rng: Random) -> Figure:
    boards = list(figure.boards)
    place = rng.randrange(len(boards))
    color, word = boards[place]
    word_of = dict(boards)
    # A colour or word that another board has would make two facts wrong.
    if rng.random() < 0.5:
        word = rng.choice([other for other in SIGNS if other not in word_of.values()])
    else:
        color = rng.choice([other for other in COLORS if other not in word_of])
    boards[place] = (color, word)
    return replace(figure, boards=tuple(boards))


@misread_figure.register
def _(figure: Scene, rng: Random) -> Figure:
    objects = list(figure.objects)
    place = rng.randrange(len(objects))
    name, color, where = objects[place]
    if rng.random() < 0.7:
        color = rng.choice([other for other in COLORS if other != color])
    else:
        names = {known for known, _, _ in objects}
        name = rng.choice([other for other in OBJECTS if other not in names])
    objects[place] = (name, color, where)
    return replace(figure, objects=tuple(objects))


def _another(answer: str, figure: Figure, rng: Random) -> str:
    """Return a wrong answer of the same kind, from the picture itself where it has one."""
    if answer in _OPPOSITE:
        return _OPPOSITE[answer]
    if answer.isdigit():
        return str(_near(int(answer), rng))
    words = []
    for fact in figure.facts:
        words += [word for word in fact if not word.isdigit() and word != answer]
    for family in (COLORS, OBJECTS, PLACES, SIGNS):
        if answer in family:
            in_picture = [word for word in words if word in family]
            return rng.choice(in_picture or [word for word in family if word != answer])
    return rng.choice(words or ["none"])
