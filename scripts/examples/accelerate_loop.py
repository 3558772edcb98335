"""An Accelerate loop with gradient accumulation and without a learning rate.

    python scripts/examples/accelerate_loop.py
    torchrun --nproc_per_node 2 scripts/examples/accelerate_loop.py

A convolutional network with BatchNorm learns scikit-learn's handwritten digits. One update has four
micro-batches, and the search sees them as one batch.
"""

from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn, tensor
from torch.utils.data import DataLoader, TensorDataset

from hf_salsa import BatchObjective, SaLSaAdamPlus

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=4)
pixels, digits = load_digits(return_X_y=True)
images = tensor(pixels).float().view(-1, 1, 8, 8) / 16
loader = DataLoader(TensorDataset(images, tensor(digits)), batch_size=16, shuffle=True)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(128, 10)),
)

optimizer = SaLSaAdamPlus(model.parameters())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
optimizer.optimizer.plan(3 * -(-len(loader) // 4))  # the updates of the run, rounded up
# After prepare. It sees by itself by what accelerator.backward divides each loss.
objective = BatchObjective(model, optimizer)


# It is called again at other weights, so it takes its data as arguments.
def loss_fn(images, digits):
    return nn.functional.cross_entropy(model(images), digits)


averages = []
for epoch in range(3):
    total = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = objective.record(loss_fn, *batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # the last micro-batch of an update
                objective.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
    averages.append(total / len(loader))
    accelerator.print(f"epoch {epoch + 1}: training loss {averages[-1]:.3f}")

line_search = objective.line_search  # the optimizer inside of Accelerate's wrapper
summary = f"loss {averages[0]:.3f} -> {averages[-1]:.3f}, step size {line_search.step_size:.1e}"
accelerator.print(f"{summary}, {line_search.counters.searches} searches")
accelerator.end_training()
