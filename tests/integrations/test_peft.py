"""PEFT: adapters are searched, frozen weights are not touched."""

import pytest
import torch

from hf_salsa import SaLSaTrainer


def test_peft_searches_adapters_only(arguments, bert, sentences):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(bert(), config)
    frozen = {
        n: (p._version, p.clone()) for n, p in model.named_parameters() if not p.requires_grad
    }
    trainer = SaLSaTrainer(model, arguments(), train_dataset=sentences)
    trainer.train()
    optimizer = trainer.line_search
    assert optimizer.counters.searches == 4  # of 6 steps
    assert not optimizer.param_groups[0]["all_trained"]  # the second matrix of each adapter is 0
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    for name, param in model.named_parameters():
        if name in frozen:
            version, value = frozen[name]
            assert param._version == version
            assert torch.equal(param, value)
