"""Adapters of several tasks under torch.compile: right answers, and no code for each name."""

import pytest
import torch
from adapted import close
from task_adapters import adapted, inputs_of, model_of

KINDS = {
    "one task": [["a"], ["b"], ["c"]],
    "rows": [["a", "b", "c", "a"], ["c", "c", "a", "b"], ["b", None, None, "b"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_choice_of_one_kind_is_not_compiled_again(kind):
    torch._dynamo.reset()
    model, inputs = model_of(), inputs_of("encoder")
    adapter = adapted(model)
    counts = [0]

    def counting(graph, _):
        counts[0] += 1
        return graph.forward

    compiled, first = torch.compile(model, backend=counting), 0
    for names in KINDS[kind]:
        choice = names[0] if kind == "one task" else names
        found = []
        for run in (model, compiled):
            with adapter.using(choice):
                value = run(**inputs)[0]
            value.square().mean().backward()
            found.append([value.detach(), *(p.grad for p in adapter.parameters())])
            adapter.zero_grad()
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)  # an unused task has no gradient
            assert one is None or close(one, other, 1e-9)
        first = first or counts[0]
        assert counts[0] == first
    torch._dynamo.reset()
