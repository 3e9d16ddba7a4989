"""Ablations: which arms are trained, the jobs that it takes, and what came of them."""
