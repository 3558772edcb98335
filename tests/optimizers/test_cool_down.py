"""The length of the run, and the step size that falls at its end."""

import copy
from functools import partial

import pytest
import torch
from cases import EVERY, each, every_optimizer, of_plus
from problems import backward, batches, clones, network_loss, parameters, point, same, square, train


@each([case for case in EVERY if not case.rule.looks_back])
def test_the_step_cools_down_and_the_search_does_not(case):
    """The last 4 of 8 steps are applied by 1, 3/4, 2/4, 1/4; the searches see whole steps."""
    params = parameters()
    optimizer = case.make(params, cool_down=0.5, total_steps=8)
    for step, (x, y) in enumerate(batches(8)):
        before = clones(params)
        twin_params, twin = copy.deepcopy((params, optimizer))
        for group in twin.param_groups:
            group["cool_down"] = 0.0
            group["lr"] = group["step_size"]
        for these, one in ((params, optimizer), (twin_params, twin)):
            loss_fn = partial(network_loss, these, x, y)
            one.step(loss_fn, loss=backward(these, loss_fn))
        factor = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25][step]
        assert optimizer.last_search == twin.last_search
        assert optimizer.step_size == optimizer.param_groups[0]["lr"] == factor * twin.step_size
        for start, cooled, whole in zip(before, params, twin_params, strict=True):
            torch.testing.assert_close(cooled, start + factor * (whole - start))


@of_plus
def test_the_step_cools_down_where_the_search_looks_back(case):
    """It measures cooled steps, but the step size that it moves is that of whole ones."""
    params = parameters()
    optimizer = case.make(params, cool_down=0.5, total_steps=8)
    for step, batch in enumerate(batches(8)):
        before = optimizer.param_groups[0]["step_size"]
        train(optimizer, params, [batch])
        factor = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25][step]
        whole = optimizer.last_search.step_size
        assert optimizer.step_size == optimizer.param_groups[0]["lr"] == factor * whole
        assert step < 6 or whole <= before


@every_optimizer
def test_a_run_of_unknown_length_does_not_cool_down(case):
    params = [point(3.0, -4.0)]
    optimizer = case.make(params, cool_down=0.5)
    loss_fn = partial(square, params)
    loss = backward(params, loss_fn)
    before = clones(params)
    with pytest.raises(RuntimeError, match=r"pass total_steps=\.\.\."):
        optimizer.step(loss_fn, loss=loss)
    assert same(before, clones(params))
    optimizer.plan(4)
    optimizer.step(loss_fn, loss=loss)
    assert not same(before, clones(params))
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match=r"^total_steps=.* must be a whole number of steps"):
            optimizer.plan(steps)


@every_optimizer
def test_a_second_run_has_a_plan_of_its_own_and_skipped_steps_count(case):
    params = parameters()
    optimizer = case.make(params, cool_down=1.0, total_steps=2)
    sizes = []
    for step, (x, y) in enumerate(batches(8)):
        if step == 3:
            optimizer.plan(4)
        if step == 5:
            optimizer.plan(5, done=2)  # as after a checkpoint, for one step more
        if step == 6:
            optimizer.note_skipped_step()
            continue
        loss_fn = partial(network_loss, params, x, y)
        optimizer.step(loss_fn, loss=backward(params, loss_fn))
        sizes.append(optimizer.step_size / optimizer.last_search.step_size)
    # The third step was one too many: it keeps the factor of the second.
    expected = [2 / 2, 1 / 2, 1 / 2, 4 / 4, 3 / 4, 3 / 5, 1 / 5]
    assert sizes == pytest.approx(expected)


@of_plus
def test_the_length_of_the_run_must_be_known(case):
    param = point(3.0, -4.0)
    optimizer = case.cls([param])
    loss = backward([param], partial(square, [param]))
    with pytest.raises(RuntimeError, match=r"pass total_steps=.* or cool_down=0"):
        optimizer.step(partial(square, [param]), loss=loss)
