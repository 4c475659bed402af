"""The loss and the scores of structures, chains from files, and the gradient into ESMFold."""

import copy
import random

import pytest
import torch
from folding import (
    Folding,
    collate,
    fape,
    fold,
    frames,
    lddt,
    loss,
    pretrained,
    read,
    read_folder,
    rmsd,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EsmForProteinFolding

FEW = settings(deadline=None, max_examples=30, derandomize=True)


@st.composite
def pairs(draw):
    """Two backbones in float64, what is known of them, and a rigid motion."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    length, spread = draw(st.integers(4, 12)), draw(st.sampled_from([0.5, 2.0, 4.0]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true, found = spread * normal(length, 3, 3), spread * normal(length, 3, 3)
    known = torch.rand(length, generator=generator) < 0.7
    known[:3] = True
    turn, _ = torch.linalg.qr(normal(3, 3))
    turn[:, 0] *= turn.det()
    return found, true, known, turn, 50 * normal(3)


def scores(found, true, known):
    atoms = found[:, 1], true[:, 1], known
    return torch.tensor([fape(found, true, known), lddt(*atoms), rmsd(*atoms)])


@FEW
@given(pairs())
def test_scores_do_not_change_when_a_structure_is_moved(pair):
    found, true, known, turn, shift = pair
    before = scores(found, true, known)
    torch.testing.assert_close(scores(found @ turn.T + shift, true, known), before)
    torch.testing.assert_close(scores(found, true @ turn.T + shift, known), before)


@FEW
@given(pairs())
def test_a_structure_has_no_error_against_itself(pair):
    _, true, known, turn, shift = pair
    moved = true @ turn.T + shift
    # Of fape the root of eps over the scale.
    best = torch.tensor([1e-3, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(scores(moved, true, known), best, atol=1e-6, rtol=0)
    assert fape(moved, true, known, eps=0.0) < 1e-9


@FEW
@given(pairs())
def test_a_mirror_image_is_seen_by_all_but_lddt(pair):
    _, true, known, _, _ = pair
    known = torch.ones_like(known)  # three points are their own mirror image
    mirrored = true * torch.tensor([1.0, 1.0, -1.0])
    error, kept, distance = scores(mirrored, true, known)
    assert error > 0.01
    assert kept == 1
    assert distance > 1e-3


@FEW
@given(pairs())
def test_superposition_is_the_best_rotation(pair):
    found, true, known, turn, _ = pair
    a, b = (x[known, 1] - x[known, 1].mean(0) for x in (found, true))
    best = rmsd(found[:, 1], true[:, 1], known)
    for rotation in (torch.eye(3, dtype=torch.float64), turn, turn.T):
        assert best <= (a @ rotation - b).square().sum(-1).mean().sqrt() + 1e-9
    # The least sum of squares: |a|^2 + |b|^2 - 2 (s1 + s2 +- s3), s3 against us where a mirror would help.
    u, s, v = torch.linalg.svd(a.T @ b)
    s[2] *= torch.sign(u.det() * v.det())
    least = (a.square().sum() + b.square().sum() - 2 * s.sum()).clamp(min=0)
    assert best == pytest.approx(float((least / len(a)).sqrt()), abs=1e-6)


@FEW
@given(pairs())
def test_lddt_counts_pair_by_pair(pair):
    found, true, known, _, _ = pair
    found, true = found[:, 1], true[:, 1]
    kept = counted = 0
    for i in range(len(true)):
        for j in range(len(true)):
            wanted = float(torch.dist(true[i], true[j]))
            if i != j and known[i] and known[j] and wanted < 15.0:
                counted += 4
                off = abs(float(torch.dist(found[i], found[j])) - wanted)
                kept += sum(off < threshold for threshold in (0.5, 1.0, 2.0, 4.0))
    assert float(lddt(found, true, known)) == pytest.approx(kept / counted, abs=1e-12)
    assert lddt(found, 1e3 * true, known).isnan()  # no distance below the radius


@FEW
@given(pairs())
def test_fape_counts_frame_by_frame(pair):
    found, true, known, _, _ = pair
    (turns, origins), (true_turns, true_origins) = frames(found), frames(true)
    errors = []
    for i in known.nonzero()[:, 0]:
        for j in known.nonzero()[:, 0]:
            for atom in range(3):
                here = turns[i].T @ (found[j, atom] - origins[i])
                there = true_turns[i].T @ (true[j, atom] - true_origins[i])
                errors.append(min(10.0, float(((here - there).square().sum() + 1e-4).sqrt())))
    assert float(fape(found, true, known)) == pytest.approx(sum(errors) / len(errors) / 10)


@FEW
@given(pairs())
def test_what_is_not_known_does_not_count(pair):
    found, true, known, _, _ = pair
    before = scores(found, true, known)
    blank, wild = true.clone(), found.clone()
    blank[~known], wild[~known] = 0.0, 1e3
    torch.testing.assert_close(scores(wild, blank, known), before)


def test_frames_are_rotations_with_their_axes_where_they_are_said_to_be():
    backbone = torch.randn(5, 3, 3, dtype=torch.float64)
    turn, origin = frames(backbone)
    torch.testing.assert_close(turn.mT @ turn, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    torch.testing.assert_close(turn.det(), torch.ones(5, dtype=torch.float64))
    n, ca, c = ((backbone - origin[:, None]) @ turn).unbind(1)
    assert ca.abs().max() == 0
    assert (c[:, 0] > 0).all()
    assert c[:, 1:].abs().max() < 1e-12
    assert (n[:, 1] > 0).all()
    assert n[:, 2].abs().max() < 1e-12


def test_fape_is_clamped_and_has_a_gradient_at_the_answer():
    true, known = torch.randn(6, 3, 3), torch.ones(6, dtype=torch.bool)
    found = true.clone().requires_grad_(True)
    fape(found, true, known).backward()
    assert found.grad.isfinite().all()
    far = true + 1e4 * torch.arange(6)[:, None, None]
    assert 0.8 < fape(far, true, known) <= 1
    assert fape(far, true, known, clamp=1e9) > 100


# Chains from files


def test_gaps_and_modified_residues_of_a_file(asset, tmp_path):
    from Bio.PDB.MMCIFParser import MMCIFParser
    from Bio.PDB.PDBIO import PDBIO

    structure = MMCIFParser(QUIET=True).get_structure("x", str(asset("chains") / "1A8O.cif"))
    (whole,) = read(asset("chains") / "1A8O.cif")
    part = structure[0]["A"]
    numbers = [residue.id for residue in part]
    for number in numbers[10:15]:
        part.detach_child(number)
    part[numbers[30]].detach_child("CA")
    (tmp_path / "notes.txt").write_text("not a structure")
    writer = PDBIO()
    writer.set_structure(structure)
    writer.save(str(tmp_path / "cut.pdb"))

    (cut,) = read_folder(tmp_path)
    expected = whole.known.clone()
    assert expected.all()
    expected[[10, 11, 12, 13, 14, 30]] = False
    assert cut.known.tolist() == expected.tolist()
    assert cut.sequence[10:15] == "XXXXX"
    assert cut.sequence[:10] + cut.sequence[15:] == whole.sequence[:10] + whole.sequence[15:]
    assert whole.sequence[0] == "M"  # selenomethionine in the file
    torch.testing.assert_close(cut.backbone[expected], whole.backbone[expected])
    assert cut.name == "cut A"
    assert len(cut.first(12).sequence) == len(cut.first(12).backbone) == 12


def test_files_without_a_structure_are_named(tmp_path):
    for name in ("none.cif", "none.pdb"):
        (tmp_path / name).write_text("data_none\n")
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="no protein chains in 0"):
        read_folder(tmp_path.parent / tmp_path.name / "..")


def test_backbones_of_real_chains_have_the_bonds_of_proteins(asset):
    for chain in read_folder(asset("chains")):
        n, ca, c = chain.backbone.unbind(1)
        assert chain.known.all()
        assert ((ca - n).norm(dim=-1) - 1.46).abs().max() < 0.1
        assert ((c - ca).norm(dim=-1) - 1.53).abs().max() < 0.1
        assert ((n[1:] - c[:-1]).norm(dim=-1) - 1.33).abs().max() < 0.1


# ESMFold


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def chains():
    from folding import Chain

    found = []
    for length in (12, 9):
        letters = "".join(random.Random(length).choices("ARNDCQEGHILKMFPSTWYVX", k=length))
        found.append(Chain("x", letters, 5 * torch.randn(length, 3, 3), torch.ones(length) > 0))
    return found


def test_the_released_forward_with_a_gradient_to_the_language_model(model, chains):
    released = EsmForProteinFolding(copy.deepcopy(model.config)).eval()
    released.load_state_dict(model.state_dict())
    batch = collate(chains)
    assert set(batch["input_ids"].flatten().tolist()) <= set(range(21))
    with torch.no_grad():
        assert torch.equal(fold(model, batch, 1), fold(released, batch, 1))
    weights = []
    for one in (model, released):
        weights.append(one.esm.encoder.layer[0].attention.self.query.weight)
        weights[-1].requires_grad_(True)
        loss(fold(one, batch, 1), batch).sum().backward()
    assert weights[0].grad.abs().max() > 0
    assert weights[1].grad is None  # else `Folding` is no longer needed
    weights[0].requires_grad_(False).grad = None


def test_chains_of_a_batch_do_not_see_each_other(model, chains):
    with torch.no_grad():
        both = loss(fold(model, collate(chains), 0), collate(chains))
        alone = [loss(fold(model, collate([one]), 0), collate([one])) for one in chains]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_half_precision_checkpoint_trains_in_float32_and_recomputes(model, chains, tmp_path):
    config = copy.deepcopy(model.config)
    config.esmfold_config.trunk.structure_module.num_blocks = 2  # of the same weights
    stored = Folding(config)
    stored.load_state_dict(model.state_dict())
    stored.config.esmfold_config.fp16_esm = True
    stored.esm.half()
    stored.save_pretrained(tmp_path)
    batch, got = collate(chains), []
    for recompute, chunk in ((False, None), (True, 5)):
        again = pretrained(str(tmp_path), recompute)
        again.trunk.set_chunk_size(chunk)
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in again.parameters())
        weight = again.esm.encoder.layer[0].attention.self.query.weight
        weight.requires_grad_(True)
        backbones = fold(again, batch, 0)
        assert backbones.shape == (2, 2, 12, 3, 3)
        loss(backbones, batch).sum().backward()
        got.append(weight.grad)
    assert got[0].abs().max() > 0
    torch.testing.assert_close(got[0], got[1])
