"""One of two processes meets with a fault: both go on alike, or both stop; nobody waits (12).

Out of scope is what stock DDP does not survive either: an exception in training's own forward or
backward pass on one rank. There the others wait in DDP's own all-reduce until the process that
failed has ended.
"""

import itertools
import json
import multiprocessing
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import set_seed

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaTrainer, SaLSaTrainingArguments

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

UPDATES, AT, FAULTY_RANK = 8, 4, 1  # the fault comes at the fourth update
LONGEST = 60  # seconds

# Fault -> what it adds to the counters (failed searches, skipped steps). Those in the loss alone
# cost a search, those in the gradients the step.
GO_ON = {
    "none": (0, 0),
    "all labels masked": (1, 0),
    "loss nan": (1, 0),
    "loss inf": (1, 0),
    "trial nan": (1, 0),
    "gradient nan": (0, 1),
    "gradient inf": (0, 1),
    "loss and gradient nan": (0, 1),
}
STOP = {
    "error in a trial": "ValueError: the faulty batch",
    "ctrl-c in a trial": "KeyboardInterrupt",
}


class Net(nn.Module):
    """A classifier with dropout, and the fault at one of its batches on one rank."""

    def __init__(self, fault, rank):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))
        self.fault = fault if rank == FAULTY_RANK else "none"
        self.calls = itertools.count()  # an iterator: a trial does not put it back
        self.batches = 0  # a trial puts it back: it meets with the fault of its batch again

    def forward(self, input_ids, labels):
        self.batches += 1
        fault = self.fault if self.batches == AT else "none"
        trial = not torch.is_grad_enabled()
        if trial and fault == "error in a trial":
            raise ValueError("the faulty batch")
        if trial and fault == "ctrl-c in a trial":
            raise KeyboardInterrupt
        if self.fault == "derivative" and self.batches == 1:
            # Differs from call to call, and takes a derivative.
            weight = self.layers[0].weight
            (slope,) = torch.autograd.grad(weight.sum() * next(self.calls), weight)
            labels = labels.roll(int(slope[0, 0]))
        if fault == "all labels masked":
            labels = torch.full_like(labels, -100)
        logits = self.layers(input_ids.float() / 64)
        if logits.requires_grad and fault in ("gradient nan", "gradient inf"):
            logits.register_hook(lambda grad: grad * float(fault.split()[1]))
        loss = nn.functional.cross_entropy(logits, labels)
        if fault in ("loss nan", "loss inf"):
            loss = loss + float(fault.split()[1])
        if fault == "loss and gradient nan":
            loss = loss * torch.nan
        if trial and fault == "trial nan":
            loss = loss * torch.nan
        return {"loss": loss, "logits": logits}


def examples(count=64):
    tokens = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0] < 32)} for row in tokens]


