"""Sizes and rules of a MAT head (``mat``), and what they must obey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from integrations.sections import refuse_unknown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
GROUPINGS = ("sample", "batch")
Grouping = Literal["sample", "batch"]


class Stack(NamedTuple):
    """A stack of transformer layers.

    ``queries`` learned queries enter a decoder; -1 means that tokens of the data enter instead.
    ``norm`` asks for a layer norm after the last layer.
    """

    queries: int
    layers: int
    norm: bool


@dataclass(frozen=True, kw_only=True)
class MatConfig:
    """Sizes and rules of a MAT head; defaults are those of THUMOS'14 at 4 feature steps per second.

    Lengths are in feature steps; a memory of so many steps read at a rate has steps / rate tokens.
    Raises ValueError with every field that does not fit, and its value.
    """

    visual_size: int  # width of the visual features
    motion_size: int = 0  # width of the optical-flow features; 0: one stream
    num_classes: int  # columns of the target, background and ambiguous column included
    num_verbs: int = 0  # EPIC-Kitchens: verb and noun classifiers beside the action classifier
    num_nouns: int = 0

    dim: int = 1024
    num_heads: int = 4
    feedforward: int = 1024
    dropout: float = 0.0
    classifier_dropout: float = 0.0  # before the actions of the last work stage; EPIC-Kitchens 0.8
    activation: str = "gelu"  # "gelu" (exact form) or "relu"

    long_steps: int = 1024  # 0: no long memory, the work stack is an encoder
    long_rate: int = 4
    work_steps: int = 32
    work_rate: int = 1
    anticipation_steps: int = 8
    anticipation_rate: int = 1
    future_tokens: int = 48  # 0: detection only, neither anticipation nor refinement

    groups: int = 8  # runs into which a (nearly) full long memory is cut; 0: never
    refinements: int = 2
    memory_stages: tuple[Stack, ...] = (Stack(16, 1, True), Stack(-1, 2, True))
    work_stack: Stack = Stack(-1, 2, True)
    generator: Stack = Stack(32, 2, True)
    future_stack: Stack = Stack(48, 1, True)  # layers and norm also shape the work fusions
    # A long memory is attended in groups when fewer than ``groups`` of its entries are masked.
    # "sample": each sample decides for itself, so its scores do not depend on its neighbours.
    # "batch": masked entries of the whole batch are counted, as the released weights were trained.
    long_grouping: Grouping = "sample"

    def __post_init__(self):
        # Configs read from JSON or Python files hold lists; stacks are named tuples from here on.
        for name in ("work_stack", "generator", "future_stack"):
            object.__setattr__(self, name, _as_stack(name, getattr(self, name)))
        stages = tuple(_as_stack("memory_stages", stage) for stage in self.memory_stages)
        object.__setattr__(self, "memory_stages", stages)
        problems = list(self._problems())
        if problems:
            raise ValueError("MatConfig: " + "; ".join(problems))

    def _problems(self):
        least = {"visual_size": 1, "num_classes": 2, "dim": 2, "num_heads": 1, "feedforward": 1}
        least |= {"long_rate": 1, "work_rate": 1, "work_steps": 1, "anticipation_rate": 1}
        zero = ("motion_size", "num_verbs", "num_nouns", "long_steps", "anticipation_steps")
        least |= dict.fromkeys((*zero, "future_tokens", "groups"), 0)
        low = [name for name, least_value in least.items() if getattr(self, name) < least_value]
        if low:  # the rules below divide by some of these
            yield from (f"{name}={getattr(self, name)} is below {least[name]}" for name in low)
            return
        for name in ("dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} is not in [0, 1)"
        if self.activation not in ACTIVATIONS:
            yield f"activation={self.activation!r} is not one of {sorted(ACTIVATIONS)}"
        if self.long_grouping not in GROUPINGS:
            yield f"long_grouping={self.long_grouping!r} is not one of {sorted(GROUPINGS)}"
        if self.dim % 2:
            yield f"dim={self.dim} is odd, but sine and cosine columns alternate"
        if self.dim % self.num_heads:
            yield f"dim={self.dim} does not divide into num_heads={self.num_heads}"
        for memory in ("long", "work"):
            steps, rate = getattr(self, f"{memory}_steps"), getattr(self, f"{memory}_rate")
            if steps % rate:
                yield f"{memory}_steps={steps} is no multiple of {memory}_rate={rate}"
        yield from self._stack_problems()

    def _stack_problems(self):
        for name, stack in self._used_stacks():
            if stack.layers < 1:
                yield f"{name}: {tuple(stack)} has no layers"
        if self.work_stack.queries != -1:
            yield f"work_stack={tuple(self.work_stack)} must have -1 queries (work tokens enter it)"
        if self.long_steps:
            if not self.memory_stages or self.memory_stages[0].queries < 1:
                yield (
                    f"memory_stages={self.memory_stages} must begin with learned queries"
                    f" to compress long_steps={self.long_steps}"
                )
            if self.groups and self.long_tokens % self.groups:
                yield f"groups={self.groups} does not divide the {self.long_tokens} long tokens"
            if any(stage.queries == 0 or stage.queries < -1 for stage in self.memory_stages):
                yield f"memory_stages={self.memory_stages}: queries are positive, or -1 (encoder)"
        if self.future_tokens:
            if self.refinements < 1:
                yield f"refinements={self.refinements} is below 1; future_tokens=0 turns them off"
            if self.generator.queries < 1:
                yield f"generator={tuple(self.generator)} needs learned queries"
            if self.future_stack.queries != self.future_tokens:
                yield (
                    f"future_stack={tuple(self.future_stack)} must have"
                    f" future_tokens={self.future_tokens} queries"
                )
        if self.anticipation_steps > self.future_tokens:
            yield (
                f"anticipation_steps={self.anticipation_steps} exceeds"
                f" future_tokens={self.future_tokens}: anticipation tokens are rows of that table"
            )

    def _used_stacks(self):
        yield "work_stack", self.work_stack
        for stage in self.memory_stages if self.long_steps else ():
            yield "memory_stages", stage
        if self.future_tokens:
            yield from (("generator", self.generator), ("future_stack", self.future_stack))

    @property
    def long_tokens(self) -> int:
        """Tokens of long memory, L."""
        return self.long_steps // self.long_rate

    @property
    def work_tokens(self) -> int:
        """Tokens of work memory, W."""
        return self.work_steps // self.work_rate

    @property
    def anticipation_tokens(self) -> int:
        """Anticipation tokens, A: the first for the next step, then one per rate steps."""
        return len(range(0, self.anticipation_steps, self.anticipation_rate))

    @property
    def compressed_tokens(self) -> int:
        """The most tokens M that long memory is compressed to, over the grouped and plain path."""
        if not self.long_steps:
            return 0
        learned = [stage.queries for stage in self.memory_stages if stage.queries > 0]
        return learned[-1] if len(learned) > 1 else max(learned[0], self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values; ``from_dict`` reads them back."""
        return asdict(self) | {
            "memory_stages": [list(stage) for stage in self.memory_stages],
            "work_stack": list(self.work_stack),
            "generator": list(self.generator),
            "future_stack": list(self.future_stack),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MatConfig:
        """Build from a mapping; raises ValueError naming unknown keys and the nearest field."""
        refuse_unknown(values, cls, "MatConfig")
        return cls(**values)


def _as_stack(name: str, value: Sequence[Any]) -> Stack:
    if len(value) != 3:
        raise ValueError(f"MatConfig: {name} holds {value}, expected (queries, layers, norm)")
    return Stack(*value)
