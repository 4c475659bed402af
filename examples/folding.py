"""Protein structures: chains from files, a loss and scores, and an ESMFold whose language model learns.

Coordinates are in ångström. A backbone is a tensor of shape (..., residues, 3, 3): the atoms N, CA and
C of each residue, and their x, y and z. Beside it, ``known`` (..., residues) says which residues have
all three; what stands elsewhere in the backbone is not read.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from Bio.Data.PDBData import protein_letters_3to1_extended
from Bio.PDB.MMCIFParser import MMCIFParser
from Bio.PDB.PDBExceptions import PDBConstructionException
from Bio.PDB.PDBParser import PDBParser
from Bio.PDB.Polypeptide import PPBuilder
from Bio.SVDSuperimposer import SVDSuperimposer
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import EsmConfig, EsmForProteinFolding, Trainer
from transformers.models.esm.openfold_utils import residue_constants

ATOMS = ("N", "CA", "C")
#: A chain with fewer known residues is a ligand or a fragment, and left out.
SHORTEST = 16
#: Unknown residues that at most stand for a gap: ESMFold tells no longer distances apart.
LONGEST_GAP = 32


# Chains


@dataclass(frozen=True)
class Chain:
    """A chain of a structure.

    Attributes:
        name: the file's stem and the chain's letter.
        sequence: one letter a residue; ``X`` for one that is not known, or not one of the twenty.
        backbone: (residues, 3, 3), float32; zeros where not known.
        known: (residues,), bool.
    """

    name: str
    sequence: str
    backbone: Tensor
    known: Tensor

    def first(self, length: int) -> Chain:
        """The chain up to that many residues."""
        parts = self.sequence[:length], self.backbone[:length], self.known[:length]
        return Chain(self.name, *parts)


def read(file: Path) -> list[Chain]:
    """The proteins in a PDB or mmCIF file, by Biopython.

    Of several models (NMR) the first is taken, and of chains with one sequence the first. A chain is
    the residues that are seen, in pieces of bonded ones; between two pieces stand unknown residues,
    as many as the numbering says, at most `LONGEST_GAP`. Modified residues count as
    those they were made from (selenomethionine as M).

    Args:
        file: ``.cif``, or ``.pdb`` or ``.ent``.

    Returns:
        Chains with `SHORTEST` known residues or more; there may be none.

    Raises:
        ValueError: the file holds no structure that Biopython can read.
    """
    # An mmCIF file numbers residues by their place in the whole sequence, so its gaps are true ones.
    cif = file.suffix == ".cif"
    parser: Any = MMCIFParser(QUIET=True, auth_residues=False) if cif else PDBParser(QUIET=True)
    try:
        model = next(iter(parser.get_structure(file.stem, str(file))))
    except (KeyError, ValueError, StopIteration, PDBConstructionException) as error:
        raise ValueError(f"{file}: no structure could be read ({error!r})") from error
    found: dict[str, Chain] = {}
    for part in model:
        residues: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each modified residue
            pieces = PPBuilder().build_peptides(part, aa_only=False)
        for piece in pieces:
            if residues:
                gap = piece[0].id[1] - residues[-1].id[1] - 1
                residues += [None] * min(max(gap, 0), LONGEST_GAP)
            residues += piece
        chain = _chain(f"{file.stem} {part.id}", residues)
        if chain.known.sum() >= SHORTEST:
            found.setdefault(chain.sequence, chain)
    return list(found.values())


def _chain(name: str, residues: Sequence[Any]) -> Chain:
    backbone, known, sequence = torch.zeros(len(residues), 3, 3), [], ""
    for place, residue in enumerate(residues):
        known.append(residue is not None and all(atom in residue for atom in ATOMS))
        letter = protein_letters_3to1_extended.get(residue.resname, "X") if residue else "X"
        sequence += letter if letter in residue_constants.restype_order else "X"
        if known[-1]:
            backbone[place] = torch.tensor([residue[atom].coord.tolist() for atom in ATOMS])
    return Chain(name, sequence, backbone, torch.tensor(known, dtype=torch.bool))


def read_folder(folder: Path) -> list[Chain]:
    """The chains of all ``.pdb``, ``.ent`` and ``.cif`` files of a folder, by name of the file.

    Raises:
        ValueError: there are none, or a file cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".pdb", ".ent", ".cif"))
    found = [chain for file in files for chain in read(file)]
    if not found:
        raise ValueError(f"{folder}: no protein chains in {len(files)} PDB and mmCIF files")
    return found


