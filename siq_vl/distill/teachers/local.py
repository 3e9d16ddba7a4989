"""The `transformers` teacher: any image-text-to-text model, in batches on this machine's device."""

import asyncio
import inspect
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
    set_seed,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from siq_vl.distill.teachers.base import Teacher, TeacherReply, TeacherRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelDefaults:
    """What suits a family of models: its prompts and, from its model card, its sampling."""

    prompts: str
    sampling: dict = field(default_factory=dict)
    max_new_tokens: int = 1024


# The first whose key stands in the model's name, case apart, is used; any of it can be overridden.
MODEL_DEFAULTS: dict[str, ModelDefaults] = {
    "qwen3-vl-2b-thinking": ModelDefaults("qwen3_vl_thinking", {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 20}, 4096),
    "qwen3-vl-2b-instruct": ModelDefaults("qwen3_vl_instruct", {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}),
    "internvl3_5": ModelDefaults("internvl3_5", {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
    "hunyuanocr": ModelDefaults("hunyuan_ocr", {"do_sample": False}),
}  # fmt: skip


def defaults_for(model: str) -> ModelDefaults:
    """Return what suits a model, by its name; greedy decoding and the default prompts for unknown ones."""
    for key, defaults in MODEL_DEFAULTS.items():
        if key in model.casefold():
            return defaults
    return ModelDefaults("default", {"do_sample": False})


class TransformersTeacher(Teacher):
    """A model and its processor, loaded once.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit; the store records the commit that was loaded.
        sampling: arguments of `generate`, over the defaults of the model.
        max_new_tokens: bound on a reply; 0 takes the model's default.
        batch_size: requests generated together.
        seed: of the sampling.
        trust_remote_code: run the model's own code.
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
        self._sampling = {**defaults.sampling, **(sampling or {})}
        self._sampling["max_new_tokens"] = max_new_tokens or defaults.max_new_tokens
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._processor = load_processor(model, revision, trust_remote_code)
        self._processor.tokenizer.padding_side = "left"
        if self._processor.tokenizer.pad_token is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
        try:
            loaded = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype="auto", trust_remote_code=trust_remote_code
            )
        except (OSError, KeyError) as error:
            raise ValueError(f"{model} cannot be loaded as an image-text-to-text model: {error}") from error
        self._model = loaded.to(device).eval()
        self.revision = getattr(self._model.config, "_commit_hash", None) or revision or "local"

    def settings(self) -> dict:
        return {**self._sampling, "seed": self._seed}

    async def generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        # In a thread of its own, so that pictures of the next batch can be fetched and signals be heard meanwhile.
        return await asyncio.to_thread(self._generate, requests)

    def _generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        started = time.perf_counter()
        inputs = self._inputs(requests)
        prompt_tokens = inputs["attention_mask"].sum(-1).tolist()
        # A batch is made of whatever is missing, so a trace's seed cannot hang on its place in a batch alone.
        set_seed(hash_seed(self._seed, [(request.question.id, request.repeat) for request in requests]))
        with torch.inference_mode():
            output = self._model.generate(**inputs, **self._sampling)
        written = output[:, inputs["input_ids"].shape[1] :]
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
            texts.append(
                self._processor.apply_chat_template(_conversation(request), tokenize=False, add_generation_prompt=True)
            )
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


def _conversation(request: TeacherRequest) -> list[dict]:
    content: list[dict] = [{"type": "image"} for _ in request.pictures]
    content.append({"type": "text", "text": request.prompt})
    return [{"role": "user", "content": content}]


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
