"""Optimizers of others, and the trainers that let them take part."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from hf_salsa import SaLSaTrainer


class AuthorsOptimizer(Optimizer):
    """The authors' package where `Trainer` expects an optimizer.

    Their step computes loss and gradients itself, so that it is taken in `training_step`, and
    `Trainer`'s own call finds nothing left to do.
    """

    def __init__(self, params: Iterator[torch.nn.Parameter]) -> None:
        from salsa.SaLSA import SaLSA

        super().__init__(params, {"lr": 1.0})
        self.package = SaLSA(self.param_groups[0]["params"])

    def take_step(self, closure: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Take the step; `closure(backwards=...)` returns the loss and leaves the gradients."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when a loss stands still
            return self.package.step(closure)

    def step(self, closure: Any = None) -> None:
        """Do nothing: the step was taken."""


class ComparisonTrainer(SaLSaTrainer):
    """`SaLSaTrainer`, to which baselines are as to `Trainer`; logs the rates that rivals found."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            optimizer = self.optimizer.optimizer
            if isinstance(optimizer, AuthorsOptimizer):
                logs["learning_rate"] = float(optimizer.package.step_size)
            elif "d" in optimizer.param_groups[0]:  # Prodigy's estimate
                logs["learning_rate"] *= optimizer.param_groups[0]["d"]
        super().log(logs, *args, **kwargs)


class AuthorsTrainer(ComparisonTrainer):
    """`Trainer` whose step is the authors' package's."""

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)

        def closure(backwards: bool = False) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            if backwards:
                loss.backward()
            return loss

        return self.optimizer.optimizer.take_step(closure).detach()


class ScheduleFreeTrainer(ComparisonTrainer):
    """Evaluates the averaged weights with the statistics that batch normalisation has at them.

    As the authors of Schedule-Free advise: they are found anew on `BATCHES` of the training data.
    """

    BATCHES = 50

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if any(isinstance(module, torch.nn.BatchNorm2d) for module in self.model.modules()):
            self._find_statistics()
        return super().evaluate(*args, **kwargs)

    def _find_statistics(self) -> None:
        data = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.args.seed),
            collate_fn=self.data_collator,
        )
        self.model.train()
        self.optimizer.eval()
        with torch.random.fork_rng(), torch.no_grad():  # training draws on as if this were not
            for batch in itertools.islice(data, self.BATCHES):
                self.model(**self._prepare_inputs(batch))


def prodigy(params: Iterator[torch.nn.Parameter], **options: Any) -> Optimizer:
    """Return Prodigy, with its defaults but for `options`."""
    from prodigyopt import Prodigy

    return Prodigy(params, **options)
