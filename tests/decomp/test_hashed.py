"""Hashed parameters: norms are kept, numbers used equally often, and one seed is one index everywhere."""

import copy
import hashlib
import math
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import dense
from strategies import examples, generator, lines, seeds

from lortalib.decomp import (
    Legs,
    LegsError,
    Network,
    direct_sum,
    from_tensorly,
    network,
    start_along,
    uni_lora,
)
from lortalib.decomp._hashed import make_hashes

SHAPE = {"layer": 2, "matrix": 3, "head": 2, "in": 5, "out": 4}
LINES = [
    "layer matrix in r (of n), layer matrix head out r (of n)",
    "layer matrix in r (of n), layer matrix head out r (of n, zero)",
    "layer matrix in r (of n, seed 7), layer matrix head out r",
    "in r (of n), head out r (of m, seed 3), layer matrix r",
    "in r (of n), head out r (of n), layer r (of m), matrix r (of m, zero)",
    "layer in r (of n, frozen), layer matrix head out r (of n, frozen), r",
]
over_lines = pytest.mark.parametrize("line", LINES)
numbers = st.integers(2, 12)


def drawn(line, n=7, m=3, rank=2, seed=0, **options):
    options = {"init": "normal", "dtype": torch.float64, **options}
    sizes = {"r": rank, "n": n, "m": m}
    legs = Legs.parse(line)
    asked = {name: sizes[name] for name in legs.ranked(SHAPE)}
    return network(line, SHAPE, asked, generator=generator(seed), **options)


def of_vector(net, vector):
    """The tensors hashed from one vector."""
    return [t for t, term in zip(net.tensors, net.legs.terms) if term.of == vector]


# --- the map from the vector to the entries ---------------------------------------------------------


@over_lines
@examples(20)
@given(n=numbers, m=numbers, rank=st.integers(1, 3), seed=seeds)
def test_the_norm_of_all_entries_is_that_of_the_vector(line, n, m, rank, seed):
    net = drawn(line, n, m, rank, seed)
    for vector in net.vectors:
        theta = getattr(net, f"theta_{vector}")
        square = sum(tensor.square().sum() for tensor in of_vector(net, vector))
        torch.testing.assert_close(square, theta.square().sum(), rtol=1e-12, atol=0)


@over_lines
@examples(20)
@given(n=numbers, m=numbers, rank=st.integers(1, 3))
def test_every_entry_is_a_number_over_the_root_of_its_count(line, n, m, rank):
    net = drawn(line, n, m, rank)
    for vector in net.vectors:
        theta = getattr(net, f"theta_{vector}")
        with torch.no_grad():  # numbers of unlike size, so that an entry tells which it is
            theta.copy_(2.0 ** torch.arange(len(theta)))
        entries = torch.cat([tensor.reshape(-1) for tensor in of_vector(net, vector)])
        index, counts = net.get_buffer(f"index_of_{vector}"), net.get_buffer(f"counts_of_{vector}")
        numbers, minus = index % len(theta), index >= len(theta)
        assert torch.equal(torch.bincount(numbers, minlength=len(theta)), counts)
        expected = torch.where(minus, -1.0, 1.0) * theta[numbers] / counts[numbers].double().sqrt()
        torch.testing.assert_close(entries, expected)


@over_lines
@examples(20)
@given(n=numbers, m=numbers, rank=st.integers(1, 3))
def test_numbers_are_used_equally_often_up_to_one(line, n, m, rank):
    net = drawn(line, n, m, rank)
    for one in make_hashes(net.legs.terms, net.sizes):
        counts = net.get_buffer(f"counts_of_{one.vector}")
        assert len(counts) == net.vectors[one.vector] == one.size
        assert sum(part.size for part in one.parts) == one.size
        assert len(one.parts) == len({net.legs.terms[k].zero for k in one.positions})
        for part in one.parts:
            own = counts[part.start : part.start + part.size]
            assert own.sum() == part.entries
            assert own.min() >= 1
            assert own.max() <= own.min() + 1


