"""
What somebody does who has nothing but a checkpoint: load it through every auto class, ask it about a picture, save it.

    python -I tests/stranger.py '{"folders": [...], "picture": "...", "results": "...", "resave": "..."}'

Runs in a process of its own (`run_as_a_stranger` in `conftest.py`), under either major of transformers, and imports
nothing from this repository. `results` is a file for `torch.save`: one entry for each folder, with what must not change
from one major to the other. With `resave`, each checkpoint is saved again in `resave/<its place in the list>`.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, pipeline


def examine(folder, picture, resave=None):
    """Returns what the checkpoint is and what it computes, as plain values and tensors."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown here?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    models = {}
    for name in sorted(config.auto_map):
        if name.startswith("AutoModel") and hasattr(transformers, name):
            auto_class = getattr(transformers, name)
            models[name] = auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    model = models["AutoModelForImageTextToText"]
    with torch.no_grad():
        outputs = {name: loaded(**inputs) for name, loaded in models.items()}
        generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, messages[0]["content"][1]]}]
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.float32)
    (piped,) = pipe(text=asked, return_full_text=False, generate_kwargs={"max_new_tokens": 16, "do_sample": False})
    if resave is not None:
        model.save_pretrained(resave)
        processor.save_pretrained(resave)
    return {
        "major": int(transformers.__version__.split(".")[0]),
        "config": type(config).__name__,
        "processor": type(processor).__name__,
        "text": text,
        "tokenizer_text": tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        "inputs": dict(inputs),
        "logits": {name: output.logits for name, output in outputs.items() if "logits" in output},
        "hidden": {name: output.last_hidden_state for name, output in outputs.items() if "logits" not in output},
        "generated": generated,
        "answer": processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])[0],
        "pipeline": piped["generated_text"],
        "weights": {name: list(weight.shape) for name, weight in model.state_dict().items()},
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "rotary": model.model.language_model.rotary_emb.inv_freq,
        "special_tokens": {
            token: tokenizer.convert_tokens_to_ids(token) for token in sorted(processor.tokenizer.all_special_tokens)
        },
        "ends": [
            tokenizer.eos_token,
            tokenizer.pad_token,
            tokenizer.padding_side,
            model.generation_config.eos_token_id,
        ],
    }


def main():
    task = json.loads(sys.argv[1])
    picture = Image.open(task["picture"])
    results = []
    for place, folder in enumerate(task["folders"]):
        resave = f"{task['resave']}/{place}" if "resave" in task else None
        results.append(examine(folder, picture, resave))
    torch.save(results, task["results"])


if __name__ == "__main__":
    main()
