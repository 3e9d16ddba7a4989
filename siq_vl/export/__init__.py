"""Checkpoints in the formats of other engines: native Idefics3, ONNX sessions, GGUF files."""
