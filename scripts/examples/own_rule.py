"""A step-size rule of one's own, by the name `--optim share_adam`, with state that is resumed.

Of the decrease that the slope predicts a small step reaches all, the best one on a parabola half.
So the step size grows while trials reach more than `target` of it, and shrinks where they do not.
"""

from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, set_seed

from hf_salsa import OPTIMIZERS, SaLSaTrainer, SaLSaTrainingArguments
from hf_salsa.optimizers import LineSearchAdam
from hf_salsa.rules import Line, RuleState, SearchRecord, StepSizeRule, moving_average


@dataclass(frozen=True)
class ShareState(RuleState):
    share: float = 1.0  # of the decrease that trials reached, averaged


@dataclass(frozen=True, kw_only=True)
class Share(StepSizeRule[ShareState]):
    state_type = ShareState
    initial_step_size: float = 1e-4
    target: float = 0.7

    def search(self, state: ShareState, line: Line) -> tuple[SearchRecord, ShareState]:
        predicted = state.step_size * line.slope
        if predicted <= line.resolution:  # nothing to measure: the step size stays
            return SearchRecord.of(line, state.failed(), outcome="unresolved"), state.failed()
        trial_loss = line.loss_at(state.step_size)  # one forward pass; NaN counts as -1 below
        share = moving_average(state.share, max(-1.0, (line.loss - trial_loss) / predicted), 0.5)
        found = state.accepted(step_size=state.step_size * 2 ** (share - self.target), share=share)
        return SearchRecord.of(line, found, trial_loss=trial_loss, trials=1), found

    def describe(self) -> str:  # "a step size that ...", in model cards
        return f"grows while trials reach {self.target} of the decrease that the slope predicts"


class ShareAdam(LineSearchAdam):
    rule_type = Share


OPTIMIZERS["share_adam"] = ShareAdam
flags = "--optim share_adam --optim_args target=0.6,direction=momentum --output_dir runs/own_rule"
flags += " --max_steps 100 --save_steps 50 --per_device_train_batch_size 32 --logging_steps 10"
(args,) = HfArgumentParser(SaLSaTrainingArguments).parse_args_into_dataclasses(flags.split())
rows = [(start + step * torch.arange(16)) % 64 for start in range(64) for step in (1, 2, 3)]
data = [{"input_ids": row, "labels": row} for row in rows]
config = GPT2Config(vocab_size=64, n_layer=2, n_head=4, n_embd=64, bos_token_id=0, eos_token_id=0)
set_seed(0)
run, resumed = (SaLSaTrainer(GPT2LMHeadModel(config), args, train_dataset=data) for _ in range(2))
run.train()
resumed.train(resume_from_checkpoint="runs/own_rule/checkpoint-50")
same = all(map(torch.equal, run.model.parameters(), resumed.model.parameters()))
print("resumed half way, the run ends at the same weights, bit for bit:", same)
losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
step_size, searches = run.line_search.step_size, run.line_search.counters.searches
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, step size {step_size:.1e}, {searches} searches")
