"""A change of the loss's scale in mid-run: the rule goes on at the new one (line 11)."""

import pytest
import torch
from accelerate import Accelerator
from own_rules import OneTrialAdam, OneTrialSGD
from problems import Recorded, same, search_every, snapshot
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaAdamPlus, SaLSaSGD, SaLSaSGDPlus
from hf_salsa.optimizers.scale import NOT_A_SUM, NOT_KNOWN, SUM, Parts

CHANGE = 6
SGD = {"momentum": 0.0}
# Without a memory in their moments, which nobody rescales, Adam's steps have no scale at all.
ADAM = {"betas": (0.0, 0.0), "eps": 1e-30}
PLUS = {"cool_down": 0.0}
OPTIMIZERS = [
    (SaLSaSGD, SGD),
    (SaLSaSGD, {"momentum": 0.9}),
    (SaLSaAdam, ADAM),
    (SaLSaSGDPlus, PLUS),
    (SaLSaAdamPlus, ADAM | PLUS),
    (OneTrialSGD, SGD),
    (OneTrialAdam, ADAM),
]
every_rule = pytest.mark.parametrize(
    ("cls", "settings"), OPTIMIZERS, ids=[f"{c.__name__} {s}" for c, s in OPTIMIZERS]
)


class Run:
    """Steps on mini-batches of 8 examples, each cut into so many micro-batches."""

    def __init__(self, cls, settings, divided=lambda number: 1, scaler=None):
        torch.manual_seed(0)
        self.x = torch.randn(20, 8, 6, dtype=torch.float64)
        self.y = torch.randn(20, 8, 1, dtype=torch.float64)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.net = net.double()
        self.optimizer = cls(net.parameters(), **settings)
        self.objective = BatchObjective(net, self.optimizer, scaler=scaler)
        self.divided, self.scaler = divided, scaler
        self.step_sizes = []

    def loss(self, a, b):
        return (self.net(a) - b).square().mean()

    def step(self, number):
        k = len(self.step_sizes)
        for a, b in zip(self.x[k].chunk(number), self.y[k].chunk(number), strict=True):
            loss = self.objective.record(self.loss, a, b) / self.divided(number)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.step_sizes.append(self.optimizer.step_size)

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    @property
    def of_rule(self):
        return vars(self.optimizer._read()[0])


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.net.parameters()])


@pytest.mark.parametrize("number", [2, 1])
@every_rule
def test_a_run_goes_on_as_one_that_always_had_this_scale(cls, settings, number):
    """From 4 micro-batches to fewer: step, state and weights are those of a run of fewer."""
    share = number / 4 if cls.degree else 1  # of the step size, for the same step
    run = Run(cls, {**settings, "initial_step_size": 0.01 * share})
    other = Run(cls, {**settings, "initial_step_size": 0.01})
    for k in range(12):
        run.step(4 if k < CHANGE else number)
        other.step(number)
        assert run.step_sizes[k] == pytest.approx(
            other.step_sizes[k] * (share if k < CHANGE else 1), rel=1e-9
        )
    assert run.of_rule == pytest.approx(other.of_rule, rel=1e-6)
    torch.testing.assert_close(weights(run), weights(other), rtol=1e-6, atol=1e-9)
    assert run.optimizer.counters.failed_searches == 0