def collate(chains: Sequence[Chain]) -> dict[str, Tensor]:
    """A batch, padded to its longest chain.

    Returns:
        ``input_ids`` and ``attention_mask`` (chains, residues) as `EsmForProteinFolding` takes them,
        which has AlphaFold's numbers of the amino acids; ``backbone`` and ``known``.
    """
    order = residue_constants.restype_order_with_x
    numbers = [torch.tensor([order[letter] for letter in chain.sequence]) for chain in chains]
    columns = {
        "input_ids": numbers,
        "attention_mask": [torch.ones_like(row) for row in numbers],
        "backbone": [chain.backbone for chain in chains],
        "known": [chain.known for chain in chains],
    }
    return {name: pad_sequence(column, batch_first=True) for name, column in columns.items()}


# Loss and scores


def frames(backbone: Tensor) -> tuple[Tensor, Tensor]:
    """The frame of each residue: x towards C, y in the plane of N, origin in CA.

    By Gram-Schmidt, algorithm 21 of Jumper et al., Nature 596, 583 (2021), supplement 1.8.1.

    Args:
        backbone: (..., residues, 3, 3).

    Returns:
        Rotations (..., residues, 3, 3), whose columns are the axes, and origins (..., residues, 3).
    """
    n, origin, c = backbone.unbind(-2)
    x = normalize(c - origin, dim=-1)
    towards = n - origin
    y = normalize(towards - (towards * x).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1), origin


def fape(
    found: Tensor,
    true: Tensor,
    known: Tensor,
    clamp: float = 10.0,
    scale: float = 10.0,
    eps: float = 1e-4,
) -> Tensor:
    """Frame aligned point error of backbones.

    How far each backbone atom is from where it should be, as seen from the frame of each residue:
    algorithm 28 of Jumper et al., Nature 596, 583 (2021), supplement 1.9.2. It sees a mirror image.

    Args:
        found: (..., residues, 3, 3).
        true: a backbone of the same shape, or one that broadcasts with it.
        known: (..., residues), of ``true``.
        clamp: the greatest error, in Å.
        scale: the error that counts 1, in Å.
        eps: keeps the gradient finite; the error of a perfect answer is its root over ``scale``.

    Returns:
        The mean error of each structure, without unit; nan where nothing is known.
    """

    def seen(backbone: Tensor) -> Tensor:
        turn, origin = frames(backbone)
        points = backbone.flatten(-3, -2)
        return (points.unsqueeze(-3) - origin.unsqueeze(-2)) @ turn  # rows of R^T (x - origin)

    error = ((seen(found) - seen(true)).square().sum(-1) + eps).sqrt().clamp(max=clamp)
    counts = (known.unsqueeze(-1) & known.repeat_interleave(3, dim=-1).unsqueeze(-2)).to(error)
    return (error * counts).sum((-2, -1)) / counts.sum((-2, -1)) / scale


