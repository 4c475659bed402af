"""Between a forward and its backward anything may happen, while checkpoints wait to run the forward again:
the gradients are those of the forward, or the backward is refused. Never anything else."""

import copy
import gc
import pickle
import random
from contextlib import ExitStack

import pytest
import torch
from adapted import close, put
from banks import random_stack, small_llama
from torch.distributed._composable import checkpoint as checkpoint_by_hooks
from torch.utils.checkpoint import checkpoint

from lortalib import nn

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
KINDS = ("default", "reentrant", "hooks")
each_kind = pytest.mark.parametrize("kind", KINDS[:2])


@pytest.fixture(autouse=True)
def frozen_garbage():
    """A change asks the garbage collector for checkpoints; it need not look at what other tests made."""
    gc.collect()
    gc.freeze()


class Scene:
    """A model with two adapters and a bank. All train: the base, the adapters, and the rows of `trained`."""

    def __init__(self, base):
        self.model = copy.deepcopy(base).train()
        common = {"freeze": False, "dtype": torch.float64}
        self.one = put(self.model, name="one", **common)
        self.two = put(self.model, "lora", name="two", seed=1, targets="qv", **common)
        self.bank = nn.bank(self.model, "cp", rank=2, dtype=torch.float64)
        self.bank.fill(["ann", "bob"], random_stack(self.bank, 2))
        self.rows = random_stack(self.bank, 2, seed=5)
        self.contexts = ExitStack()
        for tensor in self.rows["layers"]:
            tensor.requires_grad_()

    def use(self, *names):
        self.contexts.enter_context(self.bank.using(list(names)))

    def train_rows(self):
        self.contexts.enter_context(self.bank.using_tensors(self.rows))

    def third(self):
        return put(self.model, name="third", freeze=False, dtype=torch.float64)

    def trained(self):
        return [*self.model.parameters(), *self.rows["layers"]]

    def other_bank(self):
        bank = nn.bank(self.model, "lora", rank=2, dtype=torch.float64)
        bank.fill(["eve"], random_stack(bank, 1))
        self.contexts.enter_context(bank.using(["eve"]))


def loss_of(model, kind=None):
    """The sum of squares of the last hidden state, with a checkpoint of this kind around each layer."""
    hidden = model.model.embed_tokens(IDS)
    places = model.model.rotary_emb(hidden, torch.arange(4)[None])
    for layer in model.model.layers:
        run = lambda x, layer=layer: layer(x, position_embeddings=places)  # noqa: E731
        if kind in ("default", "reentrant"):
            hidden = checkpoint(run, hidden, use_reentrant=kind == "reentrant")
        else:
            hidden = run(hidden)
    return hidden.square().sum()


