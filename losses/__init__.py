"""One file per SSL method, one file per regulariser, one line for each in these registries.

A method gives its losses once, and a regulariser is written once for all methods: N + M files, not N x M.
"""

from losses.cassle import CaSSLe
from losses.finetune import Finetune
from losses.moco import MoCo
from losses.pnr import PNR

METHODS = {"moco": MoCo}
REGULARIZERS = {"finetune": Finetune, "cassle": CaSSLe, "pnr": PNR}

__all__ = ["METHODS", "REGULARIZERS"]
