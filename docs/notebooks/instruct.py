"""
Instruction-tune a language model
=================================

A language model of 135 million parameters learns the tone of short conversations. The loss is that of the
answers alone, in the model's chat template.
"""

import random
import tempfile

import matplotlib.pyplot as plt
import torch
from assets import conversations, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from lortalib import nn

torch.manual_seed(0)

# %%
# The model and its data
# ----------------------
#
# ``smollm2()`` is a model that comes in a package; with the hub it is
# ``"HuggingFaceTB/SmolLM2-135M-Instruct"``.

folder = smollm2()
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

rows = [row for row in conversations() if len(" ".join(row)) < 160]
random.Random(0).shuffle(rows)
test = rows[:16]
known = {question for question, _ in test}
train = [row for row in rows[16:] if row[0] not in known]
test[0]

# %%
# The loss of an answer
# ---------------------
#
# Labels of -100 are left out of the loss: those of the question, of the template and of the padding. The
# empty turn takes the place of the template's own, longer one.


def encode(pairs):
    """Rows of token numbers, with the labels of the answers."""
    inputs, labels = [], []
    for question, answer in pairs:
        turn = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
        asked = asked["input_ids"]
        said = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
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


@torch.inference_mode()
def held_out():
    """Loss on the answers that the model does not train on."""
    return model(**encode(test)).loss.item()


@torch.inference_mode()
def answer(question):
    """What the model says, greedily."""
    turn = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


print(answer(test[0][0]))

# %%
# The adapter
# -----------
#
# Without a name it is the format that did best for its size in :doc:`/quality`.

adapter = nn.apply(model, rank=66)
print(adapter)

# %%
# Training
# --------
#
# Eight steps of four conversations, so that this page is built in seconds; a real run takes hundreds.

optimizer = torch.optim.Adam(adapter.parameters(), lr=1.5e-2)
losses, before = [], held_out()
for step in range(8):
    loss = model(**encode(train[step * 4 : step * 4 + 4])).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
after = held_out()
print(f"loss on held-out answers: {before:.2f} before, {after:.2f} after")

# %%
# The points are the losses of single batches, which differ more from each other than from step to step; the
# lines are the losses on held-out answers.

figure, ax = plt.subplots(figsize=(5, 2.8), layout="tight")
ax.plot(range(1, 9), losses, "o", color="0.6", label="batch, trained on next")
ax.axhline(before, color="C1", linestyle="--", label="held out, before")
ax.axhline(after, color="C0", label="held out, after")
ax.set(xlabel="step", ylabel="loss of an answer")
ax.legend()
figure.show()

# %%
# What the model says
# -------------------
#
# The same question as above; and with the adapter switched off, which gives the base again, bit for bit.

print(answer(test[0][0]))
with adapter.disabled():
    print(answer(test[0][0]))

# %%
# For vLLM, PEFT or llama.cpp the adapter is written as a LoRA (:doc:`/lora`). One on the residual stream
# needs the model for this, as its update is a product with the model's own weights.

folder = adapter.export_lora(tempfile.mkdtemp())
print(sorted(file.name for file in folder.iterdir()))
