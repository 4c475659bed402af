"""
Add a format
============

A format is a line of text. Here is a new one, from the idea to an adapter on a model, held against others
at equal size.
"""

import matplotlib.pyplot as plt
import torch
from assets import film_reviews, minilm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lortalib import decomp, nn

torch.manual_seed(0)

# %%
# The line
# --------
#
# Parameters are separated by commas, each by its legs: ``in``, ``out``, ``head``, ``layer``, ``matrix`` are
# the modes, other names are bonds, which are summed over. In this line all weights share two sides, as in
# LoTR. Between them every kind of matrix has a few small cores of its own, which a layer mixes by its row.

LINE = "in p, head out q, layer s, matrix p q s"
RANK = {"p": 8, "q": 8, "s": 6}
decomp.register_format("mixed_cores", LINE, "cores of each matrix, mixed by layers")
print(decomp.draw(decomp.network(LINE, (6, 12, 2, 384, 32), RANK)))

# %%
# Something to compare it with
# ----------------------------
#
# The first thing that any adapter has to follow is the gradient of the first batch. For the queries and
# values of a real encoder on film reviews it is one tensor with the axes layer, head, matrix, in, out.

folder = minilm()
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
texts, labels = zip(*film_reviews()[::300])
batch = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
model(**batch, labels=torch.tensor(labels)).loss.backward()

gradient = torch.zeros(6, 12, 2, 384, 32)
for site in nn.sites(model):
    if site.role in "qv":
        weight = model.get_submodule(site.path).weight.grad  # (heads * out, in)
        gradient[site.layer, :, "qv".index(site.role)] = weight.unflatten(0, (12, 32)).mT
model.zero_grad()

# %%
# Equal sizes
# -----------
#
# ``budget`` finds the ranks of each line for a number of parameters, and ``fit`` says how much of the
# tensor is left over.

errors = {}
for name in ("mixed_cores", "lotr", "metatt_4d", "tt"):
    for size in (2_500, 5_000, 10_000):
        row = decomp.budget(tuple(gradient.shape), size, [name]).rows[0]
        fit = decomp.fit(gradient, name, row.rank, sweeps=15)
        errors.setdefault(name, []).append((row.parameters, fit.error))

figure, ax = plt.subplots(figsize=(6, 3.2), layout="tight")
for name, points in errors.items():
    ax.plot(*zip(*points), "o-", label=name)
ax.set(xlabel="parameters", ylabel="relative error", title="gradient of the first batch")
ax.legend()
figure.show()

# %%
# This is one gradient of one model: it says what the line can follow, and not how well it trains. For that
# there is :doc:`/quality`.
#
# On a model
# ----------
#
# Nothing else has to be written. The name works wherever a format is named: training, merging, files, the
# bank, export.

adapter = nn.apply(model, "mixed_cores", RANK, targets="qv")
print(adapter)

# %%
# The cut gives every projection an exact low-rank pair. Its rank is that of a LoRA with the same update, so
# a forward costs what that LoRA costs.

network = adapter.networks["encoder"]
pair = network.select(layer=3, matrix=0).cut()
print(tuple(pair.A.shape), tuple(pair.B.shape))

# %%
# A name of one's own lives as long as the process; files hold the line itself.

del decomp.formats["mixed_cores"]