def test_signs_are_fair_and_do_not_follow_the_index():
    net = uni_lora((4, 4, 4, 64, 16), {"r": 8, "n": 32})
    index = net.get_buffer("index_of_n")
    minus = (index >= 32).double()
    assert abs(minus.mean() - 0.5) < 5 / len(index) ** 0.5
    for number in range(32):
        assert abs(minus[index % 32 == number].mean() - 0.5) < 0.1


def test_a_seed_draws_the_same_index_on_every_machine():
    """The digests were taken with NumPy 2.4.6 on x86; they must never change, since files store the seed."""
    wanted = {"": "9e653f35f84daa32", ", seed 7": "161ad2b91e4af770"}
    for seed, digest in wanted.items():
        line = f"layer in r (of n{seed}), layer out r (of n, zero)"
        net = network(line, {"layer": 3, "in": 50, "out": 20}, {"r": 4, "n": 100})
        bytes_ = net.get_buffer("index_of_n").numpy().astype("<i8").tobytes()
        assert hashlib.sha256(bytes_).hexdigest()[:16] == digest, seed


@over_lines
def test_one_seed_gives_one_index_and_another_another(line):
    one, other = drawn(line, seed=0), drawn(line, seed=1)
    for name, index in one.named_buffers():
        assert torch.equal(index, other.get_buffer(name))
    moved = drawn(line.replace(", seed 7", "").replace("(of n", "(of n, seed 8"))
    assert not torch.equal(one.get_buffer("index_of_n"), moved.get_buffer("index_of_n"))


def test_two_vectors_of_one_seed_have_unlike_indices():
    line = "layer in r (of n), layer out r (of m), r"
    net = network(line, {"layer": 3, "in": 5, "out": 5}, {"r": 2, "n": 10, "m": 10})
    assert not torch.equal(net.get_buffer("index_of_n"), net.get_buffer("index_of_m"))


# --- a network like any other ---------------------------------------------------------------------


