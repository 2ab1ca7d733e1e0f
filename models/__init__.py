"""Networks: backbones, heads, the queue, frozen copies, and what makes several ranks compute as one."""

from models.resnet import BACKBONES, STEMS, build_backbone

__all__ = ["BACKBONES", "STEMS", "build_backbone"]
