"""From a request to a calibrated plan: norms that move first, then norms that are fitted, then those put in."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from normswap.calibration.data import Data
from normswap.calibration.inserted import fit_inserted
from normswap.calibration.moves import Make, calibrated_moves
from normswap.calibration.norms import fit_norms
from normswap.calibration.rotations import fit_rotations
from normswap.planning.plans import Plan
from normswap.planning.request import Request
from normswap.understand.normmap import NormMap


def calibrated(normmap: NormMap, request: Request, make: Make, data: Data, moves: bool) -> Plan:
    """The plan that `make` gives, with what it leaves open fitted to what the model does on data.

    The same model and batches give the same plan, bit for bit, on one machine. Costs two more copies of the model and
    what the fits of one block or norm need.

    Args:
        moves: whether norms move in a form that has constants to find.

    Raises:
        RefusedError: as `make`; or no layer can be moved within the budget of `--layers auto:KL`.
    """
    if _halves(data.model):
        data = replace(data, model=copy.deepcopy(data.model).float())
    plan = calibrated_moves(normmap, request, make, data) if moves else make(request, None)[0]
    return fit_inserted(fit_norms(normmap, fit_rotations(normmap, plan, data), data), data)


def _halves(model: nn.Module) -> bool:
    return any(p.is_floating_point() and torch.finfo(p.dtype).bits < 32 for p in model.parameters())
