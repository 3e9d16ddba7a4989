"""Processes of their own for tests that kill: forked from one that has loaded the libraries once."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["trl", "peft", "siq_vl.distill.options", "siq_vl.distill.store_page", "siq_vl.distill.card"]
    + ["siq_vl.distill.teachers.server", "siq_vl.training.run"]
)
