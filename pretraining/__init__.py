"""Stage 0: pretraining the tiny vision tower and language model that stand in for SigLIP-2 and Qwen2.5."""
