"""What a search reads, writes and keeps, counted: no clock says the same twice."""

from collections import Counter
from functools import partial

import pytest
import torch
from cases import both_directions
from look_back import OPTIONS, LookBack, LookBackAdam, both_kinds
from problems import Recorded, backward
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_salsa import SLSSGD, BatchObjective, SLSAdam
from hf_salsa.optimizers import evaluation, trial_points
from hf_salsa.optimizers.head_first import head_first_class
from hf_salsa.optimizers.tensors import numbers
from hf_salsa.rules import SearchRecord


class Traffic(TorchDispatchMode):
    """Counts how often each kind of tensor is read and written, in passes over all of them.

    Args:
        kinds: Name -> tensors; a view of one counts as so much of it.
    """

    def __init__(self, **kinds: list[Tensor]) -> None:
        super().__init__()
        self._kind_of = {
            tensor.untyped_storage().data_ptr(): kind
            for kind, tensors in kinds.items()
            for tensor in tensors
        }
        self._sizes = {kind: sum(t.numel() for t in tensors) for kind, tensors in kinds.items()}
        self._elements: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        seen = {}
        arguments = func._schema.arguments
        if self.paused or func.is_view or func is torch.ops.aten.empty_like.default:
            arguments = ()
        for number, argument in enumerate(arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    place = tensor.untyped_storage().data_ptr(), tensor.data_ptr(), tensor.numel()
                    seen[place] = written or seen.get(place, False)
        for (storage, _, size), written in seen.items():
            if storage in self._kind_of:
                how = "written" if written else "read"
                self._elements[f"{self._kind_of[storage]} {how}"] += size
        return func(*args, **kwargs)

    @property
    def passes(self):
        """Kind and "read" or "written" -> passes; what an operator may change is written."""
        sizes = self._sizes
        return {key: n / sizes[key.split()[0]] for key, n in self._elements.items()}


def large():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n)) for n in (3000, 10, 2000)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Parameters are many chunks, so that what is as large as one counts for little."""
    monkeypatch.setattr(trial_points, "_SMALLEST_CHUNK", 256)


def norm(params):
    """A loss whose evaluation takes no memory."""
    return sum(torch.dot(p, p) for p in params)


def looking_back_only(cls):
    """Make the optimizer with a rule that evaluates the loss at w_k - u, and later nowhere else."""

    class Only(LookBack):
        wants_agreement = True

        def search(self, state, line):
            if not state.step_size_known:
                return super().search(state, line)
            loss, slope = line.look_back()
            searched = state.accepted(loss_before=loss, slope_before=slope)
            return SearchRecord.of(line, searched, trial_loss=loss, trials=1), searched

    own = type("Own", (cls.__base__,), {"rule_type": Only})
    return lambda params, **settings: own(params, **{**OPTIONS[cls], **settings})


def step_of(optimizer, params, gradient_norm=1.0):
    """Prepare a step; return what takes it, with what it is given watched by `traffic`."""
    kept = [state["previous"] for state in optimizer.state.values() if "previous" in state]
    loss = backward(params, partial(norm, params))
    traffic = Traffic(weights=params, gradients=[p.grad for p in params], previous=kept)

    def closure():
        traffic.paused = True
        try:
            return norm(params)
        finally:
            traffic.paused = False

    optimizer.attach(Recorded(closure, loss, gradient_norm=gradient_norm))
    return optimizer.step, traffic


def passes_of(optimizer, params, **known):
    take, traffic = step_of(optimizer, params, **known)
    with traffic:
        take()
    return traffic.passes


def peak(run):
    """How many numbers (of 4 bytes) are there at the peak, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    present = largest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            present += event.nbytes()
            largest = max(largest, present)
    return largest / 4


@both_kinds
@both_directions
def test_a_search_that_only_looks_back(cls, direction, small_chunks):
    """Weights and w_{k-1} change places; what comes back stays where the next search looks."""
    params = large()
    optimizer = looking_back_only(cls)(params, direction=direction, weight_decay=0.0)
    for _ in range(2):
        passes_of(optimizer, params)
    found = passes_of(optimizer, params)
    assert (optimizer.last_search.trials, optimizer.counters.searches) == (1, 3)
    assert found["weights written"] == 3  # w_{k-1}, w_k, w_{k+1}
    assert found["previous written"] == 1
    assert found["weights read"] == 2  # <g, u>, and the exchange
    assert found["previous read"] == 3  # the same, and the way back


