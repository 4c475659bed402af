"""Every way to change the parameters of an adapter: seen by torch, or leaving no trace."""

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def step(kind, **options):
    def change(model, adapter):
        kind(adapter.parameters(), lr=0.02, **options).step()

    return change


def for_each(change):
    """A change of a model by a change of each parameter of its adapter."""

    def act(model, adapter):
        for parameter in adapter.parameters():
            change(parameter)

    return act


def other(tensor):
    """Other numbers of the same size."""
    return tensor.detach().roll(1)


def in_place(parameter):
    with torch.no_grad():
        parameter.copy_(other(parameter))


def new_data(parameter):
    parameter.data = other(parameter)


def by_numpy(parameter):
    parameter.detach().numpy()[...] = other(parameter).numpy()


def load(assign):
    def change(model, adapter):
        state = {name: other(value) for name, value in adapter.state_dict().items()}
        adapter.load_state_dict(state, assign=assign)

    return change


def as_one_vector(model, adapter):
    vector_to_parameters(other(parameters_to_vector(adapter.parameters())), adapter.parameters())


def and_back(model, adapter):
    adapter.to(torch.float32)
    for_each(in_place)(model, adapter)
    adapter.to(torch.float64)


#: These count as changes for torch, or replace the storage.
SEEN = {
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "Adam": step(torch.optim.Adam, foreach=False),
    "Adam foreach": step(torch.optim.Adam, foreach=True),
    "AdamW": step(torch.optim.AdamW),
    "in place": for_each(in_place),
    "new data": for_each(new_data),
    "load_state_dict": load(assign=False),
    "load_state_dict assign": load(assign=True),
    "one vector": as_one_vector,
    "another dtype and back": and_back,
}

#: These leave no trace.
UNSEEN = {
    "SGD fused": step(torch.optim.SGD, fused=True),
    "Adam fused": step(torch.optim.Adam, fused=True),
    "data.mul_": lambda model, adapter: next(adapter.parameters()).data.mul_(-1.1),
    "data.copy_": for_each(lambda p: p.data.copy_(other(p))),
    "numpy": for_each(by_numpy),
    "one number": lambda model, adapter: next(adapter.parameters()).data.view(-1)[-1:].neg_(),
}
