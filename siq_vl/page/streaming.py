"""Answers that arrive token by token, from any number of threads, and that end when nobody listens any more."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from siq_vl.data.figures.rows import user_turn
from siq_vl.evaluation.generation import rendered
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration
from siq_vl.page.attention import AttentionMap, attention_to_image, eager_twin, picture_layout
from siq_vl.processing_siq_vl import SiQVLProcessor


@dataclass(frozen=True)
class Output:
    """What a model has said so far; `attention` comes with the last output, unless the answer was stopped."""

    text: str
    finished: bool = False
    attention: AttentionMap | None = None


class Stopped(StoppingCriteria):
    """Ends a generation once an event is set."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class StreamingModel:
    """A checkpoint whose answers about pictures arrive token by token.

    Generation changes nothing of the model, so that several answers may be under way at once.

    Args:
        name: what the page calls it.
        model: in evaluation mode.
        processor: its processor.
        max_new_tokens: bound on reasoning and answer together.
    """

    def __init__(
        self, name: str, model: SiQVLForConditionalGeneration, processor: SiQVLProcessor, max_new_tokens: int = 256
    ):
        self.name = name
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self._twin = eager_twin(model)

    def stream(
        self, image: Image.Image, question: str, thinking: bool = True, longest: int | None = None
    ) -> Iterator[Output]:
        """Yield the output as it grows, and at last the finished one. A closed iterator ends its generation.

        Args:
            image: an RGB picture.
            question: what is asked about it.
            thinking: whether to ask for reasoning before the answer.
            longest: most tokens of the reasoning; the answer follows.

        Raises:
            ValueError: the question is empty, or too long for the model.
        """
        inputs = self._inputs(image, question, thinking)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = Event()
        # Generation runs in a thread of its own, and hands its text over through the streamer.
        thread = ThreadPoolExecutor(1, thread_name_prefix="answer")
        generated = thread.submit(self._generate, inputs, streamer, stop, longest)
        generated.add_done_callback(lambda _: streamer.end())  # after an error nobody else would
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield Output(text)
            yield self._finished(inputs, generated, image)
        finally:
            # Also when the reader closed the iterator: the generation ends at its next token.
            stop.set()
            thread.shutdown(wait=False)

    def _inputs(self, image: Image.Image, question: str, thinking: bool) -> BatchFeature:
        if not question.strip():
            raise ValueError("the question is empty: ask something about the picture")
        options = {} if thinking else {"enable_thinking": False}
        text = rendered(self.processor, user_turn(question.strip()), options)
        inputs = self.processor(images=[image], text=[text], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        longest = self.model.config.text_config.max_position_embeddings
        if length + self.max_new_tokens > longest:
            raise ValueError(
                f"picture and question take {length} tokens and the answer up to {self.max_new_tokens}, but the model reads "
                f"{longest}: shorten the question"
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs: BatchFeature, streamer: TextIteratorStreamer, stop: Event, longest: int | None):
        return self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            max_thinking_tokens=longest,
            tokenizer=self.processor.tokenizer,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
            return_dict_in_generate=True,
        )

    def _finished(self, inputs: BatchFeature, generated: Future, image: Image.Image) -> Output:
        start = inputs["input_ids"].shape[1]
        result = generated.result()
        ids = result.sequences[0, start:]
        decode = self.processor.tokenizer.decode
        # A token may be a part of a character: only the text of all tokens so far says where each of them ends.
        ends = []
        for count in range(1, len(ids) + 1):
            ends.append(len(decode(ids[:count], skip_special_tokens=True)))
        weights = attention_to_image(self._twin, result.sequences, result.past_key_values, start)
        layout = picture_layout(self.processor, image.height, image.width)
        text = decode(ids, skip_special_tokens=True)
        return Output(text, finished=True, attention=AttentionMap(weights, tuple(ends), layout))