#: How things are in the forward.
STATES = {
    "added": lambda s: None,
    "the other off": lambda s: s.two.disable(),
    "both off": lambda s: nn.set_active(s.model, []),
    "the other merged": lambda s: s.two.merge(),
    "merged": lambda s: s.one.merge(),
    "both merged": lambda s: (s.two.merge(), s.one.merge()),
    "merged, the other off": lambda s: (s.one.merge(), s.two.disable()),
    "rows": lambda s: s.use("ann", "bob"),
    "rows, both merged": lambda s: (s.one.merge(), s.two.merge(), s.train_rows()),
    "rows that train, both off": lambda s: (nn.set_active(s.model, []), s.train_rows()),
}
#: What can happen before the backward.
CHANGES = {
    "nothing": lambda s: None,
    "merge": lambda s: s.one.merge(),
    "merge the other": lambda s: s.two.merge(),
    "unmerge": lambda s: s.one.unmerge(),
    "unmerge the other": lambda s: s.two.unmerge(),
    "disable": lambda s: s.one.disable(),
    "disable the other": lambda s: s.two.disable(),
    "enable": lambda s: s.one.enable(),
    "enable the other": lambda s: s.two.enable(),
    "switch": lambda s: nn.set_active(s.model, "two"),
    "none active": lambda s: nn.set_active(s.model, []),
    "both active": lambda s: nn.set_active(s.model, ["one", "two"]),
    "merge and unmerge": lambda s: (s.one.merge(), s.one.unmerge()),
    "unmerge and merge": lambda s: (s.one.unmerge(), s.one.merge()),
    "remove": lambda s: s.one.remove(),
    "remove the other": lambda s: s.two.remove(),
    "remove both": lambda s: (s.one.remove(), s.two.remove()),
    "leave in": lambda s: s.one.remove(merged=True),
    "leave the other in": lambda s: s.two.remove(merged=True),
    "apply a third": lambda s: s.third(),
    "merge a third": lambda s: s.third().merge(),
    "merge and remove a third": lambda s: (third := s.third(), third.merge(), third.remove()),
    "use rows": lambda s: s.use("bob", "ann"),
    "use no rows": lambda s: s.use(None, None),
    "close the context": lambda s: s.contexts.close(),
    "train rows": lambda s: s.train_rows(),
    "replace a row": lambda s: s.bank.update({"ann": s.bank["bob"]}),
    "remove the bank": lambda s: s.bank.remove(),
    "use another bank": lambda s: s.other_bank(),
}


def is_refused(loss):
    """Run the backward; whether it was refused in words that say why."""
    try:
        loss.backward()
    except RuntimeError as error:
        if "after the forward that a checkpoint runs again" not in str(error):
            raise
        return True
    return False


def is_right_or_refused(base, state, changes, kind, wanted):
    """Whether the gradients are the wanted ones; None if the backward is refused."""
    scene = Scene(base)
    STATES[state](scene)
    trained = scene.trained()
    if kind == "hooks":
        for layer in scene.model.model.layers:
            checkpoint_by_hooks(layer)
    with scene.contexts:
        loss = loss_of(scene.model, kind)
        for change in changes:
            try:
                CHANGES[change](scene)
            except (RuntimeError, ValueError, KeyError):
                continue  # not possible behind the changes before
        if is_refused(loss):
            return None
    return all(map(same_gradient, trained, wanted))


def same_gradient(parameter, wanted):
    found = parameter.grad
    return found is wanted if wanted is None or found is None else close(found, wanted, 1e-9)


def gradients(base, state):
    """The gradients without checkpoints."""
    scene = Scene(base)
    STATES[state](scene)
    trained = scene.trained()
    with scene.contexts:
        loss_of(scene.model).backward()
    return [parameter.grad for parameter in trained]


@pytest.fixture(scope="module")
def base():
    model = small_llama().double()
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    return model


#: Refusing all would be no art: behind these changes every gradient is right, whatever is on in the forward.
ALWAYS_RIGHT = {
    "nothing", "use no rows", "close the context", "train rows", "replace a row", "use rows",
}  # fmt: skip


@each_kind
@pytest.mark.parametrize("state", STATES)
def test_gradients_are_those_of_the_forward_or_refused(base, state, kind):
    wanted = gradients(base, state)
    found = {change: is_right_or_refused(base, state, [change], kind, wanted) for change in CHANGES}
    assert not [change for change, right in found.items() if right is False]
    assert not [change for change in ALWAYS_RIGHT if not found[change]]
    if "merged" not in state:
        switches = ("disable", "disable the other", "switch", "none active")
        assert all(found[change] for change in switches)


def draw(number, seed):
    rng = random.Random(seed)
    for _ in range(number):
        changes = rng.choices(list(CHANGES), k=rng.randint(2, 4))
        yield rng.choice(list(STATES)), changes, rng.choice(KINDS)


