"""The engine of one task: one process, DDP or DeepSpeed ZeRO behind the same few verbs. No other file knows DeepSpeed."""

import contextlib
import os
from collections.abc import Callable

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast
from torch import Tensor, nn

from .errors import Fault
from .lora.archive import Adapter
from .lora.layer import sites


def accelerator(dtype: str) -> Accelerator:
    """The launch's Accelerator. On a CPU the gloo backend is named, since Accelerate would count one process without.

    Parameters are cast where they are used, so there is no autocast; DeepSpeed alone has to be told of bfloat16.
    """
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    handlers = [InitProcessGroupKwargs(backend="gloo")] if cpu and (zero or many) else []
    made = Accelerator(mixed_precision="bf16" if zero and dtype == "bfloat16" else "no",
                       cpu=cpu, kwargs_handlers=handlers)
    if zero:
        config = made.state.deepspeed_plugin.deepspeed_config
        if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
            raise Fault("zero_optimization.offload_optimizer replaces the optimizer by DeepSpeed's own, which knows no "
                        "soft threshold; set its device to none (offload_param may stay)")
        # Batches are cut by tokens here, so the engine sees every micro-batch as a step of its own.
        config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1,
                      zero_allow_untested_optimizer=True)
    return made


def zero_stage(acc: Accelerator) -> int:
    """ZeRO's stage; 0 without DeepSpeed."""
    plugin = acc.state.deepspeed_plugin
    return plugin.zero_stage if plugin else 0


class Engine:
    """Forward, backward and step of one task's training. `objective(batch)` returns named loss terms."""

    def __init__(self, acc: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float):
        self.acc, self.max_norm, self.model = acc, max_norm, objective.model
        self.deepspeed = acc.state.deepspeed_plugin is not None
        if self.deepspeed:
            acc.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_norm
        self.groups = optimizer.param_groups  # lr and kappa are set here; ZeRO keeps these very dictionaries
        self.module, self.optimizer = acc.prepare(objective, optimizer)

    def accumulate(self, batch, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; gradients are summed over ranks with the last one of a step."""
        hold = contextlib.nullcontext() if last or self.deepspeed else self.acc.no_sync(self.module)
        with hold:
            terms = self.module(batch)
            # Both DDP and ZeRO average over ranks, but the batch's weights already divide by the global count.
            loss = sum(terms.values()) * self.acc.num_processes
            if self.deepspeed:
                self.module.set_gradient_accumulation_boundary(last)
                self.module.backward(loss)
            else:
                self.acc.backward(loss)
        return {name: term.detach() for name, term in terms.items()}

    def step(self) -> float:
        """Clip, update, clear. Returns the global gradient norm before clipping."""
        if self.deepspeed:
            self.module.step()
            return float(self.module.get_global_grad_norm() or 0.0)
        norm = self.acc.clip_grad_norm_(self.module.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def adapters(self) -> dict[str, Adapter]:
        """All adapters in float32 on the CPU, gathered whole on every rank (collective under ZeRO)."""
        return {name: Adapter(self._full(layer.lora_A), self._full(layer.lora_B),
                              None if layer.lora_w is None else self._full(layer.lora_w))
                for name, layer in sites(self.model).items()}

    def rewrite(self, function: Callable[[Adapter], Adapter]) -> None:
        """Replace every adapter by `function` of it, on all ranks alike, and start Adam's moments from zero."""
        for layer in sites(self.model).values():
            factors = (layer.lora_A, layer.lora_B, layer.lora_w)
            new = function(Adapter(*(None if p is None else self._full(p) for p in factors)))
            for p, value in zip(factors, new):
                if p is not None:
                    self._write(p, broadcast(value.contiguous().to(self.acc.device)))

    @torch.no_grad()
    def _write(self, p: nn.Parameter, value: Tensor) -> None:
        if not self.deepspeed:
            p.copy_(value)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in self.optimizer.state.get(p, {}):
                    self.optimizer.state[p][key].zero_()
            return
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        # The float32 master is what the next step starts from; the working copy is what the next forward reads.
        safe_set_full_fp32_param(p, value)
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(p, torch.zeros_like(value), key)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.data.copy_(value)

    def _full(self, p: nn.Parameter) -> Tensor:
        full = None
        if self.deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param

            full = safe_get_full_fp32_param(p)
        return (p if full is None else full).detach().float().cpu().clone()

    def free(self) -> None:
        """Tear the engine down; a later task builds its own."""
        if self.deepspeed:
            self.module.destroy()
        self.module = self.optimizer = self.groups = None
        self.acc.free_memory()
