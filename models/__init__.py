"""Networks: backbones, heads, the queue, frozen copies, and what makes several ranks compute as one."""

from models.resnet import BACKBONES, build_backbone

__all__ = ["BACKBONES", "build_backbone"]
