"""ResNet backbones from torchvision's blocks, with a choice of stem and of base width."""

from torch import nn
from torchvision.models import resnet

from models import BACKBONES


class ResNet(nn.Module):
    """He et al. (CVPR 2016): images [N, 3, S, S] -> features [N, feature_dim].

    At width 64 and with the "imagenet" stem the state_dict is that of torchvision's resnet of the same name
    without fc (there is no resnet10). The "cifar" stem, for images of up to 64 pixels, is a 3x3 convolution
    of stride 1 and padding 2 without max-pooling, and with torch's own initialisation, as in the released PNR
    and CaSSLe code."""

    def __init__(self, block, layers, width=64, stem="imagenet"):
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=2, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels = width
        for stage, count in enumerate(layers):
            planes = width * 2**stage
            blocks = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_block(block, channels, planes, stride))
                channels = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = channels
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and (stem, name) != ("cifar", "conv1"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def _block(block, channels, planes, stride):
    downsample = None
    if stride != 1 or channels != planes * block.expansion:
        out = planes * block.expansion
        downsample = nn.Sequential(resnet.conv1x1(channels, out, stride), nn.BatchNorm2d(out))
    return block(channels, planes, stride, downsample)


def build_backbone(name, width=64, stem="imagenet"):
    """A ResNet of that name; see models/__init__.py. Bottleneck blocks keep torchvision's base width of 64
    per group."""
    block, layers = BACKBONES[name]
    return ResNet(getattr(resnet, block), layers, width, stem)
