"""
Fine-tune a classifier
======================

An encoder of sentences learns to tell praise from complaint in film reviews. The adapter is one small
tensor for all layers; only it and the new classifier are trained.
"""

import random
import tempfile

import matplotlib.pyplot as plt
import torch
from assets import film_reviews, minilm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lortalib import nn

torch.manual_seed(0)

# %%
# The model and its data
# ----------------------
#
# ``minilm()`` is the folder of a model that comes in a package. With the hub, the name of any encoder does:
# ``"sentence-transformers/all-MiniLM-L6-v2"`` is the same one.

folder = minilm()
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(folder)

rows = film_reviews()
random.Random(0).shuffle(rows)
test, train = rows[:200], rows[200:]
train[0]

# %%
# The adapter
# -----------
#
# Without a name, ``apply`` makes the format that had the highest gain for its size in :doc:`/quality`.
# ``train_also`` names what is new and has to be trained as a whole.

adapter = nn.apply(model, rank=18, train_also=["classifier"])
print(adapter)

# %%
# Training
# --------
#
# Any loop or Trainer will do. The tensor has few parameters, and each moves all layers, so its learning
# rate is higher than that of LoRA.


def encode(texts):
    """A padded batch."""
    return tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")


@torch.inference_mode()
def accuracy():
    """Share of the held-out reviews that are classified as their authors meant them."""
    model.eval()
    batches = [test[i : i + 50] for i in range(0, len(test), 50)]
    right = 0
    for batch in batches:
        texts, labels = zip(*batch)
        right += int((model(**encode(list(texts))).logits.argmax(1) == torch.tensor(labels)).sum())
    model.train()
    return right / len(test)


optimizer = torch.optim.Adam(
    [
        {"params": adapter.parameters(), "lr": 1e-2},
        {"params": model.classifier.parameters(), "lr": 5e-3},
    ]
)
losses, scores = [], {0: accuracy()}
for step in range(1, 41):
    texts, labels = zip(*train[step * 16 : step * 16 + 16])
    loss = model(**encode(list(texts)), labels=torch.tensor(labels)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
scores[40] = accuracy()
print(scores)

# %%
# The first step has no effect on the update's other factors, which is why the loss begins level
# (:doc:`/troubleshooting`). A few hundred steps more, on all reviews, are the study's setting.

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), width_ratios=(3, 1), layout="tight")
left.plot(range(1, 41), losses, ".", alpha=0.4)
means = [sum(losses[max(0, i - 7) : i + 1]) / len(losses[max(0, i - 7) : i + 1]) for i in range(40)]
left.plot(range(1, 41), means, label="mean of the last 8")
left.set(xlabel="step", ylabel="loss of a batch")
left.legend()
right.bar(["before", "after"], [scores[0], scores[40]], color=["0.7", "C0"])
right.set(ylim=(0.4, 0.8), ylabel="accuracy, held out")
figure.show()

# %%
# Saving, loading, merging
# ------------------------
#
# The file has the tensor and the classifier. After ``merge`` the model is an ordinary one, at the speed of
# the base.

folder = adapter.save(tempfile.mkdtemp())
print(sum(file.stat().st_size for file in folder.iterdir()) // 1024, "KiB")

text = encode(["A warm, funny and clever film.", "Two hours that I will never get back."])
model.eval()
before = model(**text).logits.detach()
adapter.merge()
torch.testing.assert_close(model(**text).logits, before, rtol=1e-4, atol=1e-4)
before.softmax(1)
