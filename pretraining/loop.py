"""One training loop for all of stage 0: resumable, bounded by steps, with a log that says how long it took."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from siq_vl.files import replacing

logger = logging.getLogger(__name__)

Losses = dict[str, torch.Tensor]


class Stepped(Protocol):
    """What the loop asks of an optimiser; `torch.optim.Optimizer` is one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return linear warm-up over `warmup` steps, then a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def steady_then_down(step: int, steps: int, warmup: int) -> float:
    """Return linear warm-up over `warmup` steps, one rate, and over the last three tenths a line down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, min(1.0, (steps - step) / (0.3 * steps)))


def run(
    module: torch.nn.Module,
    losses_at: Callable[[int], Losses],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    parameter_groups: Iterable[dict] | None = None,
    optimizer: Stepped | None = None,
    factor_at: Callable[[int, int, int], float] = learning_rate_factor,
    warmup: int = 100,
    save_every: int = 500,
    log_every: int = 50,
) -> None:
    """Minimise the sum of the losses of each step.

    The state is replaced atomically in `folder/state.pt`; a run that finds it there goes on from it. Losses depend
    on the step alone, so a resumed run sees the same data as an unbroken one. `folder/log.jsonl` gets a line every
    `log_every` steps, with the seconds spent so far, earlier sittings included.

    Args:
        module: what to train.
        losses_at: step number to named scalar losses.
        folder: where state and log are kept.
        steps: number of optimiser steps in all.
        learning_rate: peak rate of AdamW; another `optimizer` has its own.
        parameter_groups: AdamW's, each with an optional `scale` of the learning rate; all of `module` by default.
        optimizer: AdamW by default.
        factor_at: step, number of steps and of steps of warm-up to the share of the peak rate.
        warmup: steps of warm-up.
        save_every: steps between states.
        log_every: steps between lines of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "state.pt"
    if optimizer is None:
        groups = list(parameter_groups or [{"params": list(module.parameters())}])
        for group in groups:
            group["lr"] = learning_rate * group.pop("scale", 1.0)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    step, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        logger.info("resumed %s at step %d after %.0f s", folder, step, spent)
    device = next(module.parameters()).device
    sums: dict[str, float] = {}
    started, summed = time.monotonic(), 0
    module.train()
    while step < steps:
        factor = factor_at(step, steps, warmup)
        for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak * factor
        with torch.autocast(device.type, torch.bfloat16):
            losses = losses_at(step)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        summed += 1
        seconds = spent + time.monotonic() - started
        if step % log_every == 0 or step == steps:
            means = {name: round(total / summed, 4) for name, total in sums.items()}
            line = {"step": step, "seconds": round(seconds, 1), **means}
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            logger.info("%s", line)
            sums, summed = {}, 0
        if step % save_every == 0 or step == steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
            }
            with replacing(state_path) as temporary:
                torch.save(state, temporary)
