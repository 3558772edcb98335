"""Trainers that count, log, keep and draw: what a search must leave no trace in."""

import random
from collections import Counter, defaultdict
from types import MappingProxyType

import numpy as np
import torch
from kinds import Meter
from torch import nn
from transformers import PretrainedConfig, Trainer, TrainerCallback

KINDS = {}
# In the names of what no two runs share.
CLOCKS = ("runtime", "per_second", "learning_rate", "salsa/", "step_time")


def settings(**values):
    return MappingProxyType(values)


def add(kind):
    KINDS[kind.__name__] = kind
    return kind


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(6, 2)
        self.config = PretrainedConfig()

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Kind(Trainer):
    """A trainer; a kind says what it does beside computing the loss.

    Attributes:
        options: Training arguments.
        makes: Arguments of the trainer, made anew for each.
    """

    options = settings()
    makes = settings()

    def set_up(self):
        pass

    def beside(self, loss):
        """Return the loss to train on."""
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return self.beside(loss)

    def seen(self):
        """Return what can be seen of it beside its attributes."""


class Events(TrainerCallback):
    """Counts what callbacks hear, where nobody can put it back."""

    def __init__(self):
        self.heard = Counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard["log"] += 1

    def on_substep_end(self, args, state, control, **kwargs):
        self.heard["substep"] += 1

    def on_prediction_step(self, args, state, control, **kwargs):
        self.heard["prediction"] += 1


@add
class Plain(Kind):
    pass


@add
class Logs(Kind):
    def beside(self, loss):
        self.log({"ce": loss.item()})
        return loss


@add
class LogsLoss(Kind):
    def beside(self, loss):
        self.log({"loss": loss.item()})
        return loss


@add
class OwnHistory(Kind):
    def set_up(self):
        self.history = []

    def log(self, logs, start_time=None):
        self.history.append({k: v for k, v in logs.items() if not any(c in k for c in CLOCKS)})
        super().log(logs, start_time)

    def beside(self, loss):
        self.log({"ce": loss.item()})
        return loss


@add
class Counts(Kind):
    def set_up(self):
        self.calls = 0

    def beside(self, loss):
        self.calls += 1
        return loss * (1 + 1 / self.calls)


@add
class CountsOnTheClass(Kind):
    """The counter begins as an attribute of the class."""

    calls = 0

    def beside(self, loss):
        self.calls += 1
        return loss * (1 + 1 / self.calls)


@add
class Keeps(Kind):
    def set_up(self):
        self.last, self.losses, self.with_graph = None, [], None

    def beside(self, loss):
        self.with_graph = loss
        scale = 1 if self.last is None else 1 + self.last / 10
        self.last = loss.detach()
        self.losses.append(loss.item())
        return loss * scale


@add
class OwnGenerators(Kind):
    def set_up(self):
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.many = [random.Random(4), np.random.RandomState(3)]

    def beside(self, loss):
        noise = torch.rand((), generator=self.torch) + self.numpy.random()
        return loss * (noise + self.many[0].random() + self.many[1].random_sample())


@add
class Metrics(Kind):
    """As TRL's trainers keep them."""

    def set_up(self):
        self.kept_metrics = defaultdict(lambda: defaultdict(list))
        self.tokens = {"train": 0}

    def beside(self, loss):
        self.kept_metrics["train"]["ce"].append(loss.item())
        self.tokens["train"] += 4
        return loss * (1 + self.tokens["train"] / 1000)

    def log(self, logs, start_time=None):
        metrics = {name: sum(v) / len(v) for name, v in self.kept_metrics["train"].items()}
        super().log({**logs, **metrics}, start_time)
        self.kept_metrics["train"].clear()


@add
class OneMeter(Kind):
    def set_up(self):
        self.meter = Meter()

    def beside(self, loss):
        self.meter.update(loss.item())
        return loss * (1 + self.meter.count / 10)


@add
class Meters(Kind):
    def set_up(self):
        self.meters = {"ce": Meter()}

    def beside(self, loss):
        self.meters["ce"].update(loss.item())
        return loss * (1 + self.meters["ce"].count / 10)


