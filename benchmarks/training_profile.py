"""Where an update of a training goes: matrix products, attention, other operators, the rest.

Any verb that trains runs as the command line says, in this process, until its optimizer has made
``--skip`` updates; then some are timed as a whole, some more operator by operator, and the program
ends. All is CPU time of this thread, so other work on the machine hardly blurs it. The rest is what
is no operator of PyTorch: reading and augmenting videos where no worker does it, Python, matching.
Mini encoders that are not in DIR yet would be trained first, and counted: let a verb make them
there once, and profile one process and a seed that is new.

    python benchmarks/training_profile.py pretrain --work-dir DIR --set launch.processes=1
    python benchmarks/training_profile.py oad --work-dir DIR --seeds 7 --encoders streamformer
    python benchmarks/training_profile.py ovis --work-dir DIR --seeds 7 --encoders streamformer

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ATTENTION = ("_scaled_dot_product", "_softmax", "topk", "gather", "scatter", "grid_sampler")


class Finished(Exception):
    """All updates that were asked for have been watched."""


class Stopwatch(TorchDispatchMode):
    """While it is entered, adds up what each operator takes, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call the operator between two looks at the clock."""
        begun = time.thread_time()
        found = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.thread_time() - begun
        return found


class Watch:
    """Counts the updates of all optimizers, and watches some of them.

    Args:
        skip: updates before the first that counts, at least 1.
        updates: that are timed, and again as many whose operators are.

    Attributes:
        seconds: of an update.
        operators: seconds of an update by operator, the longest first.
    """

    def __init__(self, skip: int, updates: int) -> None:
        self.skip, self.updates, self.done = skip, updates, 0
        self.seconds, self.operators = 0.0, {}
        self._stopwatch = Stopwatch()

    def __call__(self, *step: object) -> None:
        """To be called after each update. Raises Finished after the last one."""
        self.done += 1
        if self.done == self.skip:
            self._begun = time.process_time()
        elif self.done == self.skip + self.updates:
            self.seconds = (time.process_time() - self._begun) / self.updates
            self._stopwatch.__enter__()
        elif self.done == self.skip + 2 * self.updates:
            self._stopwatch.__exit__(None, None, None)
            times = self._stopwatch.seconds.most_common()
            self.operators = {name: seconds / self.updates for name, seconds in times}
            raise Finished

    def shares(self) -> dict[str, float]:
        """Of an update; with little rest, the clock's own part may make them sum to more than 1."""
        sums = {"products": 0.0, "attention": 0.0, "other operators": 0.0}
        for name, seconds in self.operators.items():
            sums[kind_of(name)] += seconds / self.seconds
        return {**sums, "rest": max(0.0, 1 - sum(sums.values()))}


def kind_of(operator: str) -> str:
    """What an operator does; what chooses keys or samples values belongs to attention."""
    if operator in PRODUCTS:
        return "products"
    return "attention" if operator.startswith(ATTENTION) else "other operators"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the verb, print what its updates consist of and one line of JSON; return that."""
    from experiments import run

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--skip", type=int, default=40, help="updates before (40)")
    parser.add_argument("--updates", type=int, default=20, help="updates that are watched (20)")
    options, verb = parser.parse_known_args(arguments)
    torch.set_num_threads(1)
    watch = Watch(options.skip, options.updates)
    hook = register_optimizer_step_post_hook(watch)
    try:
        run.main(verb)
    except Finished:
        pass
    else:
        raise SystemExit(
            f"{' '.join(verb)}: ended after {watch.done} updates in this process; "
            f"{options.skip + 2 * options.updates} are wanted: is it done, or in other processes?"
        )
    finally:
        hook.remove()  # or it would count the updates of whatever this process trains next
    print(f"an update: {1e3 * watch.seconds:.1f} ms of CPU time")
    for kind, share in watch.shares().items():
        print(f"  {kind:16}{share:7.1%}")
    for name, seconds in list(watch.operators.items())[:20]:
        print(f"{1e3 * seconds:9.2f} ms  {name}  ({kind_of(name)})")
    results = {
        "benchmark": "training_profile",
        "verb": verb,
        **vars(options),
        "seconds": watch.seconds,
        "shares": watch.shares(),
        "operators": watch.operators,
        "torch": torch.__version__,
    }
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
