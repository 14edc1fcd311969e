"""The norms that a conversion can put into a model, by kind. All are built with the arguments of `Affine`."""

from torch import nn

from normswap.norms.affine import Affine
from normswap.norms.carried import CarriedAffine, CarriedLayerNorm, CarriedRMSNorm, Recovered
from normswap.norms.gated import GatedLayerNorm, GatedRMSNorm
from normswap.norms.layer_norm import LayerNorm
from normswap.norms.rms_norm import RMSNorm

KINDS: dict[str, type[nn.Module]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "affine": Affine,
    "none": nn.Identity,
    "carried-rmsnorm": CarriedRMSNorm,
    "carried-layernorm": CarriedLayerNorm,
    "carried-affine": CarriedAffine,
    "recovered": Recovered,
    "gated-rmsnorm": GatedRMSNorm,
    "gated-layernorm": GatedLayerNorm,
}
