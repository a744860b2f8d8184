"""DualLoRA: an adapter kept orthogonal to old tasks' inputs, and one per task in what those leave free,
gated.
"""

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.experts import DualLoraConfig
from codyra_llm.lora.layer import attach, sites
from codyra_llm.lora.mixture import MixtureLinear, mixtures, select, weigh
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.base import Condition, Task, restore
from codyra_llm.methods.experts.single import Single
from codyra_llm.methods.parts.features import mean_state, padded, prompt_mask
from codyra_llm.methods.parts.inputs import free_rows, grown, input_covariances, loaded, memory_bytes
from codyra_llm.methods.parts.subspace import Subspace
from codyra_llm.models import families


class DualLinear(MixtureLinear):
    """y = x Wᵀ + s·x (B_o A_o)ᵀ + Σ_k g_k·s·x (B_k A_k)ᵀ; O = B_o A_o is the own adapter's first ⌊rank/2⌋
    ranks, R_t the others, earlier R_k are held. Gates of a row: g_k = ρ_k / Σ ρ, ρ_k = ‖A_k x̄‖², x̄ the mean
    of x over `prompts` [rows, T]; they are kept in `rows` and hold where `prompts` is None."""

    prompts: Tensor | None = None
    reads_input = True

    @property
    def own_parts(self) -> list[int]:
        """The ranks of O and of R."""
        return [self.spec.rank // 2, self.spec.rank - self.spec.rank // 2]

    @property
    def mixes(self) -> bool:
        """Whether there are gates, or prompts to compute them from."""
        return self.rows is not None or self.prompts is not None

    @torch.no_grad()
    def weights(self, hidden: Tensor) -> Tensor:
        """The gates of the rows [rows, tasks + 1], 1 for O; computed from the prompts where these are set."""
        if self.prompts is not None:
            squares = mean_state(hidden, self.prompts).square()  # A x̄ = the mean of A x
            *old, _orthogonal, new = (part.sum(1) for part in squares.split(self.parts, 1))
            relevance = torch.stack([*old, new], 1)
            gates = relevance / relevance.sum(1, keepdim=True).clamp_min(torch.finfo(relevance.dtype).tiny)
            self.rows = torch.cat([gates[:, :-1], torch.ones_like(gates[:, :1]), gates[:, -1:]], 1)
        return self.rows


class DualLora(Single):
    """W + s·B_o A_o + Σ_k g_k·s·B_k A_k: O for the stream, a residual R_k per task, gated by the prompt
    (`DualLinear`).

    Idea: DualLoRA (2411.00623), for vision transformers, of which only the abstract was read: an adapter
    updated orthogonally to the features of old tasks, one within bases outside of these features, and a
    memory that weights the latter by how well a test input fits their bases. All formulas are ours, so this
    is not a reproduction:

    - M: an orthonormal basis of old tasks' inputs, for each distinct input, grown by DualGPM as in InfLoRA
      (2404.00228).
    - O: in the first task plain LoRA; later B_o is frozen (a changed B_o would change old outputs whatever
      A_o is) and A_o's applied updates are projected, ΔA_o ← ΔA_o (I - M Mᵀ), Adam's scaling and weight
      decay included.
    - R_t: A_t = U_tᵀ frozen, U_t the leading left singular vectors of (I - M Mᵀ) C_t, C_t the covariance of
      the task's inputs; B_t trains from zero.
    - Gates: without gradient or dropout; ‖x̄‖² cancels. x̄ leaves out the first token, as C_t does: BOS, or a
      token that takes its role in attention. Since U_1 has what all prompts share, ρ_1 is large for every
      prompt. Gates of old prompts do shrink when a task is added.

    Cost per step: (tasks + 1)× the adapter's products in plain autograd, 4·r·in·k per site for the
    projections, k columns of M. Per task: for every portion of the inputs (`inputs_at_once`) a pass over
    `max_examples` before and one after; an eigenproblem of size `in` in float64, on the GPU if there is one,
    per distinct input, before and after. At test: a second pass over the prompts, for the gates. State and
    memory: at most in²/2 float32 per distinct input.
    """

    name, summary, Config = "duallora", "an orthogonal LoRA and gated residual LoRAs per task", DualLoraConfig
    config: DualLoraConfig
    task_id, grows, max_zero_stage, packs = False, True, 0, False

    def attach(self, model) -> None:
        """`DualLinear` on all targets."""
        attach(model, self.config.targets, self.spec(), DualLinear, self.config.layers)

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Choose A_t, and read what old tasks' inputs span."""
        super().begin_task(model, task)
        self._put(model, task, task.index)
        self._later, half = task.index > 0, self.config.rank // 2
        for layer in sites(model).values():
            # No gate for what is not there yet.
            layer.lora_A[half:] = 0
            layer.lora_B[:, half:] = 0
        old, self._old = loaded(task.state), {}
        for name, covariance, layers in self._covariances(model, task):
            free = old.get(name, Subspace.nothing(len(covariance)))
            rows = free_rows(free, name, covariance, self.config.rank - half, task)
            basis = free.to(layers[0].lora_A)
            for layer in layers:
                layer.lora_A[half:] = rows
                self._old[layer] = basis

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy under the gates of each row's prompt."""
        gate_by(model, prompt_mask(batch))
        return super().loss(model, batch)

    @torch.no_grad()
    def edit_gradients(self, gradients) -> None:
        """No gradient for what is frozen; that of A_o off M. Keeps the factors for `after_step`."""
        half, self._held = self.config.rank // 2, {}
        for layer, old in self._old.items():
            layer.lora_A.grad[:half] = old.free(layer.lora_A.grad[:half].T).T
            layer.lora_A.grad[half:] = 0
            if self._later:
                layer.lora_B.grad[:, :half] = 0
            self._held[layer] = layer.lora_A.clone(), layer.lora_B[:, :half].clone()

    @torch.no_grad()
    def after_step(self, gradients) -> None:
        """Adam scales each entry by itself, so the update that it applied is projected again."""
        half = self.config.rank // 2
        for layer, (a, b) in self._held.items():
            layer.lora_A[:half] = a[:half] + self._old[layer].free((layer.lora_A[:half] - a[:half]).T).T
            layer.lora_A[half:] = a[half:]
            if self._later:
                layer.lora_B[:, :half] = b

    def state_bytes(self, model, tasks: int) -> int:
        """The subspace of every input, at its largest."""
        return memory_bytes(model)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """M with this task's inputs in addition."""
        return grown(self.config, task, self._covariances(model, task))

    def install(self, model, task: Task) -> None:
        """All adapters up to this task, frozen."""
        self.attach(model)
        self._put(model, task, task.index + 1)
        model.requires_grad_(False)

    @torch.no_grad()
    def condition(self, model, prompts: list[list[int]], task: int | None) -> Condition:
        """Take the gates in a pass over the prompts."""
        ids, mask = padded(prompts, model.device)
        gate_by(model, mask)
        families.backbone(model)(input_ids=ids, use_cache=False)
        for layer in mixtures(model).values():
            layer.prompts = None
        return Condition(select=lambda rows: select(model, rows))

    def _put(self, model: nn.Module, task: Task, count: int) -> None:
        """Put what `count` tasks left into the model. Its own factors become the last of their updates, O and
        R; the R of tasks before `task` are held next to them.
        """
        if not count:
            return
        updates, half = [task.archive.load(k) for k in range(count)], self.config.rank // 2
        held = updates[:-1] if count > task.index else updates
        for name, layer in mixtures(model).items():
            whole = [update.adapters[name] for update in held]
            layer.hold([Adapter(adapter.a[half:], adapter.b[:, half:], None) for adapter in whole])
        restore(model, updates[-1])

    def _covariances(self, model: nn.Module, task: Task):
        return input_covariances(
            self.config, model, task, self.seed, lambda batch: gate_by(model, prompt_mask(batch))
        )


def gate_by(model: nn.Module, mask: Tensor) -> None:
    """Let all layers take their gates from these prompt tokens [rows, T] without the first, unless it is the
    only one.
    """
    weigh(model, None)
    # A token counts if the one before it is in the prompt too. `roll` brings the row's last one to the front,
    # so the first is set anew.
    counted = mask.roll(1, 1) & mask
    counted[:, 0] = mask.sum(1) == 1
    for layer in mixtures(model).values():
        layer.prompts = counted