def lddt(
    found: Tensor,
    true: Tensor,
    known: Tensor,
    radius: float = 15.0,
    thresholds: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
) -> Tensor:
    """Local distance difference test of one atom a residue.

    The share of distances below ``radius`` in the true structure that the found one keeps to within
    a threshold, on average over thresholds: Mariani et al., Bioinformatics 29, 2722 (2013), without
    their check of the stereochemistry. It does not see a mirror image.

    Args:
        found: (..., residues, 3), such as the CA atoms.
        true: coordinates of the same shape, or such that broadcast with them.
        known: (..., residues), of ``true``.
        radius: of inclusion, in Å.
        thresholds: in Å.

    Returns:
        Between 0 and 1 for each structure; nan where no distance counts.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the other way loses half of the digits
    wanted = torch.cdist(true, true, compute_mode=exact)
    change = (torch.cdist(found, found, compute_mode=exact) - wanted).abs()
    counts = (wanted < radius) & known.unsqueeze(-1) & known.unsqueeze(-2)
    counts = counts & ~torch.eye(true.shape[-2], dtype=torch.bool, device=true.device)
    kept = torch.stack([(change < threshold) & counts for threshold in thresholds])
    return kept.sum((-2, -1)).to(wanted).mean(0) / counts.sum((-2, -1))


def rmsd(found: Tensor, true: Tensor, known: Tensor) -> float:
    """Root mean square deviation in Å after the best superposition, without mirroring.

    By Biopython (Kabsch, Acta Cryst. A 32, 922 (1976), by singular values).

    Args:
        found: (residues, 3), such as the CA atoms.
        true: (residues, 3).
        known: (residues,), of ``true``.
    """
    pair = SVDSuperimposer()
    pair.set(true[known].double().cpu().numpy(), found[known].double().cpu().numpy())
    pair.run()
    return float(pair.get_rms())


# The model


class Folding(EsmForProteinFolding):
    """ESMFold with a gradient to its language model.

    The released forward detaches what the language model says: ESMFold was trained with a frozen
    one. Here the first layer after that cut gets the same numbers with their gradient. All else is
    the released code, and so are the structures.
    """

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        self.said: Tensor | None = None
        self.esm_s_mlp.register_forward_pre_hook(self._with_gradient)

    def compute_language_model_representations(self, esmaa: Tensor) -> Tensor:
        """What every layer of the language model says, (chains, residues, layers + 1, width)."""
        said: Tensor = super().compute_language_model_representations(esmaa)
        self.said = said
        return said

    def _with_gradient(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        said, self.said = self.said, None  # keep no graph beyond this forward
        assert said is not None
        mixed = (self.esm_s_combine.softmax(0).unsqueeze(0) @ said.to(inputs[0].dtype)).squeeze(2)
        return (mixed,)


def pretrained(name: str, recompute: bool = False) -> Folding:
    """An ESMFold in float32, frozen.

    Args:
        name: folder or name on the hub, such as ``facebook/esmfold_v1``.
        recompute: compute the trunk's blocks again in the backward pass. Their pairs of residues
            are most of the memory.
    """
    config: Any = EsmConfig.from_pretrained(name)
    config.esmfold_config.fp16_esm = False
    model = Folding.from_pretrained(name, config=config, dtype=torch.float32)
    if recompute:
        for block in model.trunk.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return _frozen(model)


def small(seed: int = 0) -> Folding:
    """A small ESMFold with random weights, in float32, frozen; the same for the same seed."""
    config = EsmConfig(
        vocab_size=33,
        pad_token_id=1,
        mask_token_id=32,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        initializer_range=0.1,  # signals neither die nor explode on their way through
        position_embedding_type="rotary",
        token_dropout=True,
        is_folding_model=True,
        esmfold_config={
            "fp16_esm": False,
            "trunk": {
                "num_blocks": 2,
                "sequence_state_dim": 64,
                "pairwise_state_dim": 16,
                "sequence_head_width": 16,
                "pairwise_head_width": 8,
                "chunk_size": None,
                "structure_module": {
                    "sequence_dim": 64,
                    "pairwise_dim": 16,
                    "ipa_dim": 8,
                    "resnet_dim": 32,
                    "num_heads_ipa": 4,
                    "num_blocks": 1,  # a second one, being random, would undo the first one's work
                },
            },
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _frozen(Folding(config))


def _frozen(model: Folding) -> Folding:
    frozen: Folding = model.requires_grad_(False).eval()
    return frozen


def fold(model: Any, batch: dict[str, Tensor], recycles: int) -> Tensor:
    """Backbones after each block of the structure module, (blocks, chains, residues, 3, 3).

    Args:
        model: an ESMFold.
        batch: of `collate`, on the model's device.
        recycles: passes through the trunk before the last, which alone has a gradient.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    positions: Tensor = model(**inputs, num_recycles=recycles).positions
    return positions[..., :3, :]  # of the 14 places for a residue's atoms the first are N, CA, C


def loss(backbones: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """`fape` of each chain, on average over the blocks of the structure module, (chains,).

    Every block has a share, as in the auxiliary loss of AlphaFold's structure module (algorithm 20).
    """
    return fape(backbones, batch["backbone"], batch["known"]).mean(0)


class FoldingTrainer(Trainer):
    """Trains the language model of an ESMFold on structures.

    The Trainer's model is the language model with its adapter; the rest of the ESMFold is a fixed
    function of what that says, and stays in evaluation mode.

    Args:
        folding: the ESMFold.
        recycles: as for `fold`.
        more: arguments of `transformers.Trainer`.
    """

    def __init__(self, folding: Folding, recycles: int, **more: Any) -> None:
        super().__init__(**more)
        self.folding: Any = folding
        self.recycles = recycles
        nn.Module.to(self.folding, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of `loss` over a batch; see `transformers.Trainer.compute_loss`."""
        self.folding.esm = model  # as the Trainer wraps it: processes must share their gradients
        backbones = fold(self.folding, inputs, self.recycles)
        found = loss(backbones, inputs).mean()
        return (found, {"backbones": backbones}) if return_outputs else found


@torch.no_grad()
def scores(model: Folding, chains: Sequence[Chain], recycles: int) -> list[dict[str, Any]]:
    """Of each chain its name, `loss`, and `lddt` and `rmsd` (in Å) of the CA atoms."""
    model.eval()
    rows = []
    for chain in chains:
        batch = {name: column.to(model.device) for name, column in collate([chain]).items()}
        backbones = fold(model, batch, recycles)
        atoms = backbones[-1, 0, :, 1], batch["backbone"][0, :, 1], batch["known"][0]
        row = float(loss(backbones, batch)), float(lddt(*atoms)), rmsd(*atoms)
        rows.append({"chain": chain.name, **dict(zip(("loss", "lDDT", "RMSD"), row))})
    return rows
