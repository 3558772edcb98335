"""A new head first, with Trainer: found, marked, trained alone, logged and resumed."""

import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from trainer_problems import assert_same_weights, weights
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaTrainer, SaLSaTrainingArguments, head_groups
from hf_salsa.optimizers.head_first import HeadFirst

STOCK = ["adamw_torch", "adamw_torch_fused", "sgd"]
HEAD = ["classifier.weight", "classifier.bias"]
SOME = ["salsa_adam", "salsa_sgd_plus", "adamw_torch_fused", "sgd"]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A folder with a trained body without a head."""
    from transformers import BertConfig, BertModel

    set_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * torch.randn_like(param))
    folder = str(tmp_path_factory.mktemp("body"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(body):
    def make(folder=body):
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder)

    return make


class Weights(TrainerCallback):
    """Remembers the weights after each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))


def moved(before, after):
    return [name for name in after if not torch.equal(before[name], after[name])]


def logged(trainer, key="learning_rate"):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def optimizer_of(trainer):
    return trainer.optimizer.optimizer


@pytest.mark.slow
@pytest.mark.parametrize("optim", [*OPTIMIZERS, *STOCK])
def test_the_first_updates_move_the_head_alone(arguments, bert, sentences, optim, caplog):
    args = arguments(optim=optim, salsa_head_first=3, max_steps=40, logging_steps=1)
    seen = Weights()
    with caplog.at_level(logging.INFO, "hf_salsa"):
        trainer = SaLSaTrainer(bert(), args, train_dataset=sentences, callbacks=[seen])
        start = weights(trainer.model)
        trainer.train()
    (line,) = (r.getMessage() for r in caplog.records if r.name.startswith("hf_salsa"))
    assert line == f"The new head is trained first, alone: {', '.join(HEAD)}."
    steps = [moved(a, b) for a, b in zip([start, *seen.seen], seen.seen, strict=False)]
    assert steps[:3] == [HEAD] * 3
    assert len(steps[3]) > 20
    optimizer = optimizer_of(trainer)
    assert optimizer.param_groups[0]["head_steps"] == 3
    sizes = logged(trainer)
    assert all(size > 0.01 for size in sizes[:3])  # the head's, far above what a body stands
    if optim in STOCK:
        assert sizes[3:5] == pytest.approx([5e-5 * 37 / 40, 5e-5 * 36 / 40])  # the schedule's
        assert trainer.line_search is None
        assert trainer._objective is None
    # What was clipped and logged is the norm of the head's gradient.
    assert min(logged(trainer, "grad_norm")[3:]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("optim", SOME)
def test_resumed_in_the_phase(arguments, bert, sentences, optim):
    args = arguments(
        optim=optim,
        salsa_head_first=4,
        max_steps=40,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        bf16=True,
    )
    straight = SaLSaTrainer(bert(), args, train_dataset=sentences)
    straight.train()
    for step in (2, 4, 6):
        resumed = SaLSaTrainer(bert(), args, train_dataset=sentences)
        resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, f"checkpoint-{step}"))
        assert_same_weights(straight.model, resumed.model)
        assert logged(straight) == logged(resumed)
        assert optimizer_of(straight).counters == optimizer_of(resumed).counters


@pytest.mark.slow
def test_resumed_with_the_model_of_the_checkpoint(arguments, bert, sentences):
    """Its head is no longer new: a line search goes on by the checkpoint, a stock one needs it."""
    for optim in ("salsa_adam", "adamw_torch"):
        args = arguments(
            output_dir=f"{arguments().output_dir}_{optim}",
            optim=optim,
            salsa_head_first=4,
            max_steps=40,
            save_strategy="steps",
            save_steps=2,
        )
        straight = SaLSaTrainer(bert(), args, train_dataset=sentences)
        straight.train()
        checkpoint = os.path.join(args.output_dir, "checkpoint-2")
        resumed = SaLSaTrainer(bert(checkpoint), args, train_dataset=sentences)
        if optim == "adamw_torch":
            with pytest.raises(ValueError, match="do not agree on whether there is a new head"):
                resumed.train(resume_from_checkpoint=checkpoint)
            args.salsa_head = ["classifier"]  # what the message says
            resumed = SaLSaTrainer(bert(checkpoint), args, train_dataset=sentences)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert_same_weights(straight.model, resumed.model)


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_a_second_run_has_no_second_phase(arguments, bert, sentences, optim):
    args = arguments(optim=optim, salsa_head_first=10, max_steps=20)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    trainer.train()
    assert optimizer_of(trainer).param_groups[0]["head_steps"] == 2  # a tenth of the run
    args.max_steps = 200
    args.num_train_epochs = 1
    trainer.add_callback(Stop(30))
    trainer.train()
    assert optimizer_of(trainer).param_groups[0]["head_steps"] == 2


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_nothing_new_nothing_first(arguments, bert, sentences, optim, caplog):
    model = bert()
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    args = arguments(optim=optim, salsa_head_first=3, max_steps=40)
    with caplog.at_level(logging.INFO, "hf_salsa"):
        trainer = SaLSaTrainer(model, args, train_dataset=sentences)
        trainer.train()
    assert "No new head on a trained body is found, so that none is trained first." in caplog.text
    assert optimizer_of(trainer).param_groups[0]["head_steps"] == 0
    if optim == "adamw_torch":  # the steps are the stock optimizer's, bit for bit
        plain = bert()
        with torch.no_grad():
            plain.classifier.bias.add_(1.0)
        Trainer(plain, stock_arguments(args), train_dataset=sentences).train()
        assert_same_weights(model, plain)