@examples(60)
@given(line=lines(), data=st.data())
def test_any_parameters_of_any_line_can_be_hashed(line, data):
    text, modes = line
    vectors = st.sampled_from(["", "v", "w"])
    legs = Legs(tuple(replace(t, of=data.draw(vectors)) for t in Legs.parse(text).terms))
    frozen = {v: any(t.frozen for t in legs.terms if t.of == v) for v in legs.vectors}
    legs = Legs(tuple(replace(t, frozen=frozen.get(t.of, t.frozen)) for t in legs.terms))
    assume(not any(term.zero and term.frozen for term in legs.terms))
    shape = dict.fromkeys(modes, data.draw(st.integers(1, 3)))
    rank = {name: data.draw(st.integers(2, 5)) for name in legs.ranked(modes)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        net = network(
            str(legs), shape, rank, init="normal", dtype=torch.float64, generator=generator()
        )
    torch.testing.assert_close(net.dense().detach(), torch.from_numpy(dense(net)))
    for vector in net.vectors:
        square = sum(tensor.square().sum() for tensor in of_vector(net, vector))
        theta = getattr(net, net.names[[term.of for term in net.legs.terms].index(vector)])
        torch.testing.assert_close(square, theta.square().sum(), rtol=1e-12, atol=0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.like(net.stored)):
        assert torch.equal(twin.dense(), net.dense())


def test_buffers_and_parameters_have_different_names():
    line = "index_of_n theta_n, in index_of_n (of n), out theta_n"
    net = network(line, {"in": 3, "out": 4}, 2, init="normal")
    assert [*net.names] == ["index_of_n_theta_n", "theta_n", "out_theta_n"]
    net = network("in index_of_n, index_of_n out (of n), index_of_n", {"in": 3, "out": 4}, 2)
    assert [*net.names] == ["in_index_of_n", "theta_n", "index_of_n_"]


@over_lines
@examples(5)
@given(seed=seeds, n=numbers)
def test_the_tensor_is_that_of_the_line_without_vectors(line, seed, n):
    net = drawn(line, n, seed=seed)
    plain = Network(net.legs.unhashed, [t.detach().clone() for t in net.tensors], net.modes)
    torch.testing.assert_close(net.dense(), plain.dense(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.dense().detach(), torch.from_numpy(dense(net)))
    view = net.select(layer=1, matrix=0)
    assert str(view.legs) == str(plain.select(layer=1, matrix=0).legs)
    a, b = view.cut()
    for side, expected in zip((a, b), plain.select(layer=1, matrix=0).cut()):
        torch.testing.assert_close(side, expected, rtol=1e-12, atol=1e-12)


@over_lines
def test_its_gradient_is_what_its_entries_gather(line):
    net = drawn(line)
    if any(term.frozen for term in net.legs.terms if term.of):
        assert not any(p.requires_grad for n, p in net.named_parameters() if n.startswith("theta"))
        return
    plain = Network(net.legs.unhashed, [t.detach().clone() for t in net.tensors], net.modes)
    weight = torch.randn(net.dense().shape, generator=generator(1), dtype=torch.float64)
    for one in (net, plain):
        (one.dense() * weight).sum().backward()
    for vector in net.vectors:
        theta = getattr(net, f"theta_{vector}")
        positions = [k for k, term in enumerate(net.legs.terms) if term.of == vector]
        gradients = torch.cat([plain.tensors[k].grad.reshape(-1) for k in positions])
        index, counts = net.get_buffer(f"index_of_{vector}"), net.get_buffer(f"counts_of_{vector}")
        signed = torch.where(index >= len(theta), -gradients, gradients)
        expected = torch.zeros_like(theta).index_add(0, index % len(theta), signed)
        torch.testing.assert_close(theta.grad, expected / counts.double().sqrt())


@over_lines
def test_gradients_have_gradients_and_serve_several_backwards(line):
    net = drawn(line)
    trained = [p for p in net.parameters() if p.requires_grad]

    def squares(*values):
        given = dict(zip([id(p) for p in trained], values))
        stored = [given.get(id(tensor), tensor) for tensor in net.stored]
        view = net.spread(stored)
        return sum(tensor.square().prod() + tensor.square().sum() for tensor in view)

    assert torch.autograd.gradcheck(squares, trained)
    assert torch.autograd.gradgradcheck(squares, trained)
    view = net.select(layer=0)
    for _ in range(2):
        view.dense().sum().backward()


@over_lines
def test_a_vector_is_stored_and_counted_once(line):
    net = drawn(line)
    names = [f"theta_{vector}" for vector in net.vectors]
    assert [name for name in net.state_dict() if name.startswith("theta")] == names
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assert net.count(False) == sum(p.numel() for p in net.parameters())
    assert net.count() == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert all(
        net.vectors[name.removeprefix("theta_")] == len(getattr(net, name)) for name in names
    )


@over_lines
def test_copies_dtypes_and_devices_keep_the_index(line):
    net = drawn(line)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.like(net.stored)):
        assert torch.equal(twin.dense(), net.dense())
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert {b.dtype for b in half.buffers()} == {torch.int64}
    assert {t.dtype for t in half.tensors} == {torch.bfloat16}
    back = half.to(torch.float64)
    assert all(torch.equal(b, net.get_buffer(name)) for name, b in back.named_buffers())
    empty = copy.deepcopy(net).to("meta")
    assert {t.device.type for t in (*empty.tensors, *empty.buffers())} == {"meta"}
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(net.state_dict())
    assert torch.equal(empty.dense(), net.dense())


def test_numbers_that_replace_placeholders_find_their_index():
    net = drawn(LINES[1])
    empty = copy.deepcopy(net).to("meta")
    empty.load_state_dict(net.state_dict(), assign=True)  # as PEFT and transformers load
    with torch.inference_mode():
        assert torch.equal(empty.dense(), net.dense())
    empty.dense().sum().backward()  # what was drawn in inference mode serves gradients


def test_float16_holds_entries_whose_counts_it_cannot():
    shape = {"layer": 20, "in": 100, "out": 50}
    net = network("layer in r (of n), layer out r", shape, {"r": 50, "n": 1}, init="normal")
    assert net.get_buffer("counts_of_n").item() == 100_000 > torch.finfo(torch.float16).max
    with torch.no_grad():
        net.theta_n.fill_(1000.0)
    (entries, _), expected = net.half().tensors, 1000 / 100_000**0.5
    torch.testing.assert_close(
        entries.abs().float(), torch.full(entries.shape, expected), rtol=1e-3, atol=0
    )


# --- starts ---------------------------------------------------------------------------------------


def test_a_zero_parameter_has_numbers_of_its_own():
    net = drawn(LINES[1], n=20, init="invariant")
    first, second = net.tensors
    assert first.any()
    assert not second.any()
    assert not net.dense().any()
    zero = net.theta_n == 0
    assert zero.sum() == round(20 * second.numel() / (first.numel() + second.numel()))
    net.dense().sum().backward()
    assert net.theta_n.grad[zero].all()
    assert not net.theta_n.grad[~zero].any()


@pytest.mark.parametrize("n", [2, 5, 16, 47])
def test_a_start_keeps_the_size_of_the_entries(n):
    line = "layer matrix in r (of n), layer matrix head out r (zero)"
    hashed = drawn(line, n, init="invariant").tensors[0].square().mean()
    plain = drawn(line.replace(" (of n)", ""), init="invariant").tensors[0].square().mean()
    assert math.isclose(hashed, plain, rel_tol=1e-9)
    lone = "layer matrix in r, layer matrix head out r (of n)"
    steps = drawn(lone, n, init="invariant")
    repeats = steps.tensors[1].numel() / n
    assert math.isclose(steps.tensors[0].square().mean(), plain * repeats, rel_tol=1e-9)


def test_one_integer_gives_a_vector_the_entries_of_one_projection():
    net = uni_lora((12, 12, 4, 768, 64), 4, device="meta")
    assert (net.ranks, net.vectors, net.count()) == ({"r": 4}, {"n": 4 * (768 + 768)}, 6_144)
    for rank in ({"r": 4, "n": 4096}, (4, 4096)):
        assert uni_lora((12, 12, 4, 768, 64), rank, device="meta").count() == 4096


def test_a_vector_has_at_most_as_many_numbers_as_entries():
    with pytest.warns(UserWarning, match="cut: n from 99 to 18"):
        net = network("in r (of n), out r (of n, zero)", {"in": 5, "out": 4}, {"r": 2, "n": 99})
    assert net.vectors == {"n": 18}
    square = sum(tensor.square().sum() for tensor in net.tensors)
    torch.testing.assert_close(square, net.theta_n.square().sum())


# --- beside other marks, and other operations -------------------------------------------------------


def test_a_tied_term_uses_the_entries_again():
    shape = {"layer": 2, "matrix": 3, "in": 4, "out": 4}
    net = network("in r (of n), out r (tied), layer matrix r", shape, (3, 5), init="normal")
    first, again, _ = net.tensors
    assert first is again
    assert net.legs.holders == (0, 0, 2)
    assert net.count() == 5 + 18
    torch.testing.assert_close(net.theta_n.norm(), first.norm())  # once, though it is used twice
    assert torch.equal(net.dense(), net.dense().transpose(2, 3))


def test_a_sum_has_ordinary_parameters():
    one, two = drawn(LINES[0], seed=0), drawn(LINES[0], seed=1)
    total = direct_sum([one, two], [2.0, -0.5])
    assert not total.vectors
    assert total.ranks == {"r": 4}
    torch.testing.assert_close(total.dense(), 2 * one.dense() - 0.5 * two.dense())


def test_tensorly_gets_the_entries_with_their_gradient():
    line = "layer r, in r (of n), out r (of n)"
    net = network(line, {"layer": 2, "in": 5, "out": 4}, (3, 6), init="normal")
    obj = net.to_tensorly()
    torch.testing.assert_close(from_tensorly(obj).dense(), net.dense())
    obj.factors[1].sum().backward()
    assert net.theta_n.grad.any()


def test_only_the_zero_parameter_may_be_hashed_where_a_start_follows_a_tensor():
    target = torch.randn(2, 5, 4, generator=generator())
    shape = {"layer": 2, "in": 5, "out": 4}

    def started(line):
        rank = {"p": 2, "q": 2, "n": 4}
        return network(line, shape, rank, init=start_along(target, "layer in out"))

    assert not started("in p, layer p q (of n, zero), out q").dense().any()
    with pytest.raises(ValueError, match="hashed parameter cannot follow"):
        started("in p (of n), layer p q (zero), out q")


def test_no_start_is_zero_where_all_share_one_vector():
    with pytest.raises(ValueError, match="hashed together with others"):
        drawn(LINES[0], init="invariant")
    assert drawn(LINES[0], init="normal").dense().any()


# --- the notation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("in r (of n), out r (of n)", "in r (of n), out r (of n)"),
        ("in r (of n, zero), out r", "in r (of n) (zero), out r"),
        ("in r (frozen, of n, seed 7), out r", "in r (of n, seed 7) (frozen), out r"),
        ("in r (of n), out r (of n) (seed 3)", "in r (of n, seed 3), out r (of n, seed 3)"),
        ("in r (of n, seed 0), out r", "in r (of n), out r"),
    ],
)
def test_lines_are_read_and_printed(line, printed):
    legs = Legs.parse(line)
    assert str(legs) == printed
    assert Legs.parse(printed) == legs


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("in r (of 3), out r", r"\(of 3\) names no vector; give it a name, as in \(of n\)"),
        ("in r (of), out r", r"\(of\) names no vector"),
        ("in r (off n), out r", r"unknown mark \(off n\).*\(of n\)"),
        ("in r (of r), out r", "'r' is a bond; choose another name"),
        ("in r (of in), out r", "'in' is a mode; choose another name"),
        ("in r (of layer), out r", "'layer' is a mode"),
        ("in r (of n, of m), out r", "one parameter is hashed from one vector"),
        ("in r (seed 3), out r", "a seed .* stands beside the vector"),
        ("in r (of n, seed x), out r", r"unknown mark \(seed x\)"),
        ("in r (of n, seed -1), out r", r"unknown mark \(seed -1\)"),
        (
            "in r (of n, seed 1), out r (of n, seed 2)",
            "one seed for all its parameters; found 1 and 2",
        ),
        ("in r (of n, frozen), out r (of n)", "all or none are"),
        ("in r, out r (tied, of n)", r"\(tied\) stands alone"),
        (
            "in r (of n, zero), out r (of n, zero)",
            r"one trainable parameter can be marked \(zero\)",
        ),
    ],
)
def test_wrong_marks_are_refused_with_the_reason(line, says):
    with pytest.raises(LegsError, match=says):
        Legs.parse(line).check(["in", "out"])


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ({"r": 2, "n": 0}, "size of vector 'n' must be an integer >= 1; found 0"),
        ({"r": 2, "m": 3}, "ranks were given for r, m; the bonds and vectors are r, n"),
        ((2,), r"1 ranks were given, \(2,\); the bonds and vectors are r, n"),
        ({"r": 2, "n": 1}, "'n' has 1 numbers for 18 entries; it can have 2 to 18"),
    ],
)
def test_wrong_sizes_are_refused_with_the_reason(rank, says):
    with pytest.raises(ValueError, match=says):
        network("in r (of n), out r (of n, zero)", {"in": 5, "out": 4}, rank)


def test_a_network_takes_the_vector_and_the_sizes_that_no_tensor_shows():
    net = drawn(LINES[0])
    theta = net.theta_n.detach().clone()
    twin = Network(LINES[0], [theta, theta], net.modes, sizes=net.sizes)
    assert torch.equal(twin.dense(), net.dense())
    with pytest.raises(LegsError, match="only hashed parameters carry layer, matrix, in, r"):
        Network(LINES[0], [theta, theta], net.modes)
    with pytest.raises(LegsError, match="is hashed from the vector 'n', but its tensor has shape"):
        Network(LINES[0], net.tensors, net.modes, sizes=net.sizes)
    with pytest.raises(ValueError, match="was given other numbers"):
        Network(LINES[0], [theta, 2 * theta], net.modes, sizes=net.sizes)
