"""One file per SSL method, one file per regulariser, one line for each in these registries: the name, which
is the file's, and the class in it. A method gives its losses once and a regulariser is written once for all
methods: N + M files, not N x M."""

from importlib import import_module

METHODS = {
    "simclr": "SimCLR",
    "moco": "MoCo",
    "byol": "BYOL",
    "vicreg": "VICReg",
    "barlow": "BarlowTwins",
    "falcon": "FALCON",
}
REGULARIZERS = {"finetune": "Finetune", "cassle": "CaSSLe", "pnr": "PNR"}


def find(name):
    """The class of a method or regulariser; its file is read now, since flags are parsed before PyTorch
    is."""
    return getattr(import_module(f"losses.{name}"), (METHODS | REGULARIZERS)[name])
