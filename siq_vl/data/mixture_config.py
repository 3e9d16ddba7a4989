"""What a recipe says of its data: sources, filters, mixture, stored features.

Options alone, with nothing that reads: a script knows its command line before it imports what takes seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from siq_vl.data.adapters import FORMATS, RATINGS

FIGURES = "figures"  # the path of the drawn data set
FEATURE_DTYPES = ("bfloat16", "float32", "int8")

# How assistants begin when they refuse. Looked for, in lower case, in the first sentence of an answer.
REFUSALS = (
    "i'm sorry, but",
    "i am sorry, but",
    "i cannot assist",
    "i can't assist",
    "i'm unable to",
    "i am unable to",
    "i cannot see",
    "i can't see",
    "i cannot view",
    "i can't view",
    "as an ai",
    "as a language model",
    "no image was provided",
    "there is no image",
)


@dataclass
class FilterConfig:
    """What to leave out of a source. Nothing is left out by default."""

    min_ratings: dict[str, int] = field(
        default_factory=dict, metadata={"help": f"Least rating, 1 to 5, of each kept turn: {', '.join(RATINGS)}."}
    )
    drop_refusals: bool = field(default=False, metadata={"help": "Leave out rows in which the assistant refuses."})
    refusal_phrases: list[str] = field(default_factory=lambda: list(REFUSALS), metadata={"help": "Marks of a refusal."})
    min_answer_characters: int = field(default=0, metadata={"help": "Least length of every answer."})
    max_answer_characters: int | None = field(default=None, metadata={"help": "Greatest length of every answer."})
    max_question_characters: int | None = field(default=None, metadata={"help": "Greatest length of every question."})
    max_turns: int | None = field(default=None, metadata={"help": "Greatest number of answers in a row."})
    drop_duplicate_images: bool = field(default=False, metadata={"help": "Use each picture (or set of them) once."})
    drop_duplicate_questions: bool = field(
        default=False, metadata={"help": "Use the same questions about the same pictures once."}
    )
    min_image_text_score: float | None = field(
        default=None, metadata={"help": "Least SigLIP similarity, -1 to 1, of a row's first picture and its answer."}
    )

    def __post_init__(self) -> None:
        for name, least in self.min_ratings.items():
            if name not in RATINGS or not 1 <= least <= 5:
                raise ValueError(f"min_ratings has {name}: {least}; it takes {', '.join(RATINGS)}, each from 1 to 5")
        if self.max_answer_characters is not None and self.max_answer_characters < self.min_answer_characters:
            raise ValueError(
                f"max_answer_characters is {self.max_answer_characters}, below min_answer_characters "
                f"{self.min_answer_characters}: no answer has both"
            )
        if self.min_image_text_score is not None and not -1 <= self.min_image_text_score <= 1:
            raise ValueError(f"min_image_text_score is {self.min_image_text_score}; a similarity lies between -1 and 1")

    @property
    def read_pictures(self) -> bool:
        """Whether pictures have to be read to filter, which takes its time."""
        return self.drop_duplicate_images or self.drop_duplicate_questions or self.min_image_text_score is not None


@dataclass
class SourceConfig:
    """One source of a mixture; in a recipe, one mapping of the list `sources`."""

    path: str = field(metadata={"help": "Hub id, local file or folder, or 'figures', the drawn data set."})
    format: str | None = field(default=None, metadata={"help": f"One of {', '.join(FORMATS)}; told by the columns."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set, or a sub-folder."})
    data_files: str | None = field(default=None, metadata={"help": "File of a Hub data set, where it has several."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    weight: float | None = field(default=None, metadata={"help": "Share of the mixture, set for all sources or none."})
    max_samples: int | None = field(default=None, metadata={"help": "Rows to use at most, drawn at random."})
    streaming: bool = field(default=False, metadata={"help": "Read rows while training, with nothing read before."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where named pictures lie, if not beside the rows."}
    )
    allow_remote_images: bool = field(default=False, metadata={"help": "Fetch pictures that are given as addresses."})
    instruction: str | None = field(default=None, metadata={"help": "Added to every question; for captions, asks."})
    filters: FilterConfig = field(default_factory=FilterConfig, metadata={"help": "What to leave out."})

    def __post_init__(self) -> None:
        if isinstance(self.filters, Mapping):
            self.filters = FilterConfig(**self.filters)
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; it must be one of {', '.join(FORMATS)}")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight of {self.path} is {self.weight}; it must be above 0, or leave the source out")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples of {self.path} is {self.max_samples}; it must be at least 1")

    @property
    def name(self) -> str:
        """What logs, counts and the model card call the source; never an absolute path."""
        path = Path(self.path).resolve().name if Path(self.path).exists() else self.path
        return path if self.subset is None else f"{path}/{self.subset}"


@dataclass
class MixtureConfig:
    """What is trained on."""

    sources: list[SourceConfig] = field(
        default_factory=lambda: [SourceConfig(FIGURES)],
        metadata={"help": "Sources of the mixture: in a recipe, a list of mappings; here, paths or Hub ids."},
    )
    train_samples: int = field(
        default=0, metadata={"help": "Rows of the mixture; 0: as many as the steps take, or every row once an epoch."}
    )
    data_seed_offset: int = field(default=0, metadata={"help": "Stream of samples; each stage has its own."})
    blind: bool = field(default=False, metadata={"help": "Withhold every picture: the blind baseline."})
    max_bad_share: float = field(
        default=0.05, metadata={"help": "Stop when more than this share of the rows read from a source is broken."}
    )
    max_image_side: int = field(
        default=4096, metadata={"help": "Pictures with a longer side are scaled down to it while they are read."}
    )
    score_model: str | None = field(
        default=None, metadata={"help": "SigLIP checkpoint for min_image_text_score; the vision tower's by default."}
    )

    def __post_init__(self) -> None:
        for place, source in enumerate(self.sources):
            if isinstance(source, Mapping):  # as a recipe gives it
                self.sources[place] = SourceConfig(**source)
        if not self.sources:
            raise ValueError("sources is empty; name at least one, for instance `path: figures`")
        # A source without a weight would have no share beside weighted ones.
        weighted = [each.path for each in self.sources if each.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ValueError(f"weight is set for {', '.join(weighted)} alone; set it for every source or for none")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; it must lie between 0 and 1")
        if self.max_image_side < 1:
            raise ValueError(f"max_image_side is {self.max_image_side}; it must be at least 1 pixel")


@dataclass
class FeatureArguments:
    """Whether the frozen vision tower's features are computed once and stored, and where."""

    feature_cache: str = field(
        default="auto",
        metadata={"help": "Compute the frozen vision tower's features once: 'on', 'off', or 'auto', where it pays."},
    )
    feature_cache_dir: str = field(default="outputs/features", metadata={"help": "Folder of the stored features."})
    feature_cache_gb: float = field(default=20.0, metadata={"help": "The most that folder may take, in GB (10**9)."})
    feature_cache_dtype: str = field(
        default="bfloat16", metadata={"help": f"Type of the stored features: {', '.join(FEATURE_DTYPES)}."}
    )

    def __post_init__(self) -> None:
        if self.feature_cache not in ("auto", "on", "off"):
            raise ValueError(f"feature_cache is {self.feature_cache!r}; it must be 'auto', 'on' or 'off'")
        if self.feature_cache_gb <= 0:
            raise ValueError(
                f"feature_cache_gb is {self.feature_cache_gb}; it must be above 0, or set feature_cache off"
            )
        if self.feature_cache_dtype not in FEATURE_DTYPES:
            raise ValueError(
                f"feature_cache_dtype is {self.feature_cache_dtype!r}; it must be one of {', '.join(FEATURE_DTYPES)}"
            )