def check_sequences(base, number, seed):
    wanted = {state: gradients(base, state) for state in STATES}
    cases = [
        (*case, is_right_or_refused(base, *case, wanted[case[0]])) for case in draw(number, seed)
    ]
    assert not [case for case in cases if case[-1] is False]
    print(f"{number} sequences, {sum(case[-1] is None for case in cases)} refused, 0 wrong")


def test_sequences_of_changes(base):
    check_sequences(base, 20, 0)


@pytest.mark.slow
def test_many_sequences_of_changes(base):
    check_sequences(base, 3000, 1)


def guards(model):
    return [
        hook
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if type(hook).__name__ == "RecomputeGuard"
    ]


def refused(loss):
    with pytest.raises(RuntimeError, match="after the forward that a checkpoint runs again"):
        loss.backward()


@each_kind
def test_a_model_keeps_no_guard_without_a_graph_and_none_behind_it(base, kind):
    scene = Scene(base)
    scene.one.merge()
    scene.one.unmerge()
    assert not guards(scene.model)
    loss = loss_of(scene.model, kind)
    scene.one.merge()
    scene.one.remove()
    assert guards(scene.model)
    for again in (copy.deepcopy(scene.model), pickle.loads(pickle.dumps(scene.model))):
        again(IDS)
        assert not guards(again)
    refused(loss)
    del loss
    scene.model(IDS)
    assert not guards(scene.model)


@each_kind
def test_a_forward_behind_the_change_counts(base, kind):
    """The old graph is refused, the new one is not."""
    scene = Scene(base)
    old = loss_of(scene.model, kind)
    scene.one.merge()
    loss_of(scene.model, kind).backward()
    refused(old)
    loss_of(scene.model, kind).backward()


@each_kind
@pytest.mark.parametrize("leave_in", [False, True])
def test_what_was_left_in_the_weights_meanwhile_counts(base, kind, leave_in):
    scene = Scene(base)
    scene.two.merge()
    loss = loss_of(scene.model, kind)
    with scene.two.disabled():  # after which the same update is merged again
        scene.third().remove(merged=leave_in)
    refused(loss) if leave_in else loss.backward()


@each_kind
def test_a_failed_change_is_none(base, kind, monkeypatch):
    scene = Scene(base)
    loss = loss_of(scene.model, kind)
    with monkeypatch.context() as patched:
        patched.setattr(type(scene.one), "delta", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scene.one.merge()
    loss.backward()
    assert all(map(same_gradient, scene.trained(), gradients(base, "added")))


@each_kind
@pytest.mark.parametrize("part", ["model.layers.0.mlp", "model.layers.0.mlp.up_proj"])
def test_a_trained_module_alone_in_a_checkpoint(base, kind, part):
    """No projection with an adapter is in it, and yet its weights are others behind a switch."""
    model = copy.deepcopy(base)
    adapter = put(model, train_also=["model.layers.0.mlp"], dtype=torch.float64)
    module = model.get_submodule(part)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    losses = [
        checkpoint(module, x, use_reentrant=kind == "reentrant").square().sum() for _ in range(2)
    ]
    with adapter.disabled():
        refused(losses[0])
    losses[1].backward()
    assert close(x.grad, wanted, 1e-9)


@each_kind
def test_a_weight_that_is_read_directly(kind):
    """The projection's own forward is never called."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double()
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    adapter = put(model, dtype=torch.float64)
    assert any(site.weight_read_directly for site in adapter.sites)
    adapter.merge()
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    loss = checkpoint(model.layers[0].self_attn, x, x, x, use_reentrant=kind == "reentrant")[
        0
    ].sum()
    adapter.remove()
    refused(loss)


@each_kind
def test_a_merge_in_the_checkpointed_function_is_refused(base, kind):
    """Run again, it would begin with merged weights."""
    scene = Scene(base)

    def switch(x):
        y = scene.model.model.layers[0].self_attn.q_proj(x)
        scene.one.merge()
        return y

    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    refused(checkpoint(switch, x, use_reentrant=kind == "reentrant").square().sum())
