"""Pipeline, server, and what serving engines ask of a model that they run through transformers."""

import asyncio
import base64
import io
import json
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from hostile_requests import UNUSUAL, about, address, hostile, picture
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from siq_vl.configuration_siq_vl import AUTO_MAP, TRANSFORMERS_4
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.loading import load_checkpoint
from siq_vl.modeling_siq_vl import SiQVLForConditionalGeneration, SiQVLModel
from siq_vl.serving import Allowed, Guard, Refused, RequestCheck

REPO_ROOT = Path(__file__).resolve().parent.parent
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def item():
    return held_out_items(1)[0]


def generated(item, max_new_tokens) -> str:
    """What the repo's checkpoint says about a figure, by `generate`."""
    model, processor = load_checkpoint(str(REPO_ROOT))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=item.image, text=text, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]


class TestServer:
    @pytest.fixture(scope="class")
    def url(self, tmp_path_factory):
        """A running server of the repo's checkpoint, on a free port of this machine."""
        if TRANSFORMERS_4:
            pytest.skip("transformers 4 cannot serve pictures; serve.py says so, see test_needs_transformers_5")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "serve.py", str(REPO_ROOT), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as output:
            server = subprocess.Popen(command, cwd=REPO_ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(timeout=30)

    @pytest.fixture
    def chat(self, url, item):
        """Asks about the figure through OpenAI's client."""
        import httpx
        import openai

        client = openai.OpenAI(base_url=url, api_key="none", http_client=httpx.Client(trust_env=False), max_retries=0)
        picture = io.BytesIO()
        item.image.save(picture, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": item.question}]

        def ask(**kwargs):
            messages = [{"role": "user", "content": content}]
            return client.chat.completions.create(model=str(REPO_ROOT), messages=messages, **kwargs)

        return ask

    def test_answers_about_a_picture(self, chat, item):
        answer = chat(max_completion_tokens=64).choices[0]
        assert answer.message.content == generated(item, 64)
        assert answer.message.role == "assistant" and answer.finish_reason == "stop"

    def test_streams_the_same_answer(self, chat, item):
        chunks = [chunk.choices[0] for chunk in chat(max_completion_tokens=64, stream=True)]
        pieces = [chunk.delta.content for chunk in chunks if chunk.delta.content]
        assert len(pieces) > 3 and "".join(pieces) == generated(item, 64)
        assert chunks[-1].finish_reason == "stop"

    def test_chat_template_options_arrive(self, chat, item):
        options = {"chat_template_kwargs": {"enable_thinking": False}}
        direct = chat(max_completion_tokens=64, extra_body=options).choices[0].message.content
        assert "<think>" not in direct and direct != generated(item, 64)

    def test_hostile_requests_are_refused_and_a_good_one_is_answered_after_each_kind(self, url, chat, item):
        for name, body, words in hostile()[::5]:
            status, text = post(url, body)
            assert status == 400 and re.search(words, json.loads(text)["error"]["message"]), (name, status, text)
        assert chat(max_completion_tokens=64).choices[0].message.content == generated(item, 64)

    @pytest.mark.parametrize("stream", [False, True])
    def test_unusual_requests_are_answered(self, url, stream):
        for name, body in UNUSUAL.items():
            status, text = post(url, json.dumps({**body, "stream": stream}).encode())
            assert status == 200 and '"error"' not in text, (name, text)

    def test_other_doors_are_closed(self, url):
        for path in ("completions", "responses", "systemone", "audio/transcriptions", "../load_model", "../reset"):
            assert post(url, b'{"model": "a/b"}', path)[0] == 404


def post(url: str, body: bytes, path: str = "chat/completions") -> tuple[int, str]:
    request = urllib.request.Request(f"{url}/{path}".replace("v1/../", ""), body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def check_with():
    """Makes the check of the repo's checkpoint, with what clients may name."""
    model, processor = load_checkpoint(str(REPO_ROOT))
    return lambda **allowed: RequestCheck(model, processor, Allowed(**allowed))


class TestRequestCheck:
    def test_every_hostile_request_is_refused_with_a_reason(self, check_with):
        requests, check = hostile(), check_with()
        assert len(requests) > 150
        for name, body, words in requests:
            with pytest.raises(Refused) as refused:
                check(body)
            assert refused.value.status == 400 and re.search(words, str(refused.value)), name

    def test_unusual_requests_pass(self, check_with):
        for name, body in UNUSUAL.items():
            assert check_with()(json.dumps(body).encode())["max_completion_tokens"] >= 1, name

    def test_the_answer_gets_the_room_that_is_left(self, check_with):
        body = {"messages": [{"role": "user", "content": "What is 1 + 1?"}]}
        room = check_with()(json.dumps(body).encode())["max_completion_tokens"]
        assert 900 < room < 1024
        check_with()(json.dumps({**body, "max_tokens": room}).encode())
        with pytest.raises(Refused, match=f"ask for at most {room} tokens"):
            check_with()(json.dumps({**body, "max_tokens": room + 1}).encode())

    def test_tokens_are_counted_as_the_model_gets_them(self, check_with, item):
        file = io.BytesIO()
        item.image.save(file, "PNG")
        body = about(address(file.getvalue()), item.question)
        del body["max_tokens"]
        room = check_with()(json.dumps(body).encode())["max_completion_tokens"]
        _, processor = load_checkpoint(str(REPO_ROOT))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert room == 1024 - len(processor(images=item.image, text=text)["input_ids"][0])

    def test_files_below_the_folder_alone(self, check_with, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_bytes(picture())
        (tmp_path / "out.png").write_bytes(picture())
        (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
        check = check_with(folder=tmp_path / "in")
        for name in ("a.png", str(tmp_path / "in" / "a.png"), (tmp_path / "in" / "a.png").as_uri()):
            (message,) = check(json.dumps(about(name)).encode())["messages"]
            assert message["content"][0]["image_url"]["url"] == address(picture())
        for name in (
            "../out.png",
            "link.png",
            str(tmp_path / "out.png"),
            "file:///etc/passwd",
            "/dev/zero",
            "a\0",
            "b" * 5000,
        ):
            with pytest.raises(Refused, match="cannot be read|is not there"):
                check(json.dumps(about(name)).encode())

    def test_remote_pictures_by_the_rule_of_the_project(self, check_with, monkeypatch):
        check = check_with(remote=True)
        for name in ("http://127.0.0.1:8000/a.png", "http://169.254.169.254/a", "http://[64:ff9b::7f00:1]/"):
            with pytest.raises(Refused, match="points into a private network"):
                check(json.dumps(about(name)).encode())
        monkeypatch.setattr("siq_vl.serving.download_image", lambda url: picture())
        (message,) = check(json.dumps(about("https://example.com/a.png")).encode())["messages"]
        assert message["content"][0]["image_url"]["url"] == address(picture())

    def test_a_body_without_end_is_refused(self, monkeypatch):
        monkeypatch.setattr("siq_vl.serving.MAX_BODY_BYTES", 1000)
        sent, read = [], []

        async def receive():
            read.append(1)
            assert len(read) <= 11, "the body is read on and on"
            return {"type": "http.request", "body": b" " * 100, "more_body": True}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": []}
        asyncio.run(Guard(None, None)(scope, receive, send))
        assert sent[0]["status"] == 413

    def test_a_prompt_needs_room_for_one_token_of_an_answer(self, check_with):
        body = json.dumps({"messages": [{"role": "user", "content": "What is 1 + 1?"}]}).encode()
        check = check_with()
        length = check.context - check(body)["max_completion_tokens"]
        check.context = length + 1
        assert check(body)["max_completion_tokens"] == 1
        check.context = length
        with pytest.raises(Refused, match=f"takes {length} tokens, but the model reads {length}, answer included"):
            check(body)

    def test_an_answer_without_a_bound_gets_that_of_the_server(self, check_with, monkeypatch):
        body = {"messages": [{"role": "user", "content": "What is 1 + 1?"}]}
        monkeypatch.setattr("siq_vl.serving.MAX_NEW_TOKENS", 5)
        assert check_with()(json.dumps(body).encode())["max_completion_tokens"] == 5
        assert check_with()(json.dumps({**body, "max_tokens": 6}).encode())["max_completion_tokens"] == 6

    def test_a_large_file_is_not_read(self, check_with, monkeypatch, tmp_path):
        (tmp_path / "a.png").write_bytes(picture())
        check, body = check_with(folder=tmp_path), json.dumps(about("a.png")).encode()
        monkeypatch.setattr("siq_vl.serving.MAX_BYTES", len(picture()))
        assert check(body)["messages"]
        monkeypatch.setattr("siq_vl.serving.MAX_BYTES", len(picture()) - 1)
        with pytest.raises(Refused, match="'a.png' is larger than"):
            check(body)

    def test_a_bias_is_of_a_token_that_there_is(self, check_with):
        def biased(token: int) -> bytes:
            body = {"messages": [{"role": "user", "content": "What?"}], "logit_bias": {str(token): 1}}
            return json.dumps(body).encode()

        check = check_with()
        assert check(biased(check.vocabulary - 1))["logit_bias"] == {str(check.vocabulary - 1): 1.0}
        with pytest.raises(Refused, match=f"token ids below {check.vocabulary}"):
            check(biased(check.vocabulary))

    def test_sizes_of_pictures_are_height_and_width(self, check_with):
        wide = address(picture((48, 16)))
        assert check_with()._messages(about(wide)["messages"])[1] == [(16, 48)]

    @pytest.mark.parametrize("path", ["/load_model", "/v1/completions", "/v1/chat/completions/", "/V1/models", ""])
    def test_other_paths_do_not_reach_the_server(self, path):
        app = Reached()
        assert app.status_of(path) == 404 and not app.requests
        assert app.status_of("/v1/models") is None and len(app.requests) == 1

    def test_the_server_gets_the_checked_body_with_its_own_length(self):
        app = Reached()
        old = [(b"content-length", b"2"), (b"content-type", b"text/plain"), (b"accept", b"*/*")]
        assert app.status_of("/v1/chat/completions", "POST", old) is None
        ((scope, body),) = app.requests
        assert json.loads(body) == {"checked": "{}"}
        wanted = [(b"accept", b"*/*"), (b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        assert sorted(scope["headers"]) == wanted


class Reached:
    """A server behind the guard, which notes the requests that reach it."""

    def __init__(self):
        self.requests = []

    async def __call__(self, scope, receive, send):
        self.requests.append((scope, (await receive())["body"]))

    def status_of(self, path: str, method: str = "GET", headers=()) -> int | None:
        """What the guard answers by itself, to a request whose body is an empty object."""
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
        asyncio.run(Guard(self, lambda content: {"checked": content.decode()})(scope, receive, send))
        return sent[0]["status"] if sent else None


def answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return json.load(response) == {"status": "ok"}
    except OSError:
        return False


class TestLauncher:
    def fails_with(self, monkeypatch, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO_ROOT / "serve.py"), run_name="__main__")
        return str(ended.value)

    @pytest.mark.skipif(not TRANSFORMERS_4, reason="about transformers 4")
    def test_needs_transformers_5(self, monkeypatch):
        message = self.fails_with(monkeypatch, str(REPO_ROOT))
        assert message.startswith("error: transformers is 4.") and "requirements-v5.txt" in message

    @pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 is refused first")
    def test_refuses_a_folder_without_a_checkpoint(self, monkeypatch, tmp_path):
        assert "holds no checkpoint (no config.json)" in self.fails_with(monkeypatch, str(tmp_path))


class TestEngineHooks:
    """What the transformers backends of vLLM and SGLang use; neither engine is needed to check it."""

    def test_the_base_model_is_found_and_built_without_memory(self, checkpoint):
        assert AUTO_MAP["AutoModel"] == "modeling_siq_vl.SiQVLModel"
        config = SiQVLForConditionalGeneration.from_pretrained(checkpoint).config
        with torch.device("meta"):
            model = SiQVLModel._from_config(config)
        assert all(weight.is_meta for weight in model.parameters())
        assert model.get_input_embeddings() is model.language_model.embed_tokens

    def test_every_part_supports_other_attention(self, make_model):
        model = make_model().model
        assert model._supports_attention_backend
        assert model.language_model._supports_attention_backend

    def test_the_engines_attention_gets_what_the_engine_passes(self, make_model, make_image, processor):
        """The call of both engines: flat tokens as one row, embeddings with the images in them, positions, no cache."""
        inputs = processor(images=[make_image()], text=f"{IMAGE}What?", return_tensors="pt")
        model = make_model()
        with torch.no_grad():
            expected = model.model(**inputs).last_hidden_state
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            images = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeddings[inputs["input_ids"] == processor.image_token_id] = images.flatten(0, 1)
        seen = []

        def attention(module, query, key, value, attention_mask, attention_instances, forward_batch, **kwargs):
            seen.append((attention_instances[module.layer_idx], forward_batch))
            return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})

        AttentionInterface.register("engine", attention)
        model.config.text_config._attn_implementation = "engine"
        engine_model = SiQVLModel._from_config(model.config).eval()
        engine_model.load_state_dict(model.model.state_dict())
        assert engine_model.language_model.config._attn_implementation == "engine"
        assert engine_model.vision_tower.config._attn_implementation != "engine"
        with torch.no_grad():
            (hidden, *_) = engine_model(
                input_ids=None,
                inputs_embeds=embeddings,
                use_cache=False,
                position_ids=torch.arange(embeddings.shape[1])[None],
                attention_instances={0: "first layer", 1: "second layer"},
                forward_batch="batch",
                return_dict=False,
            )
        assert seen == [("first layer", "batch"), ("second layer", "batch")]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)

    def test_image_features_split_into_images(self, make_model, make_image, processor):
        inputs = processor(images=[make_image(seed) for seed in range(3)], text=IMAGE * 3, return_tensors="pt")
        counts = processor._get_num_multimodal_tokens(image_sizes=[(32, 32)] * 3)
        features = make_model().model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        assert [len(image) for image in features] == counts["num_image_tokens"]
        assert features.shape[0] == sum(counts["num_image_patches"])

    @pytest.mark.parametrize("size", [(1, 1), (50, 20), (32, 500)])
    def test_tokens_are_counted_and_written_as_the_processor_does(self, processor, make_image, size):
        width, height = size
        data = processor(
            images=[make_image(size=size)], text=f"a{IMAGE}b", return_tensors="pt", return_mm_token_type_ids=True
        )
        marked = data["mm_token_type_ids"][0].bool()
        counts = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        assert counts["num_image_tokens"] == [int(marked.sum())]
        assert set(data["input_ids"][0, marked].tolist()) == {processor.image_token_id}
        written = processor.replace_image_token({"pixel_values": data["pixel_values"]}, 0)
        ids = processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        assert ids == data["input_ids"][0, marked].tolist()
        assert written.replace(processor.image_token, "") == ""

    @pytest.mark.skipif(TRANSFORMERS_4, reason="asked for since transformers 5")
    def test_tower_and_decoder_are_found(self, make_model):
        model = make_model()
        assert model.get_encoder(modality="image") is model.model.vision_tower
        assert model.get_decoder() is model.model.language_model

    def test_the_auto_class_builds_it_from_a_configuration(self, checkpoint):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
        model = AutoModel.from_config(config, trust_remote_code=True)
        assert type(model).__name__ == "SiQVLModel" and model._supports_attention_backend