@every_rule
def test_one_update_of_fewer_micro_batches(cls, settings):
    """The last of an epoch: before and after it the scale is the old one."""
    run, other = (Run(cls, {**settings, "initial_step_size": 0.01}) for _ in range(2))
    for k in range(12):
        run.step(2 if k == CHANGE else 4)
        other.step(4)
    longer = 2 if cls.degree else 1
    assert run.step_sizes[CHANGE] == pytest.approx(longer * other.step_sizes[CHANGE], rel=1e-9)
    for k in {*range(12)} - {CHANGE}:
        assert run.step_sizes[k] == pytest.approx(other.step_sizes[k], rel=1e-9)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_without_a_search_is_carried_over_too(scaled):
    """A gradient scaler's factor is none of the loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    run = Run(SaLSaSGD, {}, scaler=scaler)
    run.step(4)
    search_every(run.optimizer, 100)
    for number in (4, 2, 1, 4):
        run.step(number)
    first = run.step_sizes[0]
    assert run.step_sizes == pytest.approx([first, first, 2 * first, 4 * first, first])
    assert run.optimizer.counters.searches == 1
    assert run.group["loss_factor"] == 1.0


@pytest.mark.parametrize(
    "divided", [lambda number: number, lambda number: 37.0 + number], ids=["mean", "sum of tokens"]
)
@every_rule
def test_where_the_factor_changes_too_nothing_is_rescaled(cls, settings, divided):
    run = Run(cls, {**settings, "initial_step_size": 0.01}, divided)
    run.step(4)
    search_every(run.optimizer, 100)
    before = run.of_rule
    run.step(2)
    assert run.of_rule == {**before, "steps_since_search": 1}


def test_an_update_without_a_change_leaves_the_state_alone():
    """The factors are not even read."""
    run = Run(SaLSaSGD, {})
    run.step(4)
    search_every(run.optimizer, 100)
    run.objective._sum_of_factors = None
    run.step(4)
    assert run.optimizer.counters.searches == 1
    with pytest.raises(TypeError):
        run.step(2)


def test_a_closure_says_nothing_of_the_scale():
    run = Run(SaLSaSGD, {})
    run.step(4)
    loss = run.objective.record(run.loss, run.x[0], run.y[0])
    loss.backward()
    run.optimizer.step(lambda: run.loss(run.x[0], run.y[0]), loss=loss.detach())
    assert run.group["micro_batches"] == 4


def test_a_resumed_run_has_another_accumulation():
    run = Run(SaLSaSGD, {})
    run.step(4)
    search_every(run.optimizer, 100)
    resumed = Run(SaLSaSGD, {})
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    resumed.step(1)
    assert resumed.step_sizes[-1] == pytest.approx(4 * run.step_sizes[-1])
    assert resumed.optimizer.counters.searches == 1


@every_rule
def test_checkpoints_from_before_load(cls, settings):
    """They know no scale: the first search learns it, and nothing is rescaled by that."""
    run, other = (Run(cls, {**settings, "initial_step_size": 0.01}) for _ in range(2))
    run.step(4)
    state = run.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["micro_batches"], group["loss_factor"]
    other.optimizer.load_state_dict(state)
    assert (other.group["micro_batches"], other.group["loss_factor"]) == (0.0, NOT_KNOWN)
    search_every(other.optimizer, 2)
    other.step(2)
    assert other.step_sizes[-1] == run.step_sizes[-1]
    other.step(2)
    assert other.optimizer.counters.searches == 2
    assert (other.group["micro_batches"], other.group["loss_factor"]) == (2.0, 1.0)


def test_accelerate_loop(sentences, bert):
    """Factors of 1/4, and 1/4 three times in the last update of an epoch."""
    runs = []
    for accumulation in (4, 1):
        model = bert(dropout=0.0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        loader = torch.utils.data.DataLoader(sentences[:30], batch_size=8 // accumulation)
        if accumulation == 1:  # what the other run has in each update
            loader = torch.utils.data.DataLoader(sentences[:30], batch_size=8)
        optimizer = SaLSaSGD(model.parameters(), initial_step_size=0.1)
        model, prepared, loader = accelerator.prepare(model, optimizer, loader)
        objective = BatchObjective(model, prepared)
        sizes = []
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = objective.record(lambda batch, model=model: model(**batch).loss, batch)
                    accelerator.backward(loss)
                    prepared.step()
                    prepared.zero_grad()
                if accelerator.sync_gradients:
                    sizes.append(optimizer.step_size)
        runs.append(sizes)
    of_mean = [1, 1, 1, 4 / 3] * 2
    assert runs[0] == pytest.approx(
        [size * share for size, share in zip(runs[1], of_mean, strict=True)], rel=1e-4
    )


@pytest.mark.parametrize(
    ("now", "before", "growth"),
    [
        (Parts(3, 0.25), Parts(4, 0.25), 0.75),
        (Parts(8, 1 / 8), Parts(4, 1 / 4), 1.0),
        (Parts(8, SUM), Parts(2, SUM), 4.0),
        (Parts(8, SUM), Parts(2, NOT_KNOWN), 4.0),
        (Parts(8, SUM), Parts(0, NOT_KNOWN), 1.0),
        (Parts(8, NOT_KNOWN), Parts(2, NOT_KNOWN), 1.0),
        (Parts(8, NOT_A_SUM), Parts(2, NOT_A_SUM), 1.0),
        (Parts(8, SUM), Parts(2, 1.0), 1.0),
    ],
)
def test_what_a_change_of_numbers_says(now, before, growth):
    assert now.growth_since(before) == growth


@pytest.mark.parametrize(
    ("known", "number", "due"),
    [((0, NOT_KNOWN), 4, False), ((1, NOT_KNOWN), 4, True), ((4, NOT_KNOWN), 4, False)]
    + [((1, SUM), 4, False), ((1, NOT_A_SUM), 4, False), ((1, 0.5), 4, False)],
)
def test_what_only_a_search_can_tell_is_searched(known, number, due):
    run = Run(SaLSaSGD, {})
    run.step(1)
    search_every(run.optimizer, 100)
    run.group["micro_batches"], run.group["loss_factor"] = known
    before = snapshot(run.optimizer)
    run.optimizer.expect(number)
    assert run.optimizer.search_due == due
    assert due or same(snapshot(run.optimizer), before)


@pytest.mark.parametrize(
    ("loss", "factor"), [(1.0, SUM), (0.5, NOT_A_SUM), (0.7, NOT_A_SUM)], ids=str
)
@pytest.mark.parametrize("lost", [None, 0.0, float("nan")])
def test_what_doubling_shows(loss, factor, lost):
    """A loss of 0, or none, shows nothing: the next search asks again."""

    class Doubling(Recorded):
        doubling = 1.0

        def try_with_gradients(self):
            return False

        def parts(self, before, agree):
            return Parts(4.0, before.factor)

        def doubled(self):
            return self

        def __enter__(self):
            self.doubling = loss

        def __exit__(self, *exception):
            self.doubling = 1.0

    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = SaLSaSGD([param])
    objective = Doubling(None)
    for spoiled in (lost is not None, False):
        param.grad = 2 * param.detach()
        value = param.square().sum().detach()
        objective.loss = value * lost if spoiled else value
        if lost == 0 and spoiled:
            objective.closure = lambda: torch.zeros((), dtype=torch.float64)
        else:
            objective.closure = lambda: param.square().sum().detach() * objective.doubling
        optimizer.attach(objective)
        optimizer.step()
        known = optimizer.param_groups[0]["loss_factor"]
        assert known == (NOT_KNOWN if spoiled else factor)