@add
class WritesInputs(Kind):
    def compute_loss(self, model, inputs, **kwargs):
        inputs["x"].sub_(0.5)
        labels = inputs.pop("labels")
        loss = nn.functional.cross_entropy(model(**inputs)["logits"], labels)
        inputs["made"] = loss
        return loss


class Distils(Kind):
    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad():
            target = self.teach(inputs["x"]).softmax(-1)
        outputs = model(**inputs)
        return outputs["loss"] + nn.functional.cross_entropy(outputs["logits"], target)


@add
class Teacher(Distils):
    def set_up(self):
        self.teacher = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Dropout(0.1))

    def teach(self, x):
        return self.teacher(x)


@add
class TeachersInDict(Distils):
    def set_up(self):
        self.teachers = {"a": nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))}

    def teach(self, x):
        return self.teachers["a"](x)


@add
class CallsCallbacks(Kind):
    def set_up(self):
        self.add_callback(Events())

    def beside(self, loss):
        handler = self.callback_handler
        self.control = handler.on_prediction_step(self.args, self.state, self.control)
        self.control = handler.call_event("on_substep_end", self.args, self.state, self.control)
        self.accelerator.log({"ce": loss.item()}, step=self.state.global_step)
        self.log({"ce": loss.item()})
        return loss

    def seen(self):
        (events,) = (c for c in self.callback_handler.callbacks if isinstance(c, Events))
        return events.heard


@add
class Stops(Kind):
    """Ends the run where the loss explodes: it does so at the far trial points only."""

    def beside(self, loss):
        if loss > 4:
            self.control.should_training_stop = True
        return loss


@add
class WritesState(Kind):
    """Keeps something where checkpoints have it."""

    def set_up(self):
        self.state.smoothed = 1.0

    def beside(self, loss):
        self.state.smoothed = 0.9 * getattr(self.state, "smoothed", 1.0) + 0.1 * loss.item()
        return loss * self.state.smoothed

    def seen(self):
        return self.state.smoothed


@add
class WritesArguments(Kind):
    def set_up(self):
        self.args.temperature = 2.0

    def beside(self, loss):
        self.args.temperature *= 0.9
        return loss * self.args.temperature

    def seen(self):
        return self.args.temperature


@add
class LabelSmoothing(Kind):
    options = settings(label_smoothing_factor=0.1)


class CountingLoss:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return loss / num_items_in_batch * (1 + 1 / self.calls)


@add
class OwnLossFunction(Kind):
    makes = settings(compute_loss_func=CountingLoss)
    options = settings(gradient_accumulation_steps=2)


@add
class Accumulates(Counts):
    options = settings(gradient_accumulation_steps=2)


@add
class Clips(Counts):
    options = settings(max_grad_norm=0.1)


@add
class TwoBackwards(Kind):
    def set_up(self):
        self.tasks = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        for scale in (1.0, 0.5):
            loss = scale * model(**inputs)["loss"]
            self.tasks.append(loss.item())
            self.accelerator.backward(loss)
        return loss.detach()


@add
class SkipsBadBatches(Kind):
    options = settings(gradient_accumulation_steps=2)

    def set_up(self):
        self.batches, self.skipped = 0, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches += 1
        if self.batches % 4 == 2:
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.skipped.append(loss.item())
            return loss
        return super().training_step(model, inputs, num_items_in_batch)


@add
class Curriculum(Kind):
    def beside(self, loss):
        return loss * (1 + self.state.global_step) + 0.1 * (self.state.epoch or 0)


@add
class AnnealedByCallback(Kind):
    def set_up(self):
        self.alpha, trainer = 1.0, self

        class Anneal(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                trainer.alpha *= 0.7

            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                trainer.alpha *= 1.1

        self.add_callback(Anneal())

    def beside(self, loss):
        return loss * self.alpha


@add
class FlipsFlags(Kind):
    """Freezes the dropout of a part now and then."""

    def set_up(self):
        self.calls = 0

    def beside(self, loss):
        self.calls += 1
        self.model.body.train(self.calls % 3 > 0)
        return loss


def examples():
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(48, 4, generator=generator)
    return [{"x": x, "labels": int(x[0] > 0)} for x in xs]
