"""Offline reasoning traces: questions, teachers, prompts, verification, the store, and a page to look at them."""
