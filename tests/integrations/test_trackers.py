"""Trackers get every number, under the keys of their own callbacks."""

import sys
import types

import pytest
from transformers.integrations import integration_utils

from hf_salsa import SaLSaTrainer

OF_EACH = ("loss", "learning_rate", "grad_norm", "epoch")
OF_SEARCH = ("searches", "trials", "interval", "decrease", "slope")
AT_THE_END = ("median_step_size", "settled_step_size", "search_runtime", "extra_forward_share")


def train(arguments, bert, sentences, tracker):
    args = arguments(logging_steps=2, report_to=tracker)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    trainer.train()
    return trainer


def test_tensorboard_s_event_file(arguments, bert, sentences, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(arguments, bert, sentences, "tensorboard")
    (file,) = (tmp_path / "events").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == 3
    for name in (*OF_EACH, *(f"salsa/{name}" for name in OF_SEARCH)):
        read = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        logged = [(e["step"], pytest.approx(e[name])) for e in entries]
        assert read[: len(logged)] == logged, name
    report = trainer.state.log_history[-1]
    for name in AT_THE_END:
        (event,) = events.Scalars(f"train/salsa/{name}")
        assert (event.step, event.value) == (6, pytest.approx(report[f"salsa/{name}"]))


class Client(types.ModuleType):
    """Stands for the tracker's own package: keeps what the callback of transformers sends."""

    def __init__(self, name):
        super().__init__(name)
        self.sent, self.config, self.run = [], Config(), None

    def init(self, **settings):
        self.run = types.SimpleNamespace(summary={}, _label=lambda **_: None, id="1", url="")

    def define_metric(self, *args, **kwargs):
        pass

    def watch(self, *args, **kwargs):
        pass

    def finish(self):
        pass

    def log(self, values):
        self.sent.append(values)


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_what_is_sent_to(tracker, arguments, bert, sentences, monkeypatch):
    client = Client(tracker)
    space = types.SimpleNamespace(get=lambda: None)
    client.context_vars = types.SimpleNamespace(current_space_id=space, current_project=space)
    errors = types.SimpleNamespace(ConfigError=RuntimeError)  # what W&B's callback catches
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    monkeypatch.setitem(sys.modules, tracker, client)
    monkeypatch.setattr(integration_utils, f"is_{tracker}_available", lambda: True)
    trainer = train(arguments, bert, sentences, tracker)
    entries = [e for e in trainer.state.log_history if "loss" in e]
    for sent, entry in zip(client.sent, entries, strict=False):
        expected = {f"train/{name}": value for name, value in entry.items() if name != "step"}
        assert sent == expected | {"train/global_step": entry["step"]}
        assert {f"train/salsa/{name}" for name in OF_SEARCH} <= sent.keys()
    assert {f"train/salsa/{name}" for name in AT_THE_END} <= client.sent[-1].keys()
    assert client.config["optim"] == "salsa_adam_plus"  # what runs are compared by
