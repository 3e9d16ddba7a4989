"""What suits the models that the recipes name as teachers, the same in this process and behind a server.

One table has each family's prompts, the sampling of its model card, the longest reply and its system turn;
`generate_arguments` and `request_fields` say it in the words of transformers and of OpenAI-style servers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import transformers

DEFAULT_MAX_NEW_TOKENS = 1024
# What `generate` does not know, and servers do: a logits processor of ours stands in for it.
PRESENCE_PENALTY = "presence_penalty"
_BOUNDS = ("max_new_tokens", "max_tokens")  # transformers' and the servers' word for the same
_ONLY_SAMPLED = ("temperature", "top_p", "top_k")  # without a meaning where the likeliest token is taken
_NATIVE_INTERNVL = re.compile(r"[\w.-]+/InternVL[\w.-]*(?<!-HF)", re.IGNORECASE)


@dataclass(frozen=True)
class ModelDefaults:
    """What suits a family of models.

    Attributes:
        prompts: its family of templates.
        sampling: of its model card, in the words of `generate`.
        max_new_tokens: the longest reply.
        system: the text of the system turn, which may be empty; None where there is no such turn.
    """

    prompts: str
    sampling: Mapping = field(default_factory=dict)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    system: str | None = None


# For models that no pattern fits: the likeliest token in this process, and of a server whatever it does by itself.
UNKNOWN_MODEL = ModelDefaults("default", {"do_sample": False})

# By a pattern that is looked for in the model's name, case apart. A student reads rationales of a thousand tokens or so:
# the bounds leave room for more than that, not for all that a model card allows (40,960 for Qwen3-VL's thinking).
MODEL_DEFAULTS: Mapping[str, ModelDefaults] = {
    r"qwen3-vl.*thinking": ModelDefaults(
        "qwen3_vl_thinking", {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 20}, 4096
    ),
    r"qwen3-vl.*instruct": ModelDefaults(
        "qwen3_vl_instruct",
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, PRESENCE_PENALTY: 1.5},
        2048,
    ),
    # 0 stands for no bound: transformers would take the 50 likeliest tokens by itself, and servers take all.
    r"internvl3_5": ModelDefaults(
        "internvl3_5", {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0}, 2048
    ),
    # Its authors' examples send an empty system turn.
    r"hunyuanocr": ModelDefaults("hunyuan_ocr", {"do_sample": False}, 4096, system=""),
}


def defaults_for(model: str) -> ModelDefaults:
    """Return what suits a model, by its name, whoever serves it."""
    for pattern, defaults in MODEL_DEFAULTS.items():
        if re.search(pattern, model, re.IGNORECASE):
            return defaults
    return UNKNOWN_MODEL


def generate_arguments(model: str, given: Mapping, max_new_tokens: int = 0) -> dict:
    """Return how a model is sampled, in the words of transformers.

    Args:
        model: its name.
        given: settings that replace those of the model, in the words of transformers or of servers.
        max_new_tokens: the longest reply; 0: as `given` says, else as suits the model.
    """
    defaults = defaults_for(model)
    arguments = {**defaults.sampling, **given}
    # Servers have no word for it: a temperature of 0 says so there, and any other that one is drawn.
    if "do_sample" not in given and given.get("temperature") is not None:
        arguments["do_sample"] = given["temperature"] > 0
    if not arguments["do_sample"]:
        for name in _ONLY_SAMPLED:
            arguments.pop(name, None)
    bound = _bound(arguments, max_new_tokens, defaults)
    return {**arguments, "max_new_tokens": bound}


def request_fields(model: str, given: Mapping, max_new_tokens: int = 0) -> dict:
    """Return how a model is sampled, in the words of an OpenAI-style server; see `generate_arguments`."""
    defaults = defaults_for(model)
    fields: dict = {}
    if defaults is not UNKNOWN_MODEL:
        fields.update(_as_server_says(defaults.sampling))
    # What is given goes as it is: a server may have settings that nobody here knows of.
    fields.update(_as_server_says(given))
    bound = _bound(fields, max_new_tokens, defaults)
    return {**fields, "max_tokens": bound}


def _bound(settings: dict, max_new_tokens: int, defaults: ModelDefaults) -> int:
    """Take the bound of a reply, under either name, out of some settings; return the one that counts."""
    for name in _BOUNDS:
        said = settings.pop(name, 0)
        max_new_tokens = max_new_tokens or said
    return max_new_tokens or defaults.max_new_tokens


def _as_server_says(settings: Mapping) -> dict:
    said = dict(settings)
    if said.pop("do_sample", None) is False:
        for name in _ONLY_SAMPLED:
            said.pop(name, None)
        said["temperature"] = 0.0
    if said.get("top_k") == 0:  # no bound, which servers write otherwise, or not at all
        del said["top_k"]
    return said


def check_loadable(model: str) -> None:
    """Refuse the ids of models that the recipes name and that cannot be loaded here; nothing is read for it.

    Raises:
        ValueError: an InternVL that only remote code can build, or HunyuanOCR on transformers 4.
    """
    if Path(model).is_dir():  # its own configuration tells
        return
    if _NATIVE_INTERNVL.fullmatch(model):
        raise ValueError(native_internvl(model))
    if "hunyuanocr" in model.casefold() and transformers.__version__.startswith("4."):
        raise ValueError(unknown_type(model, "hunyuan_vl"))


def native_internvl(model: str) -> str:
    """Return why OpenGVLab's own form of an InternVL is refused, and what to name in its place."""
    return (
        f"{model} is InternVL in the form of its authors' own code, which AutoModelForImageTextToText refuses: "
        f"pass --model {model.rstrip('/')}-HF, the same weights in transformers' form"
    )


def unknown_type(model: str, model_type: str) -> str:
    """Return why a model whose classes this transformers lacks is refused, and what has them."""
    fix = f"install a newer transformers, which has {model_type}"
    if transformers.__version__.startswith("4."):
        fix = "make an environment with `pip install -r requirements-v5.txt`, and run the same command in it"
    return f"{model} is of type {model_type}, which transformers {transformers.__version__} does not have: {fix}"
