"""One file per SSL method, one file per regulariser, one line for each in these registries.

A method gives its losses once, and a regulariser is written once for all methods: N + M files, not N x M.
"""

from losses.barlow import BarlowTwins
from losses.byol import BYOL
from losses.cassle import CaSSLe
from losses.falcon import FALCON
from losses.finetune import Finetune
from losses.moco import MoCo
from losses.pnr import PNR
from losses.simclr import SimCLR
from losses.vicreg import VICReg

METHODS = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "vicreg": VICReg,
    "barlow": BarlowTwins,
    "falcon": FALCON,
}
REGULARIZERS = {"finetune": Finetune, "cassle": CaSSLe, "pnr": PNR}

__all__ = ["METHODS", "REGULARIZERS"]