@both_kinds
def test_looking_back_takes_no_memory(cls, small_chunks):
    """One copy of the weights, w_{k-1}, is in the state; the first search needs no other one."""
    params = large()
    optimizer = looking_back_only(cls)(params)
    optimizer.step()
    size = sum(p.numel() for p in params)
    for searches in (1, 2, 3):
        take, _ = step_of(optimizer, params)
        assert peak(take) < size / 2
        assert optimizer.counters.searches == searches
    assert optimizer._backups == {}


@pytest.mark.parametrize("cls", [SLSAdam, SLSSGD])
def test_a_search_writes_a_trial_point_once_and_comes_back_once(cls, small_chunks):
    params = large()
    optimizer = cls(params, initial_step_size=1e-3)
    optimizer.step()
    size = sum(p.numel() for p in params)
    for searches in (1, 2):
        optimizer._backups = {}
        take, traffic = step_of(optimizer, params)
        assert size <= peak(take) < 1.5 * size
        assert optimizer.counters.searches == searches
    take, traffic = step_of(optimizer, params)
    with traffic:
        take()
    assert optimizer.last_search.trials == 1
    assert traffic.passes["weights written"] == 3
    assert traffic.passes["weights read"] == 1


HEAD_FIRST = {
    "Adam": SLSAdam,
    "SGD": SLSSGD,
    "looking back": looking_back_only(LookBackAdam),
    "stock": partial(head_first_class(torch.optim.AdamW), lr=1e-3),
}


@pytest.mark.parametrize("make", HEAD_FIRST.values(), ids=HEAD_FIRST)
def test_a_search_for_the_head_alone_copies_the_head_and_not_the_body(make, small_chunks):
    """One copy of what is trained."""
    params = large()
    groups = [{"params": params[:1]}, {"params": params[1:], "head": True}]
    optimizer = make(groups, head_first=3)
    step_of(optimizer, params)[0]()  # makes the state
    size = sum(p.numel() for p in params[1:])
    for searches in (2, 3):
        take, _ = step_of(optimizer, params)
        kept = [p.grad for p in params]  # else what is dropped would make room for a copy
        assert size <= peak(take) < 1.5 * size
        assert [p.grad is None for p in params] == [True, False, False]
        assert optimizer.counters.searches == searches
        del kept
    assert not optimizer.head_alone


@pytest.mark.parametrize("clipped", [True, False])
def test_a_step_without_a_search_reads_clipped_gradients_once(clipped):
    """Their norm shows whether they are finite; without it one pass more does."""
    params = large()
    model = nn.ParameterList(params)
    optimizer = SLSAdam(model.parameters(), initial_step_size=1e-3)
    objective = BatchObjective(model, optimizer)
    for searches in (True, False):
        optimizer.param_groups[0]["search_interval"] = 1 if searches else 10
        objective.record(lambda: norm(params)).backward()
        if clipped:
            objective.clip_grad_norm_(1.0)
        traffic = Traffic(weights=params, gradients=[p.grad for p in params])
        with traffic:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.counters.searches == 1
    assert traffic.passes["weights written"] == 1
    assert "weights read" not in traffic.passes
    reads = traffic.passes.get("gradients read", 0) + traffic.passes.get("gradients written", 0)
    assert reads == (1 if clipped else 2)


def test_looking_back_waits_for_an_accelerator_once(monkeypatch):
    """Loss and <g, u> are read together."""
    params = large()
    optimizer = looking_back_only(LookBackAdam)(params)
    for _ in range(2):
        passes_of(optimizer, params)
    read, reading = [], evaluation.numbers
    monkeypatch.setattr(
        evaluation, "numbers", lambda *values: read.append(values) or reading(*values)
    )
    passes_of(optimizer, params)
    ((loss, product),) = read
    assert isinstance(loss, Tensor)
    assert isinstance(product, Tensor)


def test_numbers_on_one_device_are_read_at_once():
    calls = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Reads():
        read = numbers(torch.tensor(0.1), torch.tensor([0.2], dtype=torch.float64))
    assert read == [float(torch.tensor(0.1)), 0.2]
    assert torch.ops.aten._local_scalar_dense.default not in calls
    assert numbers(1.5, torch.tensor(2.5)) == [1.5, 2.5]
