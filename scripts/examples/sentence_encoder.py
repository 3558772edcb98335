"""sentence-transformers without a learning rate: two classes of two lines.

    python scripts/examples/sentence_encoder.py

A tiny BERT from scratch learns which sentences say the same in other words.
"""

from dataclasses import dataclass
from itertools import product
from tempfile import TemporaryDirectory

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer, set_seed

from hf_salsa import SaLSaArgumentsMixin, SaLSaTrainerMixin


class SaLSaSentenceTransformerTrainer(SaLSaTrainerMixin, SentenceTransformerTrainer):
    pass


@dataclass
class SaLSaArguments(SaLSaArgumentsMixin, Arguments):
    pass


set_seed(0)
wordings = {
    "anchor": ["dog cat boy girl nurse", "ran slept spoke ate hid", "home street wood hill"],
    "positive": ["pup puss lad lass medic", "raced dozed talked dined lay", "house road trees top"],
}
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "by"]
words += " ".join(wordings["anchor"] + wordings["positive"]).split()
data = {
    name: [f"the {who} {did} by the {at}" for who, did, at in product(*map(str.split, wording))]
    for name, wording in wordings.items()
}
size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
with TemporaryDirectory() as folder:
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(folder), Pooling(64)])
args = SaLSaArguments(
    "runs/sentence_encoder",
    num_train_epochs=10,
    per_device_train_batch_size=32,
    save_strategy="no",
    logging_steps=10,
)
data = Dataset.from_dict(data)
loss = MultipleNegativesRankingLoss(model)
trainer = SaLSaSentenceTransformerTrainer(model, args, data, loss=loss)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
step_size, searches = trainer.line_search.step_size, trainer.line_search.counters.searches
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, step size {step_size:.1e}, {searches} searches")
