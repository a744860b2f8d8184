"""A plug-in for tests: a method that is seqlora by another name, and a metric."""

FILE = '''
from typing import Literal
from codyra_llm.config.methods.sequential import SeqLoraConfig
from codyra_llm.config.registry import METHODS
from codyra_llm.methods.sequential.seqlora import SeqLora
from codyra_llm.metrics.own import metric


class MineConfig(SeqLoraConfig):
    name: Literal["mine"] = "mine"


class Mine(SeqLora):
    """seqlora by another name."""

    name, summary, Config = "mine", "mine", MineConfig


METHODS["mine"] = Mine


@metric("length_gap", low=0, high=10, higher_is_better=False)
def length_gap(prompt, prediction, answer):
    return min(abs(len(prediction) - len(answer)), 10)
'''
