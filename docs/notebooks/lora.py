"""
Choose a format for a LoRA you have
===================================

A LoRA that was trained with PEFT is fitted by tensors of several formats. No data and no training are
needed, and the error is measured on the updates themselves.
"""

import random
import tempfile
import warnings

import matplotlib.pyplot as plt
import torch
from assets import film_reviews, minilm
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lortalib import nn

torch.manual_seed(0)

# %%
# A LoRA
# ------
#
# Here it is trained for a few steps on film reviews; yours is a folder that ``save_pretrained`` wrote.

folder = minilm()
base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = film_reviews()
random.Random(0).shuffle(rows)

config = LoraConfig(r=8, target_modules=["query", "key", "value", "attention.output.dense"])
model = get_peft_model(base, config)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for step in range(16):
    texts, labels = zip(*rows[step * 16 : step * 16 + 16])
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    model(**batch, labels=torch.tensor(labels)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
mine = tempfile.mkdtemp()
model.save_pretrained(mine)
base = model.unload()


# %%
# What it could become
# --------------------
#
# ``compress`` fits one tensor to the LoRA by alternating least squares. No update is formed, so that a fit
# takes less than a second. Of Tucker the ranks for layers and matrices cannot be larger than their number,
# which is a warning elsewhere.

CHOICES = {
    "lora": (1, 2, 4),
    "lotr": (4, 8, 16, 32),
    "cp_matrix": (4, 16),
    "cp": (16, 64),
    "tucker": (8, 16),
}
warnings.simplefilter("ignore")
found = {
    (name, rank): nn.compress(base, {"mine": mine}, name, rank, sweeps=20)
    for name, ranks in CHOICES.items()
    for rank in ranks
}
found["lotr", 8]

# %%
# The error is relative: at 1 nothing of the update is left. A LoRA keeps the random directions that its
# matrices A started with, so its layers have little in common. Formats that give each weight factors of its
# own (``lora`` of a lower rank) come nearest where there is room; below the size of rank 1, ``lotr``, which
# shares the two sides, does.

figure, ax = plt.subplots(figsize=(6, 3.4), layout="tight")
for name, ranks in CHOICES.items():
    each = [found[name, rank] for rank in ranks]
    ax.plot([one.count() for one in each], [one.error for one in each], "o-", label=name)
ax.set(xscale="log", xlabel="parameters", ylabel="relative error", ylim=(0, 1))
ax.legend(ncols=2)
figure.show()

# %%
# Where the error is
# ------------------
#
# Each fit has a table by layer, matrix and head.

for row in found["lotr", 16].table("matrix"):
    print(row["matrix"], f"{row['relative']:.3f}")

# %%
# An adapter again
# ----------------
#
# The score suffers far less than the error says (:doc:`/compress` has both), and some further training
# helps. The result is an ordinary adapter.

folder = found["lotr", 16].save(tempfile.mkdtemp())
adapter = nn.load(base, folder)
print(adapter)
