"""What stage 3 learns from, as its recipe says it: options alone, with nothing that reads."""

from dataclasses import dataclass, field

CURRICULA = ("none", "length")
STUDENTS = ("multimodal", "text")


@dataclass
class TraceArguments:
    """What stage 3 learns from: the traces of a store, and which of them."""

    traces: str | None = field(default=None, metadata={"help": "Folder of the store, as generate_traces.py leaves it."})
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "Teachers, 'name' or 'name=weight' (where traces are drawn); default: every teacher alike."},
    )
    traces_per_question: int = field(
        default=1, metadata={"help": "Traces of one question, drawn by the teachers' weights; 0: all of them."}
    )
    max_rationale_tokens: int = field(
        default=0,
        metadata={"help": "Longest rationale, in the student's tokens; longer ones are left out; 0: no bound."},
    )
    curriculum: str = field(
        default="none", metadata={"help": "'none', or 'length': in each epoch short rationales first, growing."}
    )
    direct_share: float = field(
        default=0.0, metadata={"help": "Share of rows that answer directly, so that short answers survive."}
    )
    answer_weight: float = field(
        default=1.0, metadata={"help": "Loss weight of the tokens of <answer>...</answer>; all others have 1."}
    )
    verified: bool = field(
        default=True, metadata={"help": "Kept traces; false: rejected ones too, where they reason and answer."}
    )
    student: str = field(
        default="multimodal", metadata={"help": "'multimodal', or 'text': captions and OCR text in place of pictures."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of the pictures, for a store that keeps them by reference."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the questions that is kept from training, for eval_strategy."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without a better validation loss; 0: never."}
    )

    def __post_init__(self) -> None:
        _ = self.weights  # refuses teachers that cannot be
        if self.curriculum not in CURRICULA:
            raise ValueError(f"curriculum is {self.curriculum!r}; it must be one of {', '.join(CURRICULA)}")
        if self.student not in STUDENTS:
            raise ValueError(f"student is {self.student!r}; it must be one of {', '.join(STUDENTS)}")
        for name in ("traces_per_question", "max_rationale_tokens", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.direct_share <= 1:
            raise ValueError(f"direct_share is {self.direct_share}; it must lie between 0 and 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}; it must be at least 0 and less than 1")
        if self.answer_weight <= 0:
            raise ValueError(f"answer_weight is {self.answer_weight}; it must be above 0, 1 for the plain loss")

    @property
    def weights(self) -> dict[str, float]:
        """The named teachers and their weights.

        Raises:
            ValueError: a weight that is no number above 0, or a teacher named twice.
        """
        weights: dict[str, float] = {}
        for given in self.teachers:
            name, sign, weight = given.partition("=")
            try:
                weights[name] = float(weight if sign else 1)
            except ValueError:
                weights[name] = 0.0  # no number: refused below, like a weight of 0
            if weights[name] <= 0:
                raise ValueError(f"teacher {given!r}: write it as name or name=weight, with a weight above 0")
        if len(weights) < len(self.teachers):
            raise ValueError(f"teachers are {', '.join(self.teachers)}: name each of them once")
        return weights
