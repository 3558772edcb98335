"""What a trainer does for `salsa_go_back`: good weights are kept, in checkpoints too."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .good_weights import GoodWeights
from .optimizers import LineSearchOptimizer
from .optimizers.tensors import is_sharded
from .search_arguments import SearchArguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class WatchRun(TrainerCallback):
    """Keeps the good weights of the current run up to date.

    Attributes:
        good_weights: None outside of a run, and where nobody asked for them.
    """

    good_weights: GoodWeights | None = None

    @property
    def logged(self) -> dict[str, float]:
        """What the log shows: how often the run went back, if it may."""
        return {} if self.good_weights is None else {"salsa/returns": self.good_weights.returns}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what the step has found good, or go back."""
        if self.good_weights is not None:
            self.good_weights.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the memory."""
        self.good_weights = None


class GoBackMixin(_Base):
    """Goes back to good weights when a run has broken down, if the arguments ask for it."""

    _watch: WatchRun
    model: nn.Module
    _loaded: dict[str, Any] | None = None  # from a checkpoint, for the run that begins

    @property
    def _goes_back(self) -> bool:
        return isinstance(self.args, SearchArguments) and self.args.salsa_go_back

    def _begin_watch(self, model: nn.Module, line_search: LineSearchOptimizer | None) -> None:
        """Watch the run that begins, after a checkpoint was loaded."""
        loaded, self._loaded = self._loaded, None
        self._watch.good_weights = None
        if line_search is not None and self._goes_back:
            if self._watch not in self.callback_handler.callbacks:
                self.add_callback(self._watch)
            self._watch.good_weights = GoodWeights(model, line_search)
            if loaded is not None:
                self._watch.good_weights.load_state_dict(loaded)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not (self._sharded or self.args.should_save):
            return  # of shards every process saves its own; else all keep the same
        file = self._good_weights_in(output_dir)
        if self._watch.good_weights is None:
            file.unlink(missing_ok=True)  # of an earlier run in this folder
        else:
            file.parent.mkdir(parents=True, exist_ok=True)  # the first process may be late
            torch.save(self._watch.good_weights.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._loaded = None
        file = self._good_weights_in(checkpoint) if checkpoint and self._goes_back else None
        if file is not None and file.is_file():
            self._loaded = torch.load(file, map_location="cpu", weights_only=True)

    @property
    def _sharded(self) -> bool:
        return any(is_sharded(param) for param in self.model.parameters())

    def _good_weights_in(self, checkpoint: str) -> Path:
        """Return the file that this process reads and, where it saves them, writes."""
        number = f"_{self.args.process_index}_of_{self.args.world_size}" if self._sharded else ""
        return Path(checkpoint, f"salsa_good_weights{number}.pt")
