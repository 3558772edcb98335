"""SaLSaTrainingArguments: TrainingArguments that know the line-search optimizers by name."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .search_arguments import SearchArguments


@dataclass
class SaLSaArgumentsMixin(SearchArguments):
    """Adds the line-search optimizers to any subclass of `TrainingArguments`.

    Put it first: `class MyConfig(SaLSaArgumentsMixin, SFTConfig)`, decorated with `@dataclass`.
    `SaLSaTrainingArguments` documents the fields.
    """


@dataclass
class SaLSaTrainingArguments(SaLSaArgumentsMixin, TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` whose default optimizer needs no learning rate.

    `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay` keep their meaning. With a line
    search `learning_rate`, `lr_scheduler_type` and `warmup_steps` have none; setting them warns.
    A field left at `None` takes the optimizer's own default (`SaLSaAdamPlus`, `SaLSaAdam` and
    their siblings document them). An optimizer that has no such setting refuses it.

    Args:
        optim: `"salsa_adam_plus"` (default), `"salsa_sgd_plus"`; the methods of the paper,
            `"salsa_adam"`, `"salsa_sgd"`, `"sls_adam"`, `"sls_sgd"`; or any name that transformers
            knows, with which training is `Trainer`'s own.
        salsa_head_first: Updates at the start, at least 0 and at most a tenth of the run, that
            train the new head of a trained body alone, by a line search of its own; with
            the optimizers of transformers too. Moments and weight decay, of head and body, begin
            after them, a learning-rate schedule with the first of them. Default: 10 with the plus
            optimizers (fewer in runs of less than 100 updates), else off (0).
        salsa_head: The new head: names of parameters, or how they begin. Default: found by its
            weights (`hf_salsa.head.find_head`).
        salsa_go_back: Go back to the weights of the lowest averaged loss, at half the step size,
            when the loss has left the range in which the run started
            (`hf_salsa.good_weights.GoodWeights`). For the plus optimizers; off by default, since it
            keeps a copy of weights and moments.
        salsa_c: c of the Armijo criterion, in (0, 1). Of the paper's line searches, as are
            `salsa_beta3`, `salsa_backtrack_factor` and `salsa_require_decrease`.
        salsa_beta3: Smoothing of both sides of the criterion, in [0, 1).
        salsa_steps_to_double: Updates in which the step size may double, at least 1.
        salsa_backtrack_factor: By what a rejected step size shrinks, in (0, 1).
        salsa_initial_step_size: Step size at which the first search starts, above 0. Without effect
            where the run starts with a warm-up (`SaLSaAdamPlus`), as `salsa_direction` there.
        salsa_max_search_interval: Most updates from one search to the next, at least 1.
        salsa_direction: `"gradient"` or `"momentum"`, along which step sizes are tested.
        salsa_require_decrease: Accept no step on which the mini-batch's loss rises.
        salsa_cool_down: Share of the run at its end in which the step size falls linearly to 0.
            Default: 0.6 with the plus optimizers, 0 with the paper's.

    Raises:
        ValueError: An unknown optimizer, a value out of range, or one that the optimizer does not
            have.

    Defaults that differ from `TrainingArguments`:
        - `optim`: `"salsa_adam_plus"` instead of `"adamw_torch_fused"`.
        - `max_grad_norm`: 0 (no clipping) instead of 1 with the paper's line searches. The plus
          ones keep the 1, without which training from scratch may fail.
    """


@dataclass
class SaLSaSeq2SeqTrainingArguments(  # type: ignore[misc]
    SaLSaArgumentsMixin, Seq2SeqTrainingArguments
):
    """`SaLSaTrainingArguments` with the fields of `Seq2SeqTrainingArguments`."""
