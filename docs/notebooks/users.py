"""
Many users on one base
======================

One language model in memory, an adapter of their own for each user, and one batch in which every row has
another one.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from assets import conversations, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from lortalib import nn

torch.manual_seed(0)

folder = smollm2()
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = [row for row in conversations() if len(" ".join(row)) < 90]

# %%
# Two users
# ---------
#
# Ann wants her answers in capital letters, Bob wants his to begin with "Well". Each gets an adapter that is
# trained for a few steps on answers of this kind.

STYLES = {"ann": str.upper, "bob": "Well, {}".format}


def encode(pairs):
    """Rows of token numbers, with the labels of the answers."""
    inputs, labels = [], []
    for question, answer in pairs:
        asked = tokenizer(f"Q: {question}\nA:")["input_ids"]
        said = tokenizer(f" {answer}\n")["input_ids"]
        inputs.append(asked + said)
        labels.append([-100] * len(asked) + said)
    longest = max(map(len, inputs))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in inputs]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in inputs]
        ),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
    }


bank = nn.bank(model, "indscal", rank=32)
for user, style in STYLES.items():
    adapter = nn.apply(model, "indscal", rank=32, name=user)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1.5e-2)
    for step in range(10):
        batch = [(question, style(answer)) for question, answer in rows[step * 4 : step * 4 + 4]]
        model(**encode(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bank[user] = adapter  # a copy; the adapter itself leaves the model
    adapter.remove()
print(bank)

# %%
# One batch, three rows
# ---------------------
#
# ``using`` names an adapter for each row; ``None`` is the base. All rows go through the same matrices of
# the base, in one product, and what the adapters add is computed without a loop over them.

tokenizer.padding_side = "left"
batch = tokenizer(["Q: What is the capital of France?\nA:"] * 3, return_tensors="pt")
owners = ["ann", "bob", None]
with bank.using(owners):
    said = model.generate(
        **batch, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
for owner, row in zip(owners, said[:, batch["input_ids"].shape[1] :]):
    print(owner, "|", tokenizer.decode(row, skip_special_tokens=True).partition("\n")[0])

# %%
# How many fit
# ------------
#
# A user costs what the adapter has, here 87 KiB; a model of its own would be half a gigabyte. With shared
# sides (:doc:`/serving`) a user has the rows for layers and matrices only.

ROWS = 4 * 30 * 32  # matrices, layers, rank
weights = sum(p.numel() for p in model.parameters()) * 4
each = bank.count() * 4
users = [1, 10, 100, 1_000, 10_000]
figure, ax = plt.subplots(figsize=(6, 3.2), layout="tight")
ax.plot(users, [weights * n for n in users], "o-", label="a merged model for each")
ax.plot(users, [weights + each * n for n in users], "o-", label="bank")
shared = each - ROWS * 4
ax.plot(users, [weights + shared + ROWS * 4 * n for n in users], "o-", label="bank, shared sides")
ax.set(xscale="log", yscale="log", xlabel="users", ylabel="bytes of parameters, float32")
ax.legend()
figure.show()
print(f"{each / 1024:.0f} KiB for a user, {ROWS * 4 / 1024:.0f} KiB with shared sides")

# %%
# A user's adapter can be taken out again: saved, merged for a server of its own, or trained on.
# ``lortalib serve`` (:doc:`/serving`) answers requests for all users of a bank.

adapter = bank.adapter("ann")
adapter.save(tempfile.mkdtemp(), model=model)
print(adapter)
