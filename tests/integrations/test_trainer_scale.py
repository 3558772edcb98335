"""Trainer's updates of fewer micro-batches, and resumes with more: three kinds of losses (11)."""

import os

import pytest
from cases import silent
from torch import nn
from transformers import TrainerCallback

from hf_salsa import SaLSaAdam, SaLSaSGD, SaLSaTrainer
from hf_salsa.optimizers.scale import NOT_A_SUM, NOT_KNOWN, SUM

pytestmark = pytest.mark.slow

EXAMPLES = 28  # three updates of 8 and one of 4


class WithoutKeywords(nn.Module):
    """Accepts no loss keywords: Trainer divides by the number of micro-batches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return self.model(input_ids=input_ids, labels=labels)


class Sizes(TrainerCallback):
    """Notes the step size of every step, and whether it was searched."""

    def __init__(self, trainer):
        self.trainer, self.sizes, self.searched = trainer, [], []

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = self.trainer.line_search
        self.sizes.append(optimizer.step_size)
        self.searched.append(optimizer.param_groups[0]["steps_since_search"] == 0)


def trained(model, optimizer, data, args, resume=None):
    trainer = SaLSaTrainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    sizes = Sizes(trainer)
    trainer.add_callback(sizes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, sizes


def cut_into(accumulation):
    return {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
        "max_steps": 8,
        "max_grad_norm": 0.0,
    }


def sgd(model, share=1.0, **settings):
    return SaLSaSGD(model.parameters(), initial_step_size=0.1 * share, **settings)


def adam(model, share=1.0, **settings):
    return SaLSaAdam(
        model.parameters(), initial_step_size=0.01, betas=(0.0, 0.0), eps=1e-30, **settings
    )


KINDS = {  # -> model, data, what the measurement finds
    "ignores the items": ("bert", "sentences", SUM),
    "divides by the items": ("gpt2", "texts", NOT_A_SUM),
    "is divided by Trainer": ("bert", "sentences", NOT_A_SUM),
}


def kind_of(request, name):
    model, data, factor = KINDS[name]
    make = request.getfixturevalue(model)
    wrap = WithoutKeywords if name == "is divided by Trainer" else lambda model: model
    return lambda: wrap(make(dropout=0.0)), request.getfixturevalue(data)[:EXAMPLES], factor


@silent
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("direction", [sgd, adam])
@pytest.mark.parametrize("name", KINDS)
def test_the_last_update_of_an_epoch_has_fewer_micro_batches(request, arguments, name, direction):
    """2 instead of 4: step sizes are those of uncut batches, divided by the scale of the loss."""
    make, data, factor = kind_of(request, name)
    runs = []
    for accumulation in (1, 4):
        model = make()
        added_up = factor == SUM and direction is sgd
        optimizer = direction(model, 1 / accumulation if added_up else 1.0)
        _, noted = trained(model, optimizer, data, arguments(**cut_into(accumulation)))
        expected = NOT_KNOWN if accumulation == 1 else factor
        assert optimizer.param_groups[0]["loss_factor"] == expected
        assert all(noted.searched)
        runs.append(noted.sizes)
    scales = [4, 4, 4, 2] * 2 if added_up else [1] * 8
    ratios = [size / cut for size, cut in zip(*runs, strict=True)]
    assert ratios == pytest.approx(scales, rel=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_measured_once_and_only_where_numbers_may_change(request, arguments, name):
    """One evaluation more than without, in the first search."""
    make, data, _ = kind_of(request, name)
    evaluations = []
    for accumulation in (1, 4):
        model = make()
        added_up = accumulation if name == "ignores the items" else 1
        optimizer = sgd(model, 1 / added_up)
        trained(model, optimizer, data, arguments(**cut_into(accumulation)))
        evaluations.append(optimizer.counters.trials)
    assert evaluations[1] == evaluations[0] + 1


@pytest.mark.parametrize("searching", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4)])
@pytest.mark.parametrize("name", KINDS)
def test_a_resume_with_another_accumulation(request, arguments, name, before, after, searching):
    make, data, factor = kind_of(request, name)
    share = 1 / before if factor == SUM else 1.0
    interval = {"max_search_interval": 1 if searching else 10}
    save = {"save_strategy": "steps", "save_steps": 5}

    def settle(optimizer):  # searches are rare by now
        for group in optimizer.param_groups:
            group["search_interval"] = 100

    class Settles(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 5 and not searching:
                settle(optimizer)

    runs = []
    for accumulation, resume in ((before, None), (after, "checkpoint-5")):
        model = make()
        args = arguments(**{**cut_into(accumulation), **save})
        optimizer = sgd(model, share, **interval)
        trainer = SaLSaTrainer(model, args, train_dataset=data, optimizers=(optimizer, None))
        noted = Sizes(trainer)
        trainer.add_callback(noted)
        trainer.add_callback(Settles())
        path = resume and os.path.join(args.output_dir, resume)
        trainer.train(resume_from_checkpoint=path)
        runs.append(noted)
    straight, resumed = runs[0].sizes[5:], runs[1].sizes
    # Steps 6 to 8 are 8, 8 and 4 examples; those are not cut into less than 1.
    last = max(1, after // 2) / max(1, before // 2)
    scales = [after / before, after / before, last] if factor == SUM else [1.0] * 3
    assert len(resumed) == 3
    assert [size / cut for size, cut in zip(straight, resumed, strict=True)] == pytest.approx(
        scales, rel=0.02
    )
    if not searching:  # where one micro-batch had left it open, the first step asks
        assert runs[1].searched[0] == (before == 1)
