"""The engine of one task: one interface for one process, DDP and DeepSpeed ZeRO."""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from codyra_llm.core.errors import Fault, is_out_of_memory
from codyra_llm.lora.layer import sites
from codyra_llm.lora.shared import shared_inputs
from codyra_llm.lora.together import deferred, finish_gradients, make_shadows
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.base import Method
from codyra_llm.runtime import heartbeat
from codyra_llm.runtime.launch import zero_stage
from codyra_llm.train.recorded import Recorder, recorder_for

MOMENTS = ("exp_avg", "exp_avg_sq")
# A gradient of at least this many numbers is summed over ranks by itself: together with others it would be
# copied twice, and such tensors are few.
LARGE = 1 << 22


def _total(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    return sum(others, first)


class Engine:
    """Forward, backward and step of one task's training. `objective(batch)` returns named loss terms."""

    def __init__(
        self, acc: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
    ):
        self.acc, self.max_norm, self.model = acc, max_norm, objective.model
        self.deepspeed = acc.state.deepspeed_plugin is not None
        if self.deepspeed:
            acc.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_norm
        self.shared = shared_inputs(objective)
        self.whole = self.shared if zero_stage(acc) < 3 else []  # ZeRO 3 has no whole factors on a rank
        # Whether the adapters' gradients are computed together at the end of a step. On a CPU that would
        # change the order of sums and save nothing: only a GPU has kernel launches to save. ZeRO takes
        # gradients when autograd writes them.
        self.defers = acc.device.type == "cuda" and not self.deepspeed
        self.recorder: Recorder | None = None
        self.norm: Tensor | None = None  # of the step's gradients, where it is known before `step`
        # Includes parameters without a gradient: a threshold may change them.
        self.stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.inner = optimizer  # ZeRO replaces the parameters in this same optimizer by its shards
        self.module, self.optimizer = objective, optimizer
        # Looking for them among all parameters of a model takes the host milliseconds.
        self.parameters = [p for p in objective.parameters() if id(p) in self.stepped]
        if self.deepspeed:
            self.module, self.optimizer = acc.prepare(objective, optimizer)
            # `prepare` set it, and transformers would then load the next task's model in shards.
            unset_hf_deepspeed_config()
        elif acc.num_processes > 1:
            self._agree()
        if self.defers:
            self.recorder = recorder_for(cast(nn.Module, objective.model), cast(Method, objective.method))

    @property
    def groups(self) -> list[dict]:
        """The parameter groups, with lr and kappa. Look them up each time: Accelerate and load_state_dict
        replace the dictionaries.
        """
        return self.inner.param_groups

    @torch.no_grad()
    def _agree(self) -> None:
        """Copy the first rank's factors to all ranks (collective), as DeepSpeed does by itself. Factors that
        a method has computed may differ between ranks: a backward pass on a GPU sums in any order, and where
        singular values are close together, a small difference rotates the directions."""
        with heartbeat.waiting():
            for name, p in self._named():
                if ".lora_" in name:
                    p.copy_(cast(Tensor, broadcast(p.detach().clone())))

    def accumulate(self, batch, first: bool, last: bool) -> dict[str, Tensor]:
        """Run forward and backward on one micro-batch. `first` adds the penalty terms, once per step; `last`
        closes the accumulation. Ranks synchronise here only under ZeRO, which sums over ranks in backward, so
        that there a rank out of memory is a Fault."""
        share = 1 / self.acc.num_processes if first else 0.0  # of the penalty terms
        if self.deepspeed:
            terms = self._by_deepspeed(batch, first, last, share)
        else:
            terms = self._by_autograd(batch, first, share)
        return {name: term.detach() for name, term in terms.items()}

    def _by_autograd(self, batch, first: bool, penalty: float) -> dict[str, Tensor]:
        """`accumulate` in one process or under DDP; a recorded micro-batch is replayed."""
        if self.recorder and first:
            self.recorder.begin_step()
        with deferred(self.shared, self.defers):
            loss = self.recorder.run(batch) if self.recorder else None
            if loss is not None:
                terms = self.module.penalties(penalty)
                # Penalties may have no gradient yet; a loss without one is a mistake, which autograd refuses.
                with_gradient = [term for term in terms.values() if term.requires_grad]
                if with_gradient:
                    _total(with_gradient).backward()
                return {"loss": loss, **terms}
            if first:
                make_shadows(self.whole)
            terms = self.module(batch.to(self.acc.device), penalty)
            _total(terms.values()).backward()
        return terms

    def _by_deepspeed(self, batch, first: bool, last: bool, penalty: float) -> dict[str, Tensor]:
        """`accumulate` under DeepSpeed."""
        if first:
            make_shadows(self.whole)
        try:
            terms = self.module(batch.to(self.acc.device), penalty)
            self.module.set_gradient_accumulation_boundary(last)
            # ZeRO averages over ranks, but the batch's weights already divide by the global count.
            self.module.backward(sum(terms.values()) * self.acc.num_processes)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise Fault(
                f"a micro-batch of {batch.ids.numel()} tokens does not fit into the device's memory, and "
                "under DeepSpeed no rank can try again; lower optim.micro_batch_tokens or "
                "data.max_prompt_tokens, or turn on model.gradient_checkpointing"
            ) from None
        return terms

    def anywhere(self, mine: bool) -> bool:
        """Whether `mine` is true on any rank."""
        if self.acc.num_processes == 1:
            return mine
        with heartbeat.waiting():
            return self.acc.reduce(torch.tensor(float(mine), device=self.acc.device), "sum").item() > 0

    def discard(self) -> bool:
        """Drop the gradients of a step that was not finished, and free the memory of recordings and what the
        allocator has cached. Returns whether there were recordings on any rank."""
        self.inner.zero_grad(set_to_none=True)
        freed = self.recorder is not None and self.recorder.stop()
        self._forget()  # what an interrupted forward computed for layers that were not called yet
        clear_device_cache(garbage_collection=True)
        return self.anywhere(freed)

    def free_recordings(self) -> None:
        """Free the recorded micro-batches, whose memory nothing else can use."""
        if self.recorder:
            self.recorder.free()

    @torch.no_grad()
    def reduce(self, terms: Tensor, flags: list[float]) -> Tensor:
        """Sum over ranks, in one all-reduce, the logged `terms` [n], this rank's `flags`, and the step's
        gradients (ZeRO has summed its own). The host does not wait: `read` takes what this returns."""
        finish_gradients(self.shared)
        return self._summed(terms, flags) if self.acc.num_processes > 1 else terms

    @torch.no_grad()
    def read(self, reduced: Tensor, flags: list[float]) -> tuple[list[float], list[float], float | None]:
        """The summed terms and flags from `reduce`, on the host, and the norm of the current gradients (None
        under ZeRO). Only here does the host wait for the device in a step."""
        if not self.deepspeed:
            self.norm = self._norm()
            reduced = torch.cat([reduced, self.norm[None].to(reduced)])
        with heartbeat.waiting():
            values = reduced.tolist()
        norm = None if self.deepspeed else values.pop()
        if self.acc.num_processes == 1:
            return values, flags, norm
        return values[: -len(flags)], values[-len(flags) :], norm

    def _summed(self, terms: Tensor, flags: list[float]) -> Tensor:
        """`terms` followed by `flags`, summed over ranks. The gradients are summed in the same reduction,
        except large ones, which are summed one by one."""
        trained = [] if self.deepspeed else [p for group in self.groups for p in group["params"]]
        for p in [p for p in trained if p.numel() >= LARGE]:
            p.grad = self._summed_alone(p)
        trained = [p for p in trained if p.numel() < LARGE]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        # From pinned memory, so that the copy does not make the host wait.
        own = torch.tensor(flags, dtype=terms.dtype, pin_memory=terms.is_cuda)
        own = own.to(terms.device, non_blocking=True)
        with heartbeat.waiting():
            total = self.acc.reduce(torch.cat([terms, own, *(g.flatten() for g in gradients)]), "sum")
            read, *sums = total.split([len(terms) + len(flags), *(g.numel() for g in gradients)])
        for p, summed in zip(trained, sums, strict=True):
            p.grad = summed.view_as(p).to(p.dtype)
        return read

    def _summed_alone(self, p: nn.Parameter) -> Tensor:
        """A parameter's gradient summed over ranks, in its dtype."""
        own = torch.zeros_like(p) if p.grad is None else p.grad
        with heartbeat.waiting():
            total = self.acc.reduce(own, "sum")
        assert isinstance(total, Tensor)
        return total.to(p.dtype)

    def _norm(self) -> Tensor:
        """The L2 norm of all gradients, a scalar on the device."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self) -> float | None:
        """Clip, update, clear. Returns the global gradient norm before clipping, None where `read` returned
        it. Where the norm is not finite, DeepSpeed skips the update and returns infinity."""
        known = self.norm is not None
        if self.deepspeed:
            self.module.step()
            norm = self.module.get_global_grad_norm() or 0.0
        else:
            norm = self.norm if known else self._norm()
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.norm = None
        self._forget()
        return None if known else float(norm)

    def _forget(self) -> None:
        """Drop what layers with a shared input cache: copies of the factors, and products that were not
        used."""
        for shared in self.shared:
            shared.forget()

    def adapters(self) -> dict[str, Adapter]:
        """All adapters in float32 on the CPU, gathered whole on every rank (collective under ZeRO)."""
        return {
            name: Adapter(
                self._full(layer.lora_A),
                self._full(layer.lora_B),
                None if layer.lora_w is None else self._full(layer.lora_w),
            )
            for name, layer in sites(self.model).items()
        }

    def rewrite(self, function: Callable[[dict[str, Adapter]], dict[str, Adapter]]) -> None:
        """Replace the adapters by `function` of all of them, the same on all ranks, and reset Adam's moments
        and step counts. With the old step counts Adam would not correct the bias of the new moments, and its
        steps would be 2 to 6 times too long with a β₂ of 0.999."""
        self.put(function(self.adapters()))
        for state in self.inner.state.values():
            for kept in ("exp_avg", "exp_avg_sq", "step"):
                state[kept].zero_()

    @torch.no_grad()
    def put(self, adapters: dict[str, Adapter]) -> None:
        """Write these factors, the first rank's, into the model's adapters (collective)."""
        for site, layer in sites(self.model).items():
            a, b, w = adapters[site]
            for p, value in ((layer.lora_A, a), (layer.lora_B, b), (layer.lora_w, w)):
                if p is not None:
                    self._write(p, broadcast(value.contiguous().to(self.acc.device)))
        self._forget()

    def _write(self, p: nn.Parameter, value: Tensor) -> None:
        """Write a whole value into a trained parameter (collective under ZeRO)."""
        if not self.deepspeed:
            p.copy_(value)
            return
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        # The working copy is what the next forward reads; the master is what the next step starts from.
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(value)
        if zero_stage(self.acc) == 3:  # safe_set_full_fp32_param fails where the ranks don't divide the size
            safe_set_local_fp32_param(p, p.ds_tensor)
        else:
            safe_set_full_fp32_param(p, value)

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters by `value.<name>`, whole (collective under ZeRO)."""
        return self._values(self._trained())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters, the factors that stay as they are, and Adam's moments and step counts, by
        `<kind>.<name>`: whole, in their own precision, the same for any number of processes (collective under
        ZeRO)."""
        yield from self.values()
        yield from self._values(self._fixed())
        for name, p in self._trained():
            if self.deepspeed:
                yield from ((f"{key}.{name}", self._moment(p, key)) for key in MOMENTS)
                yield f"step.{name}", next(iter(self.inner.state.values()))["step"].clone()
            else:  # a parameter that never had a gradient has no moments
                yield from ((f"{key}.{name}", value) for key, value in self.inner.state.get(p, {}).items())

    @torch.no_grad()
    def load_state(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Put back what `state` or `values` gave, under any number of processes and stage of ZeRO
        (collective).
        """
        known = dict([*self._trained(), *self._fixed()])
        for key, tensor in tensors:
            kind, _, name = key.partition(".")
            p = known[name]
            if kind == "value":
                self._write(p, tensor.to(self.acc.device))
            elif not self.deepspeed:
                self.inner.state[p][kind] = tensor.to(self.acc.device).clone()
            elif kind == "step":
                for flat in self._flat():
                    self.inner.state[flat]["step"] = tensor.to(flat.device).clone()
            else:
                self._write_moment(p, kind, tensor.to(self.acc.device))
        self._forget()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer's steps may change, by name."""
        return ((name, p) for name, p in self._named() if id(p) in self.stepped)

    def _fixed(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The factors that a method has chosen before training and that do not train. They are saved since
        choosing them again may give others, which would not fit the trained ones."""
        return ((name, p) for name, p in self._named() if ".lora_" in name and id(p) not in self.stepped)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return cast(nn.Module, self.model).named_parameters()

    def _values(self, named: Iterator[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        return ((f"value.{name}", self._full(p) if self.deepspeed else p) for name, p in named)

    def _flat(self) -> list[Tensor]:
        """ZeRO's flat shards that this process steps."""
        zero = self.module.optimizer
        return (
            zero.fp32_partitioned_groups_flat
            if zero_stage(self.acc) == 3
            else zero.single_partition_of_fp32_groups
        )

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        """A moment of p, whole, from the processes that have parts of it (collective)."""
        if zero_stage(self.acc) == 3:
            return p._z3_optimizer.get_full_hp_param(p, key)
        whole = torch.zeros(p.numel(), device=p.device)
        for own, part in self._parts(p, key):
            whole[own] = part
        return self.acc.reduce(whole, "sum").view_as(p)

    def _write_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        """This process's part of a moment, into the state that ZeRO's first step would make."""
        for flat in self._flat():
            if key not in self.inner.state[flat]:
                self.inner.state[flat][key] = torch.zeros_like(flat)
        if zero_stage(self.acc) == 3:
            size = p.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.acc.num_processes - value.numel()))
            p._z3_optimizer.set_local_hp_param(padded[size * self.acc.process_index :][:size], p, key)
        else:
            for own, part in self._parts(p, key):
                part.copy_(value.flatten()[own])

    def _parts(self, p: nn.Parameter, key: str) -> Iterator[tuple[slice, Tensor]]:
        """Under ZeRO 1 and 2: the elements of p that this process steps, if any, with their part of the
        moment."""
        held = p._hp_mapping
        if held is not None:
            own, place = held.lp_fragment_address, held.hp_fragment_address
            state = self.inner.state[self._flat()[held.param_group_index]]
            yield slice(own.start, own.start + own.numel), state[key].narrow(0, place.start, place.numel)

    def _full(self, p: nn.Parameter) -> Tensor:
        """A copy of the whole parameter in float32 on the CPU (collective under ZeRO)."""
        full = None
        if self.deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param

            full = safe_get_full_fp32_param(p)
        return (p if full is None else full).detach().float().cpu().clone()

    def free(self) -> None:
        """Tear the engine down and free its model; a later task builds its own. DeepSpeed 0.19 keeps a
        reference to every stage-3 engine and its model until the process ends (in `FWD_MODULE_STACK` and the
        cache of `__params_to_release`), so their tensors are freed here one by one."""
        zero = self.module.optimizer if zero_stage(self.acc) == 3 else None
        inner = self.inner
        self.module = self.optimizer = self.inner = self.recorder = None
        self.acc.free_memory()
        if zero is not None:
            for p in self.model.parameters():
                p.data, p.grad, p.ds_tensor = p.data.new_empty(0), None, None
            for held in (zero.__dict__, inner.state, inner.param_groups):
                held.clear()
        self.model, self.shared, self.whole, self.parameters = None, [], [], []
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc does not return freed memory to the system by itself
            libc.malloc_trim(0)
