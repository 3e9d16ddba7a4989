"""Greedy answers from ONNX sessions with onnxruntime, one prompt at a time; needs neither torch nor a graphics card."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from siq_vl.export.idefics3 import read_json
from siq_vl.export.onnx_sessions import DECODER, EMBEDDINGS, SUFFIXES, VISION


class OnnxModel:
    """The three sessions of an exported folder.

    Args:
        folder: what `export_onnx` wrote.
        kind: what the weights are held in, one of `SUFFIXES`.
        threads: of onnxruntime; 0 leaves it to the runtime.

    Raises:
        ValueError: the folder holds no sessions of this kind.
    """

    def __init__(self, folder: Path, kind: str = "fp32", threads: int = 0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions = {}
        for name in (VISION, EMBEDDINGS, DECODER):
            path = Path(folder) / "onnx" / f"{name}{SUFFIXES.get(kind, kind)}.onnx"
            if not path.exists():
                raise ValueError(
                    f"{path} is not there: write it with export_onnx.py, --kinds among {', '.join(SUFFIXES)}"
                )
            self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        config = read_json(Path(folder) / "config.json")
        generation = read_json(Path(folder) / "generation_config.json")
        self.image_token_id = config["image_token_id"]
        self.suppressed = generation["suppress_tokens"]
        end = generation["eos_token_id"]
        self.end = {end} if isinstance(end, int) else set(end)
        self.empty_cache = {}
        for value in self.sessions[DECODER].get_inputs():
            if value.name.startswith("past_key_values."):
                heads, width = value.shape[1], value.shape[3]
                self.empty_cache[value.name] = np.zeros((1, heads, 0, width), np.float32)

    def embed(self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None) -> np.ndarray:
        """Return the embeddings of a prompt, `(1, sequence_length, text_width)`, the pictures in their places.

        Args:
            input_ids: of shape `(1, sequence_length)`.
            pixel_values: of shape `(n_images, 3, height, width)`.
        """
        (embeddings,) = self.sessions[EMBEDDINGS].run(None, {"input_ids": input_ids})
        if pixel_values is not None:
            (features,) = self.sessions[VISION].run(None, {"pixel_values": pixel_values[None]})
            embeddings[input_ids == self.image_token_id] = features.reshape(-1, features.shape[-1])
        return embeddings

    def decode(
        self, embeddings: np.ndarray, cache: Mapping[str, np.ndarray], n_logits: int = 1
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read tokens after those of a cache; return the last `n_logits` logits (0: all) and the cache with them.

        Args:
            embeddings: of shape `(1, sequence_length, text_width)`.
            cache: `empty_cache`, or what an earlier call returned.
            n_logits: positions whose logits are wanted, from the end.
        """
        session, length = self.sessions[DECODER], embeddings.shape[1]
        start = next(iter(cache.values())).shape[2]
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": np.ones((1, start + length), np.int64),
            "position_ids": np.arange(start, start + length)[None],
            "num_logits_to_keep": np.array(n_logits),
        }
        names = [value.name for value in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {**inputs, **cache}), strict=True))
        return outputs["logits"], {name: outputs[name.replace("past_key_values", "present")] for name in cache}

    def generate(
        self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None, max_new_tokens: int = 128
    ) -> Iterable[int]:
        """Yield the ids of the greedy answer, up to and with the token that ends the turn; for the arguments see `embed`."""
        logits, cache = self.decode(self.embed(input_ids, pixel_values), self.empty_cache)
        for _ in range(max_new_tokens):
            scores = logits[0, -1]
            scores[self.suppressed] = -np.inf
            token = int(scores.argmax())
            yield token
            if token in self.end:
                return
            logits, cache = self.decode(self.embed(np.array([[token]])), cache)
