"""Any sequence of calls: after each, the model and its adapters are what dense weights say.

Long: ``LORTALIB_STEPS=14000`` for each model (see docs/reliability.md).
"""

import io
import os
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers
from adapted import close, output, same_bits, unchanged
from dense_forward import by_deepcopy, by_pickle
from expected_model import HEAD, Recipe, numbers_of, picture_of, sites_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from watched_model import BASES, WatchedModel, hooks, names, recipes, seeds

from lortalib import nn

STEPS = int(os.environ.get("LORTALIB_STEPS", "160"))
#: Calls in one sequence.
LENGTH = 40


class Life(WatchedModel):
    """The calls that change a model with adapters, in any order."""

    # On and off the model

    @rule(name=names, recipe=recipes, seed=seeds)
    def put_on(self, name, recipe, seed):
        self.apply(name, recipe, seed)

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names, key=st.integers(0, 2))
    def save(self, name, key):
        name = self.here(name)
        own = self.expected.adapters[name]
        with unchanged(self.model):
            self.adapters[name].save(self.path / str(key))
        head = own.head.clone() if own.recipe.also else None
        self.saved[key] = own.recipe, dict(own.numbers), head

    @precondition(lambda self: self.saved)
    @rule(name=names, key=st.integers(0, 2), freeze=st.booleans())
    def load(self, name, key, freeze):
        if key not in self.saved:
            key = min(self.saved)
        made, numbers, head = self.saved[key]
        recipe = Recipe(made.decomposition, made.rank, made.options, made.also, freeze)
        adapter = self.come(
            name,
            recipe,
            lambda: nn.load(self.model, self.path / str(key), name=name, freeze=freeze),
        )
        if adapter is not None:
            self.expected.add(name, recipe, adapter, head)
            self.expected.adapters[name].numbers = numbers

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names)
    def remove(self, name):
        name = self.here(name)
        self.watch(name)
        self.adapters[name].remove()
        self.expected.disable(name)
        del self.expected.adapters[name]

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names)
    def remove_and_leave_merged(self, name):
        name, known = self.here(name), self.expected
        taken = known.head_taken(name)
        own = known.adapters[name]
        refuse = (
            taken
            or (not own.merged and known.conflict(name, active=True, merged=True))
            or any(
                other.merged and other.recipe.on_stream and other.sites & own.sites
                for other in known.others(name)
            )
        )
        if not refuse:
            self.watch(name)
        picture = picture_of(self.adapters[name])
        self.act(lambda: self.adapters[name].remove(merged=True), refuse)
        if not refuse:
            known.merge(name, picture)
            known.settle(name)

    # On and off, in the weights and out

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names)
    def merge(self, name):
        name, known = self.here(name), self.expected
        refuse = not known.adapters[name].merged and (
            known.head_taken(name) or known.conflict(name, active=True, merged=True)
        )
        picture = picture_of(self.adapters[name])
        self.act(self.adapters[name].merge, refuse)
        if not refuse:
            known.merge(name, picture)

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names)
    def unmerge(self, name):
        name, known = self.here(name), self.expected
        refuse = known.adapters[name].merged and known.conflict(name, active=True)
        self.act(self.adapters[name].unmerge, refuse)
        if not refuse:
            known.unmerge(name)

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names)
    def enable(self, name):
        name, known = self.here(name), self.expected
        own = known.adapters[name]
        refuse = not own.active and (
            known.head_taken(name) or known.conflict(name, active=True, merged=own.merged)
        )
        self.act(self.adapters[name].enable, refuse)
        if not refuse:
            own.active = True

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names)
    def disable(self, name):
        name = self.here(name)
        self.adapters[name].disable()
        self.expected.disable(name)

    @rule(wanted=st.lists(names, unique=True))
    def set_active(self, wanted):
        known = self.expected.adapters
        refuse = self.refuses_active(wanted)
        self.act(lambda: nn.set_active(self.model, wanted), refuse)
        if not refuse:
            for name in [name for name in known if name not in wanted]:
                self.expected.disable(name)
            for name in wanted:
                known[name].active = True

    def refuses_active(self, wanted):
        known = self.expected.adapters
        if any(name not in known for name in wanted):
            return True
        merged = [known[name].sites for name in wanted if known[name].merged]
        return sum(known[name].recipe.also for name in wanted) > 1 or any(
            known[n].recipe.on_stream
            and not known[n].merged
            and any(known[n].sites & s for s in merged)
            for n in wanted
        )

    # Training

    @precondition(lambda self: any(e.active for e in self.expected.adapters.values()))
    @rule(seed=seeds)
    def train(self, seed):
        known = self.expected.adapters
        active = [name for name, own in known.items() if own.active]
        trained = [p for name in active for p in self.adapters[name].parameters()]
        if any(known[name].recipe.also for name in active):
            trained += list(self.model.get_submodule(HEAD).parameters())
        trained = [p for p in trained if p.requires_grad]
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 60, (2, 4), generator=draw)
        optimizer = torch.optim.SGD(trained, lr=0.05)
        loss = self.model(input_ids=ids, labels=ids).loss
        if loss.requires_grad:
            loss.backward()
        grads = {id(p) for p in trained if p.grad is not None and p.grad.any()}
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        for name in active:
            own, adapter = known[name], self.adapters[name]
            if own.merged:
                assert not any(id(p) in grads for p in adapter.parameters())
            else:
                own.numbers = numbers_of(adapter)
            if own.recipe.also:
                own.head = self.model.get_submodule(HEAD).weight.detach().clone()

    @precondition(lambda self: self.expected.adapters)
    @rule(name=names, seed=seeds)
    def change_numbers(self, name, seed):
        """Also such as are merged: the weights keep the old ones."""
        self.move(self.here(name), seed)

    # Banks

    @precondition(lambda self: self.bank is None and self.expected.adapters)
    @rule(name=names)
    def make_bank(self, name):
        """Of the kind of one of the adapters, with its numbers in it if it trains nothing else."""
        name = self.here(name)
        recipe, adapter = self.expected.adapters[name].recipe, self.adapters[name]
        before = hooks(self.model)
        call = lambda: nn.bank(  # noqa: E731
            self.model, recipe.decomposition, recipe.rank, capacity=1, dtype=torch.float64,
            **dict(recipe.options),
        )  # fmt: skip
        experts = self.base == "mixtral" and any("experts" in s for s in sites_of(adapter))
        bank = self.act(call, experts)
        if bank is None:
            return
        with ExitStack() as undo:
            undo.callback(bank.remove)
            self.act(lambda: bank.add("row", adapter), recipe.also)
            if recipe.also:
                return
            undo.pop_all()
        self.bank = bank, picture_of(adapter), hooks(self.model) - before
        self.reads = sites_of(adapter) if recipe.on_stream else frozenset()

    @precondition(lambda self: self.bank is not None)
    @rule(rows=st.sampled_from([["row", None], [None, "row"]]))
    def use_bank(self, rows):
        bank, picture, _ = self.bank
        if any(each.merged and each.sites & self.reads for each in self.expected.adapters.values()):
            self.act(lambda: bank.using(rows).__enter__(), refuse=True)
            return
        with bank.using(rows):
            found = output(self.model, self.inputs)
        plain = self.expected.output(self.adapters, self.inputs)
        served = self.expected.output(self.adapters, self.inputs, [picture])
        for k, name in enumerate(rows):
            assert close(found[k], (served if name else plain)[k], 1e-8)
        with unchanged(self.model), pytest.raises(KeyError), bank.using(["nobody", None]):
            pass

    @precondition(lambda self: self.bank is not None)
    @rule()
    def remove_bank(self):
        self.bank[0].remove()
        self.bank = None

    # Copies and checkpoints

    @precondition(lambda self: self.bank is None)
    @rule(duplicate=st.sampled_from([by_deepcopy, by_pickle]))
    def go_on_with_a_copy(self, duplicate):
        found = output(self.model, self.inputs)
        twin = duplicate(self.model)
        assert same_bits(output(twin, self.inputs), found)
        self.removed += [weakref.ref(p) for p in self.model.parameters()]
        self.model = twin

    @rule()
    def change_and_load_the_state_dict(self):
        buffer = io.BytesIO()
        torch.save(self.model.state_dict(), buffer)
        state = torch.load(io.BytesIO(buffer.getvalue()))
        with torch.no_grad():
            for adapter in self.adapters.values():
                for parameter in adapter.networks.parameters():
                    parameter.neg_()
        flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        assert not any(self.model.load_state_dict(state))
        assert flags == {name: p.requires_grad for name, p in self.model.named_parameters()}

    @rule()
    def save_as_trainer_does_and_resume(self):
        """The base comes with its weights where it is written, the other adapters with their files."""
        found, known = output(self.model, self.inputs), self.expected.adapters
        folder = Path(tempfile.mkdtemp(dir=self.path))
        with unchanged(self.model):
            self.model.save_pretrained(folder)
        state = self.model.state_dict()
        own = {name: each for name, each in state.items() if not name.startswith("lortalib.")}
        unmerged = [name for name, e in known.items() if not e.merged]
        if (folder / "model.safetensors").exists():
            plain = type(self.model).from_pretrained(folder, dtype="auto").eval()
            if self.base == "mixtral":
                plain.set_experts_implementation("eager")
            for name, parameter in plain.named_parameters():
                assert same_bits(parameter, own[name]), name
        else:
            assert unmerged == [*known]
            plain = BASES[self.base]()
            plain.load_state_dict(own)
        if any(e.merged or not e.active for e in known.values()):
            return
        for name in known:
            nn.load(plain, folder if len(known) == 1 else folder / name, name=name)
        assert close(output(plain, self.inputs), found, 1e-10)

    # What nobody should ask

    @rule(
        call=st.sampled_from(
            [
                lambda model, path: nn.apply(model, "cp", 0),
                lambda model, path: nn.apply(model, "no such format"),
                lambda model, path: nn.apply(model, "in r, out q"),
                lambda model, path: nn.apply(model, targets="nothing"),
                lambda model, path: nn.apply(model, train_also=["q_proj"]),
                lambda model, path: nn.apply(model, name="a.b"),
                lambda model, path: nn.apply(model, alpha="much"),
                lambda model, path: nn.load(model, path / "nowhere"),
                lambda model, path: nn.load_lora(model, path / "nowhere"),
                lambda model, path: nn.set_active(model, "nobody"),
                lambda model, path: nn.bank(model, capacity=0),
                lambda model, path: nn.align_to_gradient(model, []),
            ]
        )
    )
    def ask_for_what_is_refused(self, call):
        self.act(lambda: call(self.model, self.path), refuse=True)


@pytest.fixture(autouse=True)
def quiet():
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # from_pretrained lists what it does not know
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.filterwarnings("ignore:ranks larger than the modes can fill")
@pytest.mark.parametrize("base", BASES)
def test_any_sequence_of_calls(base):
    machine = type("Life", (Life,), {"base": base, "steps": 0, "refused": 0})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, STEPS // LENGTH),
            stateful_step_count=LENGTH,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{base}: {machine.steps} steps, of which {machine.refused} calls were refused")
    assert machine.refused
