"""The `transformers` teacher: any image-text-to-text model, in batches on this machine's device."""

import asyncio
import inspect
import logging
import time
import zlib
from collections.abc import Mapping, Sequence

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    ProcessorMixin,
    set_seed,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from siq_vl.distill.teachers.base import Teacher, TeacherReply, TeacherRequest
from siq_vl.distill.teachers.models import (
    PRESENCE_PENALTY,
    check_loadable,
    defaults_for,
    generate_arguments,
    native_internvl,
    unknown_type,
)

logger = logging.getLogger(__name__)


class PresencePenalty(LogitsProcessor):
    """Lowers the score of every token that a reply holds already, as servers do: tokens of the prompt do not count.

    Args:
        penalty: what is taken off a token's score, once, however often it was written.
        prompt_length: tokens of the prompt, padding included.
    """

    def __init__(self, penalty: float, prompt_length: int):
        self.penalty, self.prompt_length = penalty, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores, `(rows, vocabulary)`, after the tokens `(rows, tokens)`."""
        written = input_ids[:, self.prompt_length :]
        penalties = torch.zeros_like(scores).scatter_(1, written, self.penalty)
        return scores - penalties  # type: ignore[return-value]


class TransformersTeacher(Teacher):
    """A model and its processor, loaded once.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit; the store records the commit that was loaded.
        sampling: arguments of `generate`, and `presence_penalty`, over the defaults of the model.
        max_new_tokens: bound on a reply; 0 takes the model's default.
        batch_size: requests generated together.
        seed: of the sampling.
        trust_remote_code: run the model's own code.
        name: what the store calls the teacher; by default the model.

    Raises:
        ValueError: the model cannot be loaded here, or `sampling` names what `generate` does not know.
    """

    kind = "transformers"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        sampling: dict | None = None,
        max_new_tokens: int = 0,
        batch_size: int = 8,
        seed: int = 0,
        trust_remote_code: bool = False,
        name: str | None = None,
    ):
        defaults = defaults_for(model)
        self.name = name or model
        self.prompts_family = defaults.prompts
        self.batch_size = batch_size
        self._seed = seed
        self._system = defaults.system
        self._sampling = generate_arguments(model, sampling or {}, max_new_tokens)
        self.max_new_tokens = self._sampling["max_new_tokens"]
        _check_arguments(self._sampling)
        check_loadable(model)
        _check_type(model, revision, trust_remote_code)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._processor = load_processor(model, revision, trust_remote_code)
        self._processor.tokenizer.padding_side = "left"
        if self._processor.tokenizer.pad_token is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
        try:
            loaded = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype="auto", trust_remote_code=trust_remote_code
            )
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{model} cannot be loaded as an image-text-to-text model: {error}") from error
        self._model = loaded.to(device).eval()
        self.revision = getattr(self._model.config, "_commit_hash", None) or revision or "local"

    def settings(self) -> dict:
        settings = {**self._sampling, "seed": self._seed}
        if self._system is not None:
            settings["system"] = self._system
        return settings

    async def generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        # In a thread of its own, so that pictures of the next batch can be fetched and signals be heard meanwhile.
        return await asyncio.to_thread(self._generate, requests)

    def _generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        started = time.perf_counter()
        inputs = self._inputs(requests)
        prompt_tokens = inputs["attention_mask"].sum(-1).tolist()
        # A batch is made of whatever is missing, so a trace's seed cannot hang on its place in a batch alone.
        set_seed(hash_seed(self._seed, [(request.question.id, request.repeat) for request in requests]))
        prompt_length = inputs["input_ids"].shape[1]
        arguments = dict(self._sampling)
        processors = LogitsProcessorList()
        if penalty := arguments.pop(PRESENCE_PENALTY, 0):
            processors.append(PresencePenalty(penalty, prompt_length))
        with torch.inference_mode():
            output = self._model.generate(**inputs, **arguments, logits_processor=processors)
        written = output[:, prompt_length:]
        seconds = (time.perf_counter() - started) / len(requests)
        replies = []
        for row, read in zip(written, prompt_tokens, strict=True):
            replies.append(self._reply(row, int(read), seconds))
        return replies

    def _inputs(self, requests: Sequence[TeacherRequest]) -> dict[str, torch.Tensor]:
        """Return what the model's `forward` takes, on its device: token ids `(requests, tokens)`, pictures, and more."""
        texts = []
        images = []
        for request in requests:
            turns = conversation(request, self._system)
            texts.append(self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            images += [picture.image for picture in request.pictures]
        made = self._processor(images=images or None, text=texts, padding=True, return_tensors="pt")
        # Some processors return more than their model takes.
        accepted = inspect.signature(self._model.forward).parameters
        inputs = {}
        for name, value in made.to(self._model.device).items():
            if name not in accepted:
                continue
            if torch.is_floating_point(value):
                value = value.to(self._model.dtype)
            inputs[name] = value
        return inputs

    def _reply(self, row: torch.Tensor, read: int, seconds: float) -> TeacherReply:
        """Read one generated row, `(new_tokens,)`, up to its end of turn."""
        ends = self._model.generation_config.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        # Without an end the row was cut; behind one there is only padding.
        finish_reason = "length"
        tokens = []
        for token in row.tolist():
            if token in ends:
                finish_reason = "stop"
                break
            tokens.append(token)
        # Thinking tags can be special tokens of their own: they stay, other special tokens go.
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=False)
        for added in self._processor.tokenizer.added_tokens_decoder.values():
            if added.special and added.content not in ("<think>", "</think>", "<answer>", "</answer>"):
                text = text.replace(added.content, "")
        text = text.strip()
        error = "" if text else "the message was empty"
        return TeacherReply(text, finish_reason, read, len(tokens), seconds, error=error)


