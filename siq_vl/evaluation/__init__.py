"""Evaluation: questions, batched generation, answer parsing, intervals, and a report to look at."""