def with_trainer(net, fault, rank, folder, sizes):
    """DDP through Trainer."""

    class Noting(SaLSaTrainer):
        def log(self, logs, start_time=None):
            if "loss" in logs:
                sizes.append(logs["learning_rate"])
            super().log(logs, start_time)

    args = SaLSaTrainingArguments(
        str(folder / "out"),
        optim="salsa_adam",  # as in the loop
        max_steps=UPDATES,
        per_device_train_batch_size=4,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=True,
        ddp_backend="gloo",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Noting(net, args, train_dataset=examples())
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    return trainer.line_search


def in_a_loop(net, fault, rank, folder, sizes):
    """Without a wrapper: the loop averages the gradients, the objective the losses."""
    optimizer = SaLSaAdam(net.parameters())
    objective = BatchObjective(net, optimizer)
    data = examples()[rank::2]
    for update in range(UPDATES):
        batch = data[4 * update : 4 * update + 4]
        left_out = rank == FAULTY_RANK and update + 1 == AT and fault == "not differentiated"
        halves = [batch[:2], batch[2:]] if fault.startswith("a part") else [batch]
        for half in halves:
            loss = objective.record(
                lambda ids, labels: net(ids, labels)["loss"],
                torch.stack([example["input_ids"] for example in half]),
                torch.tensor([example["labels"] for example in half]),
            )
            a_part = fault == "a part not differentiated" and net.batches == 2 * AT
            if not left_out and not (a_part and rank == FAULTY_RANK):
                (loss / len(halves)).backward()
        for param in net.parameters():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(optimizer.step_size)
    return optimizer


LOOPS = {"trainer": with_trainer, "loop": in_a_loop}


def process(rank, loop, fault, folder):
    """Train as one of two processes; write down how it went."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # wanted, but not used
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=10 * LONGEST),  # who waits is found by the test
    )
    set_seed(0)
    net = Net(fault, rank)
    set_seed(rank)  # other dropout masks
    result, sizes = {}, []
    try:
        optimizer = LOOPS[loop](net, fault, rank, folder, sizes)
        counters = optimizer.counters
        result["counters"] = (counters.failed_searches, counters.skipped_steps)
        result["searches"], result["trials"] = counters.searches, counters.trials
    except BaseException as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["sizes"] = sizes
    result["weights"] = [param.tolist() for param in net.parameters()]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    # Who failed must have told the other: its end would not. Ctrl-C ends a process at once.
    other = folder / f"rank{1 - rank}.json"
    while not other.exists() and "KeyboardInterrupt" not in result.get("error", ""):
        time.sleep(0.01)
    os._exit(0)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed", "transformers.trainer", "hf_salsa.trainer"]
    )
    return context


@pytest.fixture
def train(processes, tmp_path):
    """Trains in two processes; returns what each wrote and the seconds that it took."""

    def run(loop, fault, longest=LONGEST):
        started = [
            processes.Process(target=process, args=(rank, loop, fault, Path(tmp_path)))
            for rank in range(2)
        ]
        began = time.monotonic()
        for one in started:
            one.start()
        files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
        while any(one.is_alive() for one in started) and time.monotonic() < began + longest:
            for one, file in zip(started, files, strict=True):
                if not one.is_alive() and not file.exists():
                    crash = {"error": f"ended with {one.exitcode}", "crashed": True}
                    file.write_text(json.dumps(crash))
            time.sleep(0.01)
        seconds = time.monotonic() - began
        waiting = [rank for rank, one in enumerate(started) if one.is_alive()]
        for one in started:
            one.kill()
            one.join()
        assert not waiting, f"still waiting after {longest} s: {waiting}"
        results = [json.loads(file.read_text()) for file in files]
        print(f"{loop}, {fault}: {seconds:.1f} s, {[r.get('error', 'went on') for r in results]}")
        return results

    return run


def assert_went_on_together(results):
    first, second = results
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert len(first["sizes"]) == UPDATES
    for name in ("sizes", "weights", "counters", "searches", "trials"):
        assert first[name] == second[name]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", GO_ON)
def test_go_on_together(train, loop, fault):
    results = train(loop, fault)
    assert_went_on_together(results)
    assert tuple(results[0]["counters"]) == GO_ON[fault]
    assert torch.tensor(results[0]["sizes"]).isfinite().all()
    assert all(torch.tensor(values).isfinite().all() for values in results[0]["weights"])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fault", STOP)
def test_stop_together(train, loop, fault):
    other, faulty = train(loop, fault)
    assert faulty["error"].startswith(STOP[fault])
    assert "error" in other
    if fault == "error in a trial":
        assert other["error"].startswith("RuntimeError: Another process failed while it evaluated")
        assert other["weights"] == faulty["weights"]  # of before the search
    assert len(other["sizes"]) == len(faulty["sizes"]) == AT - 1


def test_one_of_two_micro_batches_that_is_not_differentiated(train):
    """Recorded by both ranks, differentiated by one: it counts there alone."""
    assert_went_on_together(train("loop", "a part not differentiated"))


def assert_alike(results):
    """Both go on or both raise; none is aborted by gloo over collectives that do not match."""
    assert not any("crashed" in result for result in results)
    if any("error" in result for result in results):
        assert all("error" in result for result in results)
    else:
        assert_went_on_together(results)


def test_the_only_micro_batch_that_is_not_differentiated(train):
    assert_alike(train("loop", "not differentiated", longest=15))


def test_a_derivative_within_the_loss_of_one_rank_that_does_not_repeat(train):
    assert_alike(train("loop", "derivative", longest=15))