def stock_arguments(args):
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "use_cpu", "save_strategy")
    return TrainingArguments(
        **{name: getattr(args, name) for name in names},
        optim=args.optim,
        report_to="none",
        disable_tqdm=True,
    )


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_the_card_tells_of_the_head(arguments, bert, sentences, optim):
    args = arguments(optim=optim, salsa_head_first=2, max_steps=20, logging_steps=1)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    metrics = trainer.train().metrics
    trainer.create_model_card()
    card = Path(args.output_dir, "README.md").read_text()
    start, stop = map(card.index, ("## Training procedure\n", "### Training hyperparameters\n"))
    sentence = "The first 2 updates trained the new head alone (`classifier`), by a line search of"
    assert sentence in card[start:stop]
    if optim == "salsa_adam":
        after = sorted(logged(trainer)[2:])  # a rate for plain AdamW is none of the head's
        assert metrics["salsa/median_step_size"] == after[8]
        assert metrics["salsa/settled_step_size"] == trainer.line_search.step_size
    else:
        assert "- learning_rate: 5e-05" in card
        assert "salsa" not in card.lower()


def test_off_is_stock_bit_for_bit(arguments, bert, sentences):
    models = []
    for head_first in (None, 0):
        model = bert()
        args = arguments(optim="adamw_torch", salsa_head_first=head_first)
        trainer = SaLSaTrainer(model, args, train_dataset=sentences)
        trainer.train()
        assert type(optimizer_of(trainer)) is torch.optim.AdamW
        assert "head" not in optimizer_of(trainer).param_groups[0]
        models.append(model)
    plain = bert()
    Trainer(plain, stock_arguments(args), train_dataset=sentences).train()
    for model in models:
        assert_same_weights(model, plain)


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_a_head_by_name(arguments, bert, sentences, optim):
    args = arguments(
        optim=optim, salsa_head_first=2, salsa_head=["bert.pooler", "classifier"], max_steps=20
    )
    seen = Weights()
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences, callbacks=[seen])
    start = weights(trainer.model)
    trainer.train()
    names = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", *HEAD]
    assert moved(start, seen.seen[1]) == names
    args.salsa_head = ["clasifier"]
    with pytest.raises(ValueError, match=r"head='clasifier' is not allowed.*classifier\.bias"):
        SaLSaTrainer(bert(), args, train_dataset=sentences)


def test_a_head_by_name_on_the_command_line(tmp_path):
    parser = HfArgumentParser(SaLSaTrainingArguments)
    flags = f"--output_dir {tmp_path} --salsa_head_first 5 --salsa_head pooler classifier"
    (args,) = parser.parse_args_into_dataclasses(flags.split())
    assert (args.salsa_head_first, args.salsa_head) == (5, ["pooler", "classifier"])
    assert args.to_dict()["salsa_head"] == ["pooler", "classifier"]
    assert pickle.loads(pickle.dumps(args)).salsa_head == ["pooler", "classifier"]
    said = {action.dest: action.help for action in parser._actions}
    assert "names of parameters" in said["salsa_head"]


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_arguments_that_are_refused(arguments, optim):
    for head_first in (None, 0):
        message = r"salsa_head=\['classifier'\] is not allowed where no head is trained first"
        with pytest.raises(ValueError, match=message):
            arguments(optim=optim, salsa_head=["classifier"], salsa_head_first=head_first)
    with pytest.raises(ValueError, match="salsa_head_first=-1 is not allowed: it must be a whole"):
        arguments(optim=optim, salsa_head_first=-1)
    assert arguments(optim=optim, salsa_head=["classifier"], salsa_head_first=1)


def test_optimizers_that_do_not_step_as_torch_s_do(arguments, bert, sentences):
    args = arguments(optim="adamw_torch", salsa_head_first=3)

    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    stock = Trainer.get_optimizer_cls_and_kwargs

    def made_by_a_factory(args, model=None):
        cls, options = stock(args, model)
        return cls, {**options, "optimizer_dict": {}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(made_by_a_factory))
        with pytest.raises(ValueError, match="salsa_head_first=3 is not allowed with AdamW, which"):
            trainer.create_optimizer()


