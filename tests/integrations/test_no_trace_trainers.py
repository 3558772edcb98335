"""Nobody can tell that a search took place: what trainers count, log, keep and draw (7)."""

from functools import cache

import pytest
from datasets import Dataset
from ecosystem import sentences
from kinds import OPTIMIZERS, START, differing, every_optimizer, leaves, seed, streams, take_step
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from trainer_kinds import CLOCKS, KINDS, Classifier, Kind, examples
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from hf_salsa import SaLSaTrainer, SaLSaTrainerMixin, SaLSaTrainingArguments, traces

pytestmark = pytest.mark.slow

STEPS = 5
# What a trainer of ours has besides.
OURS = {"_objective", "_run", "_head", "_watch", "_loaded"}


def optimizer_of(case, model, step_sizes, replay):
    """Return an optimizer that notes its step sizes, or one that takes noted ones."""

    class Replaying(case.cls):
        def step(self, closure=None):
            take_step(self, next(prescribed))

    prescribed = iter(step_sizes)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = (Replaying if replay else case.cls)(params, **case.settings, **START)
    if not replay:
        optimizer.register_step_post_hook(lambda own, *_: step_sizes.append(own.step_size))
    return optimizer


@pytest.fixture
def make(kind, arguments):
    """Makes the trainer of a kind: searching or stock, with the mixin before or behind the kind."""

    def make(searching, optimizers, bases=(SaLSaTrainerMixin, kind)):
        stock_attributes()  # before the run: it draws
        seed()
        model = Classifier()
        args = arguments(
            SaLSaTrainingArguments if searching else TrainingArguments,
            **{"max_steps": STEPS, "logging_steps": 1, "max_grad_norm": 0.0, **kind.options},
        )
        made = {name: make() for name, make in kind.makes.items()}
        trainer = (type("Searching", bases, {}) if searching else kind)(
            model, args, train_dataset=examples(), optimizers=optimizers(model), **made
        )
        trainer.set_up()
        return trainer

    return make


@cache
def stock_attributes():
    return set(vars(Trainer(nn.Linear(1, 1), TrainingArguments(use_cpu=True, report_to="none"))))


def run(trainer):
    """Train; return the forward passes, and all that is left."""
    passes = []
    trainer.model.register_forward_pre_hook(lambda *_: passes.append(1))
    seed()
    trainer.train()
    stock = {*stock_attributes(), *OURS}
    own = {k: v for k, v in vars(trainer).items() if k not in stock}
    plain = {k: v for k, v in vars(trainer).items() if isinstance(v, (int, float))}
    history = [
        {name: value for name, value in entry.items() if not any(c in name for c in CLOCKS)}
        for entry in trainer.state.log_history
    ]
    heard = trainer.seen() if isinstance(trainer, Kind) else None
    left = [trainer.model, own, plain, history, vars(trainer.control), heard]
    return len(passes), leaves([*left, trainer.state.global_step]) | streams()


def traces_of(case, make):
    """Return at which paths a run that searches differs from one that takes the same steps.

    Args:
        case: The optimizer.
        make: Whether it searches, a function model -> optimizers -> a trainer of either.
    """
    sizes = []
    trainer = make(True, lambda model: (optimizer_of(case, model, sizes, replay=False), None))
    passes, left = run(trainer)
    counters = trainer.line_search.counters
    assert counters.trials >= counters.searches > 2
    assert len(sizes) == STEPS

    def replay(model):
        optimizer = optimizer_of(case, model, sizes, replay=True)
        return optimizer, LambdaLR(optimizer, lambda _: 1.0)

    again, left_again = run(make(False, replay))
    assert again in (STEPS, 2 * STEPS, 4 * STEPS)  # and no evaluation
    assert passes > again
    return differing(left, left_again)


each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
replay_is_exact = pytest.mark.filterwarnings("error:Evaluating the objective again")


@every_optimizer
@each_kind
@replay_is_exact
def test_no_trace(make, case):
    assert traces_of(case, make) == []


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if "training_step" not in vars(kind)]
)
@replay_is_exact
def test_no_trace_of_a_subclass_of_ours(make, kind):
    def subclass(searching, optimizers):
        return make(searching, optimizers, (kind, SaLSaTrainer))

    assert traces_of(OPTIMIZERS["sls_sgd"], subclass) == []


