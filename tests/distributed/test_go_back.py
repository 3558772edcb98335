"""Going back to good weights in several processes: all at once, and resumed too (12, 15)."""

import pytest
from launching import configuration, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BROKEN_AT, STEPS = 16, 40
FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["GPT2Block"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def given(batch, **more):
    arguments = {"salsa_go_back": True, **more.pop("arguments", {})}
    run = {**configuration("gpt2", "salsa_adam_plus", batch), "steps": STEPS}
    return {**run, "lengthen": BROKEN_AT, "arguments": arguments, **more}


def test_processes_go_back_together_and_resumed_ones_too(tmp_path):
    """DDP and FSDP2, of which each process keeps its shards."""
    sharded = {"fsdp": True, "fsdp_config": FSDP2}
    runs = [given(4, resume=12), given(4, resume=12, arguments=sharded)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    ((one,),) = launch(tmp_path / "one", 1, [given(8)])
    two = launch(tmp_path / "two", 2, runs)
    assert one["returns"] >= 1
    for ddp_or_fsdp2 in zip(*two, strict=True):
        for result in ddp_or_fsdp2:
            for run in (result, result["resumed"]):
                assert run["returns"] == one["returns"]
                # Up to there; what broken weights do, differs with every rounding.
                assert run["step_sizes"][:BROKEN_AT] == pytest.approx(
                    one["step_sizes"][:BROKEN_AT], rel=1e-3
                )
                assert max(run["losses"][-5:]) < 5
            assert result["resumed"]["weights"] == result["weights"]
            assert result["resumed"]["losses"] == result["losses"]
        first, second = ddp_or_fsdp2
        assert first["weights"] == second["weights"]