def test_set_ups_in_which_the_phase_comes_out_wrong(arguments, bert):
    args = arguments(optim="adamw_torch", salsa_head_first=3)
    message = "salsa_head_first does not work with an empty train_dataset.*; or leave it out"
    with pytest.raises(ValueError, match=message):
        SaLSaTrainer(bert(), args, train_dataset=[])


@pytest.mark.slow
def test_an_optimizer_of_the_user_s_is_left_alone(arguments, bert, sentences):
    args = arguments(salsa_head_first=3, max_steps=40)
    model = bert()
    optimizer = SaLSaAdam(model.parameters(), head_first=3)
    SaLSaTrainer(model, args, train_dataset=sentences, optimizers=(optimizer, None)).train()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["head_steps"] == 0
    model = bert()
    optimizer = SaLSaAdam(head_groups(model), head_first=3)
    SaLSaTrainer(model, args, train_dataset=sentences, optimizers=(optimizer, None)).train()
    assert optimizer.param_groups[0]["head_steps"] == 3


@pytest.mark.slow
def test_a_class_of_the_user_s_is_made_here(arguments, bert, sentences):
    for options, steps in (({"head_first": 3}, 3), ({}, 0)):
        trainer = SaLSaTrainer(
            bert(),
            arguments(max_steps=40),
            train_dataset=sentences,
            optimizer_cls_and_kwargs=(SaLSaAdam, options),
        )
        trainer.train()
        assert optimizer_of(trainer).param_groups[0]["head_steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_a_model_that_model_init_makes(arguments, bert, sentences, optim):
    args = arguments(optim=optim, salsa_head_first=3, max_steps=40)
    trainer = SaLSaTrainer(args=args, model_init=lambda: bert(), train_dataset=sentences)
    for _ in range(2):  # each with a model of its own
        trainer.train()
        assert optimizer_of(trainer).param_groups[0]["head_steps"] == 3
    assert [group["head"] for group in optimizer_of(trainer).param_groups] == 2 * [False, True]


class SpoiltBody(SaLSaTrainer):
    """The body's gradients are no numbers, in every update of the phase."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < 3:
            model.bert.embeddings.word_embeddings.weight.grad[0, 0] = torch.nan
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_the_body_has_no_part_in_norm_and_clipping(
    arguments, bert, sentences, optim, max_grad_norm
):
    args = arguments(
        optim=optim,
        salsa_head_first=3,
        max_steps=30,
        logging_steps=1,
        max_grad_norm=max_grad_norm,
        eval_strategy="no",
    )
    norms = []
    for cls in (SaLSaTrainer, SpoiltBody):
        trainer = cls(bert(), args, train_dataset=sentences)
        trainer.add_callback(Stop(4))
        trainer.train()
        norms.append(logged(trainer, "grad_norm"))
        assert optimizer_of(trainer).counters.skipped_steps == 0
    assert norms[0] == norms[1]
    assert torch.tensor(norms).isfinite().all()


class Scaled(SpoiltBody):
    """With a gradient scaler, as fp16 has it, without a device that has fp16."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_interval=1000
        )


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch", "adamw_torch_fused"])
def test_a_gradient_scaler(arguments, bert, sentences, optim):
    # Accelerate would clip the scaled gradients of a scaler that it does not know of.
    args = arguments(optim=optim, salsa_head_first=3, max_steps=40, max_grad_norm=0.0)
    models = []
    for cls in (SaLSaTrainer, Scaled):
        model = bert()
        trainer = cls(model, args, train_dataset=sentences)
        trainer.add_callback(Stop(6))
        trainer.train()
        models.append(model)
    assert trainer.accelerator.scaler.get_scale() == 2.0**10
    assert_same_weights(*models)


@pytest.mark.parametrize("optim", ["salsa_adam", "adamw_torch"])
def test_peft_trains_modules_to_save_first(arguments, bert, sentences, optim):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(bert(), config)
    seen = Weights()
    args = arguments(optim=optim, salsa_head_first=2, max_steps=20)
    trainer = SaLSaTrainer(model, args, train_dataset=sentences, callbacks=[seen])
    start = weights(model)
    trainer.train()
    first = moved(start, seen.seen[1])
    assert [name.rpartition("classifier.")[2] for name in first] == [
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    ]
    assert any("lora_B" in name for name in moved(start, seen.seen[2]))


def test_the_class_of_a_stock_optimizer_is_known(arguments, bert, sentences):
    args = arguments(optim="adamw_torch", salsa_head_first=2, max_steps=20)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(optimizer, HeadFirst)
    assert f"{type(optimizer)}" == "<class 'torch.optim.adamw.HeadFirstAdamW'>"
