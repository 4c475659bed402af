"""
Look at what an adapter learnt
==============================

An adapter is one tensor, so it can be looked at as a whole: where it changes the model, in which
directions, and what happens without a part of it.
"""

import random

import matplotlib.pyplot as plt
import torch
from assets import film_reviews, minilm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lortalib import decomp, nn, plot

torch.manual_seed(0)

# %%
# An adapter to look at
# ---------------------
#
# As in :doc:`classifier`, on fewer reviews; but in the format ``cp``, whose every component is a product of
# one vector for each mode.

folder = minilm()
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = film_reviews()
random.Random(0).shuffle(rows)


def encode(rows):
    """A padded batch and its labels."""
    texts, labels = zip(*rows)
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    return {**batch, "labels": torch.tensor(labels)}


model.eval()  # no dropout
adapter = nn.apply(model, "cp", rank=8, train_also=["classifier"])
optimizer = torch.optim.Adam(
    [
        {"params": adapter.parameters(), "lr": 1e-2},
        {"params": model.classifier.parameters(), "lr": 5e-3},
    ]
)
for step in range(32):
    model(**encode(rows[step * 16 : step * 16 + 16])).loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()

# %%
# Where it changes the model
# --------------------------
#
# The size of the update, by layer and matrix, and for the values by layer and head. In ``cp`` every component
# has one profile of the layers for all matrices; ``cp_matrix`` has another one for each matrix.

plot.layers(adapter)

# %%

plot.heads(adapter, "v")

# %%
# The components
# --------------
#
# A CP is a sum of components, each a product of one vector for each mode. These are their sizes. Where they
# are of the same order, no component stands for the whole.

network = adapter.networks["encoder"]
[f"{length:.3f}" for length in decomp.component_norms(network).tolist()]

# %%
# What happens without a part
# ---------------------------
#
# The size of an update does not say what it is worth. A layer has a row in one of the parameters; with
# zeros there, this layer is the base's again. What the loss on held-out reviews becomes says what the
# layer's update did.

test = encode(rows[-80:])
with torch.inference_mode():
    whole = model(**test).loss.item()
    with adapter.disabled():
        nothing = model(**test).loss.item()
    without = []
    rows_of_layers = network.get_parameter("layer_r")
    for row in rows_of_layers:
        kept = row.clone()
        row.zero_()
        without.append(model(**test).loss.item())
        row.copy_(kept)

figure, ax = plt.subplots(figsize=(6, 2.8), layout="tight")
ax.bar(range(6), [loss - whole for loss in without])
ax.axhline(0, color="0.5", linewidth=0.8)
ax.set(xlabel="layer without its update", ylabel="change of the loss")
figure.show()
print(
    f"loss with the adapter {whole:.3f}, without it (and with the classifier's start) {nothing:.3f}"
)

# %%
# If single layers can be left out at little cost, they do much the same in the same direction, which is
# what a shared tensor makes them do. ``check_effect`` asks the same question of whole tensors: does a
# change of it move the output at all?

print(nn.check_effect(adapter, test))
