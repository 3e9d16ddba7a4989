"""The adapter between lmms-eval and `siq_vl.evaluation`: requests in, answers out."""

from collections.abc import Sequence

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from siq_vl.data.conversations import with_markers
from siq_vl.evaluation.generation import batches_by_length, complete, fitting_new_tokens, rendered
from siq_vl.evaluation.runner import load_any
from siq_vl.parsing.answers import parse
from siq_vl.processing_siq_vl import to_rgb


class SiQVL(lmms):
    """A checkpoint of ours, or any image-text-to-text model, asked greedily.

    Args:
        pretrained: folder or Hub id of the checkpoint.
        batch_size: requests answered together; it changes no answer.
        max_new_tokens: least bound on an output; tasks bound the answer alone, and here a rationale comes before it. By
            default what fits the checkpoint.
        keep_rationale: give the harness the whole output rather than the answer in it.
        enable_thinking: False asks for answers without reasoning.
        trust_remote_code: run the code that the checkpoint carries.
        device: ignored, accelerate decides; the harness always passes it.

    Raises:
        ValueError: an argument that this adapter does not know.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_new_tokens: int | None = None,
        keep_rationale: bool = False,
        enable_thinking: bool = True,
        trust_remote_code: bool = False,
        device: str | None = None,
        **unknown,
    ):
        super().__init__()
        if given := [name for name, value in unknown.items() if value is not None and name != "max_batch_size"]:
            raise ValueError(
                f"unknown model_args {', '.join(given)}; known are pretrained, batch_size, max_new_tokens, "
                "keep_rationale, enable_thinking and trust_remote_code"
            )
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._model, self.processor = load_any(pretrained, trust_remote_code=trust_remote_code)
        self.batch_size = int(batch_size)
        self.max_new_tokens = fitting_new_tokens(pretrained) if max_new_tokens is None else max_new_tokens
        self.keep_rationale = keep_rationale
        self.template_options = {} if enable_thinking else {"enable_thinking": False}

    @property
    def model(self):
        return self._model

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self):
        return self._model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return an answer a request, in their order; `until` strings end an answer early."""
        # A batch has one bound on its outputs, so requests with the same one are answered together.
        places_by_bound: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            bound = int(request.args[1].get("max_new_tokens") or 0)
            places_by_bound.setdefault(bound, []).append(place)
        answers = [""] * len(requests)
        for bound, places in sorted(places_by_bound.items()):
            texts, images = [], []
            for place in places:
                prompt, pictures = self._asked(requests[place])
                texts.append(rendered(self.processor, prompt, self.template_options))
                images.append(pictures)
            for batch in batches_by_length(texts, list(map(len, images)), self.batch_size):
                outputs = complete(
                    self._model,
                    self.processor,
                    [texts[index] for index in batch],
                    [images[index] for index in batch],
                    max_new_tokens=max(bound, self.max_new_tokens),
                )
                for index, output in zip(batch, outputs, strict=True):
                    place = places[index]
                    answers[place] = self._answer(output.text, requests[place].args[1].get("until"))
        return answers

    def _asked(self, request: Instance) -> tuple[list[dict], list[Image.Image]]:
        """Return the prompt and the pictures of a request."""
        context, _, visuals_of, doc_id, task, split = request.args
        images = []
        for visual in visuals_of(self.task_dict[task][split][doc_id]) or ():
            if visual is not None:
                images.append(to_rgb(visual))
        return with_markers([("user", context)], len(images)), images

    def _answer(self, output: str, until: str | Sequence[str] | None) -> str:
        answer = output if self.keep_rationale else parse(output).answer
        if until is None:
            until = ()
        elif isinstance(until, str):
            until = (until,)
        for ending in until:
            if ending.strip():  # a line break ends no answer here: it may stand between the tags
                answer = answer.split(ending)[0]
        return answer.strip()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the tasks named by this plugin generate.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("SiQ-VL answers by generating; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: the tasks named by this plugin have one round.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("SiQ-VL's adapter asks one round; choose a task with output_type generate_until")
