"""CoLoR: one adapter per task, chosen for each prompt by the nearest centroid of earlier prompts."""

import torch
from torch import Tensor

from codyra_llm.config.methods.experts import ColorConfig
from codyra_llm.methods.base import Task
from codyra_llm.methods.experts.single import Single
from codyra_llm.methods.parts.features import kmeans, over_prompts, padded, pooled_states
from codyra_llm.models import families


class Color(Single):
    """A fresh LoRA per task; the nearest of all tasks' k-means centroids picks the adapter for each prompt.

    Source: CoLoR (2311.17601), for vision transformers, of which only the abstract was read: not a
    reproduction. Ours: the feature, which is the mean over the prompt's tokens of the frozen base's last
    hidden state, the same at training and at test; k-means++ seeds; Euclidean distance. Where
    `model.quantization` packs the base for training, centroids come from the packed weights and test features
    from the plain ones. Cost: none per step; one forward pass over the task's prompts per task and one over
    every test prompt. State: the centroids, 5·h float32 per task. Except for the two NumGLUE tasks, TRACE's
    tasks have clearly different prompts, so expect results close to `single`."""

    name, summary, Config = "color", "one LoRA per task, chosen by the nearest prompt centroid", ColorConfig
    config: ColorConfig
    task_id, grows, max_zero_stage = False, True, 0

    def begin_task(self, model, task: Task) -> None:
        """Find the centroids of the task's prompts."""
        super().begin_task(model, task)  # B = 0, so the features are the base's
        features = over_prompts(model, task, task.encode(task.records()), pooled_states)
        self._found = kmeans(
            features.cpu().double(), self.config.centroids, "k-means", self.seed, task.index
        ).float()

    def state_bytes(self, model, tasks: int) -> int:
        """Each task's centroids."""
        size = families.pretrained(model).config.hidden_size
        return 4 * tasks * self.config.centroids * size

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """All tasks' centroids, [tasks, k, h]."""
        old = [task.state["centroids"]] if task.index else []
        return {"centroids": torch.cat([*old, self._found[None]])}  # [tasks, k, h]

    def install(self, model, task: Task) -> None:
        """In addition, all centroids in one table."""
        super().install(model, task)
        self._centroids = task.state["centroids"].flatten(0, 1).double()

    def mixture(self, model, prompts, task) -> Tensor:
        """The adapter of the task whose centroid is nearest."""
        features = pooled_states(model, *padded(prompts, model.device)).cpu().double()
        nearest = torch.cdist(features, self._centroids).argmin(1) // self.config.centroids
        return self.only(nearest.to(model.device))