def conversation(request: TeacherRequest, system: str | None) -> list[dict]:
    """Return a request as the turns of a chat, with a system turn where the model wants one, be it empty."""
    turns: list[dict] = []
    if system is not None:
        turns.append({"role": "system", "content": [{"type": "text", "text": system}]})
    content: list[dict] = [{"type": "image"} for _ in request.pictures]
    content.append({"type": "text", "text": request.prompt})
    turns.append({"role": "user", "content": content})
    return turns


def _check_arguments(sampling: Mapping) -> None:
    """Refuse settings that `generate` would refuse, before the model is loaded.

    Raises:
        ValueError: one is not known.
    """
    known = vars(GenerationConfig())
    for name in sampling:
        if name not in known and name != PRESENCE_PENALTY:
            raise ValueError(
                f"sampling names {name!r}, which transformers' generate does not know: leave it out, or ask a server "
                "with --teacher openai"
            )


def _check_type(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a model of a type that this transformers lacks, by its configuration alone.

    Raises:
        ValueError: it is such a model.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError):
        return  # there is none: what is missing is said where the processor is loaded
    model_type = config.get("model_type", "")
    if model_type == "internvl_chat":
        raise ValueError(native_internvl(model))
    has_own_code = trust_remote_code and "auto_map" in config
    if model_type and model_type not in CONFIG_MAPPING and not has_own_code:
        raise ValueError(unknown_type(model, model_type))


def hash_seed(seed: int, parts: Sequence) -> int:
    """Return a seed below 2**31 that is the same in every process."""
    return zlib.crc32(repr((seed, parts)).encode()) & 0x7FFFFFFF


def load_processor(model: str, revision: str | None = None, trust_remote_code: bool = False) -> ProcessorMixin:
    """Return the model's processor.

    Where torchvision is missing, transformers builds no processor that can read videos too, though pictures need none:
    the video part is then left out.

    Raises:
        ValueError: the folder or Hub id has no processor.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoProcessor.from_pretrained(model, **options)
    except (ImportError, OSError, ValueError) as error:
        if "torchvision" in str(error).casefold() and not is_torchvision_available():
            logger.info("torchvision is not installed: %s reads pictures, not videos", model)
            return _pictures_only(model, options)
        raise ValueError(f"{model} has no processor that can be loaded: {error}") from error


def _pictures_only(model: str, options: dict) -> ProcessorMixin:
    """Put a processor together from its picture and text parts, as its `from_pretrained` does with all three."""
    processor_class = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(model, **options))]

    class PicturesOnly(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    parts = [
        AutoImageProcessor.from_pretrained(model, **options),
        AutoTokenizer.from_pretrained(model, **options),
        None,
    ]
    described, _ = processor_class.get_processor_dict(model)
    return PicturesOnly.from_args_and_dict(parts, described)