@pytest.mark.parametrize(
    "kind", [KINDS[name] for name in ("Counts", "OwnGenerators", "Metrics", "OneMeter")]
)
@pytest.mark.filterwarnings("ignore:Evaluating the objective again")
def test_attributes_would_show_it(make, kind, monkeypatch):
    monkeypatch.setattr(traces, "TRACES", (traces.random_streams,))
    assert traces_of(OPTIMIZERS["sls_sgd"], make) != []


@pytest.mark.parametrize("kind", [KINDS["Plain"]])
@pytest.mark.filterwarnings("ignore:Evaluating the objective again")
def test_streams_would_show_it(make, kind, monkeypatch):
    monkeypatch.setattr(traces, "TRACES", (traces.attributes,))
    assert "['torch']" in traces_of(OPTIMIZERS["sls_sgd"], make)


@pytest.mark.parametrize("kind", [KINDS["Plain"]])
def test_in_trial_tells(make, kind):
    told = []

    class Telling(kind):
        def compute_loss(self, *args, **kwargs):
            told.append(self.in_trial)
            return super().compute_loss(*args, **kwargs)

    trainer = make(
        True,
        lambda model: (OPTIMIZERS["sls_sgd"].make(model.parameters()), None),
        (SaLSaTrainerMixin, Telling),
    )
    trainer.train()
    assert told.count(False) == STEPS
    assert told.count(True) == trainer.line_search.counters.trials >= STEPS
    assert not trainer.in_trial


# --- trainers of other libraries ----------------------------------------------------------------


# Clocks; hooks, of which TRL's DPO adds one with every pass, training's too; the loaders that were
# not collected yet.
NOT_OURS = ("start_time", "._forward_hooks", "_dataloader_references")


def language_model(folders):
    return GPT2LMHeadModel.from_pretrained(folders["gpt2"])


def sft(folders, tokenizer):
    trl = pytest.importorskip("trl")
    data = Dataset.from_dict({"text": sentences(0)})
    return trl.SFTTrainer, trl.SFTConfig, language_model(folders), data, tokenizer


def dpo(folders, tokenizer):
    trl = pytest.importorskip("trl")
    columns = {name: sentences(i) for i, name in enumerate(("prompt", "chosen", "rejected"))}
    data = Dataset.from_dict(columns)
    return trl.DPOTrainer, trl.DPOConfig, language_model(folders), data, tokenizer


def kto(folders, tokenizer):
    trl = pytest.importorskip("trl")
    labels = [i % 3 > 0 for i in range(32)]
    data = {"prompt": sentences(0), "completion": sentences(1), "label": labels}
    model = language_model(folders)
    return trl.KTOTrainer, trl.KTOConfig, model, Dataset.from_dict(data), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("library", [sft, dpo, kto])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@replay_is_exact
def test_no_trace_in_trl(arguments, folders, tokenizer, library):
    def make(searching, optimizers):
        stock_attributes()
        seed()
        trainer, args, model, data, words = library(folders, tokenizer)
        cls = type("Searching", (SaLSaTrainerMixin, trainer), {}) if searching else trainer
        args = arguments(args, max_steps=STEPS, logging_steps=1, max_grad_norm=0.0)
        own = {"args": args, "processing_class": words, "train_dataset": data}
        return cls(model, optimizers=optimizers(model), **own)

    for case in OPTIMIZERS.values():
        found = traces_of(case, make)
        assert [path for path in found if not any(n in path for n in NOT_OURS)] == []


@pytest.mark.slow
@replay_is_exact
def test_no_trace_in_sentence_transformers(arguments, folders):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses, modules

    def make(searching, optimizers):
        stock_attributes()
        seed()
        parts = [modules.Transformer(folders["bert"]), modules.Pooling(16)]
        model = library.SentenceTransformer(modules=parts, device="cpu")
        trainer = library.SentenceTransformerTrainer
        cls = type("Searching", (SaLSaTrainerMixin, trainer), {}) if searching else trainer
        args = arguments(
            library.SentenceTransformerTrainingArguments,
            **{"max_steps": STEPS, "logging_steps": 1, "max_grad_norm": 0.0},
        )
        data = Dataset.from_dict({"anchor": sentences(0), "positive": sentences(1)})
        loss = losses.MultipleNegativesRankingLoss(model)
        own = {"args": args, "train_dataset": data, "loss": loss}
        return cls(model, optimizers=optimizers(model), **own)

    for case in OPTIMIZERS.values():
        found = traces_of(case, make)
        assert [path for path in found if not any(n in path for n in NOT_OURS)] == []
