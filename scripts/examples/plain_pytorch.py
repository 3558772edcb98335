"""A plain PyTorch loop without a learning rate: three lines differ from AdamW's, marked (1) to (3).

    python scripts/examples/plain_pytorch.py

A small network with dropout learns scikit-learn's handwritten digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdamPlus

torch.manual_seed(0)
images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
shuffled = torch.randperm(len(images))
train, held_out = shuffled[:1500], shuffled[1500:]
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))

# optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = SaLSaAdamPlus(model.parameters(), total_steps=5 * 24)  # (1)
# scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * 24)
objective = BatchObjective(model, optimizer)  # (2)


# It is called again at other weights, so it takes its data as arguments.
def loss_fn(batch):
    return nn.functional.cross_entropy(model(images[batch]), digits[batch])


def evaluate():
    model.eval()
    with torch.no_grad():
        logits = model(images[held_out])
    model.train()
    accuracy = (logits.argmax(1) == digits[held_out]).float().mean().item()
    return nn.functional.cross_entropy(logits, digits[held_out]).item(), accuracy


before, _ = evaluate()
for epoch in range(5):
    for batch in train[torch.randperm(len(train))].split(64):
        loss = objective.record(loss_fn, batch)  # (3), instead of loss_fn(batch)
        loss.backward()
        objective.clip_grad_norm_(1.0)  # torch's, and the search knows
        optimizer.step()
        optimizer.zero_grad()
    after, accuracy = evaluate()
    print(f"epoch {epoch + 1}: loss {after:.3f}, accuracy {accuracy:.1%}")

searches, trials = optimizer.counters.searches, optimizer.counters.trials
print(f"held out: accuracy {accuracy:.1%}; the searches took {trials} extra forward passes")
print(f"loss {before:.3f} -> {after:.3f}, step size {optimizer.step_size:.1e}, {searches} searches")
