"""What the tests of the model card share: log histories made by hand, and the writer of cards."""

from transformers import TrainerState, TrainingArguments

from hf_salsa import SaLSaAdam
from hf_salsa.model_card import write_model_card


def train(step, loss, step_size, trials=0):
    return {
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": step_size,
        "salsa/searches": step,
        "salsa/trials": trials,
        "epoch": step / 50,
        "step": step,
    }


def evaluation(step, prefix="eval", **metrics):
    return {
        **{f"{prefix}_{name}": value for name, value in metrics.items()},
        f"{prefix}_runtime": 0.5,
        f"{prefix}_samples_per_second": 100.0,
        f"{prefix}_steps_per_second": 10.0,
        f"{prefix}_model_preparation_time": 0.001,
        "epoch": step / 50,
        "step": step,
    }


def end(step, **report):
    defaults = {
        "searches": 60,
        "trials": 90,
        "extra_forward_share": 90 / 190,
        "failed_searches": 2,
        "skipped_steps": 1,
        "median_step_size": 3.14159e-05,
        "final_step_size": 2.5e-05,
    }
    return {
        "train_runtime": 12.5,
        "train_samples_per_second": 64.0,
        "train_steps_per_second": 8.0,
        "total_flos": 1.0,
        "train_loss": 0.6,
        **{f"salsa/{name}": value for name, value in (defaults | report).items()},
        "epoch": step / 50,
        "step": step,
    }


HISTORY = [
    evaluation(0, loss=0.7, accuracy=0.5),
    train(1, 0.71, 0.5),
    train(50, 0.65, 4e-05),
    evaluation(50, loss=0.66, accuracy=0.75),
    train(100, 0.0004321, 2.5e-05),
    evaluation(100, loss=0.61234, accuracy=0.875),
    end(100),
]


class CardWriter:
    """Writes a card from a log history into `folder`; returns its text."""

    def __init__(self, folder, make_model):
        self.folder = folder
        self.make_model = make_model

    def __call__(
        self, history=HISTORY, *, optimizer=SaLSaAdam, settings=None, state=None, **options
    ):
        model = options.pop("model", None) or self.make_model()
        arguments = TrainingArguments(
            str(self.folder),
            **{
                "use_cpu": True,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_grad_norm": 0.0,
                **options.pop("arguments", {}),
            },
        )
        steps = max((entry["step"] for entry in history), default=0)
        state = {"global_step": steps, "max_steps": steps, "epoch": steps / 50} | (state or {})
        write_model_card(
            self.folder,
            state=TrainerState(log_history=history, train_batch_size=4, **state),
            arguments=arguments,
            optimizer=optimizer(model.parameters(), **(settings or {})),
            model=model,
            **options,
        )
        return (self.folder / "README.md").read_text(encoding="utf-8")


def section(card, heading):
    """Return the lines of a card below a heading, up to the next one."""
    lines = card.splitlines()
    start = lines.index(heading) + 1
    stop = next((i for i in range(start, len(lines)) if lines[i].startswith("#")), len(lines))
    return [line for line in lines[start:stop] if line]


def table(card):
    lines = section(card, "### Training results")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
