"""The online probe of the papers' CIFAR tables: a linear classifier over all classes that learns beside the
network."""

import torch
import torch.nn.functional as F
from torch import nn

from models.parallel import full_precision, gather


class OnlineProbe(nn.Module):
    """Learns from labelled images of all tasks, and passes no gradient on to the network.

    mode: in which the labelled images pass through the backbone. "clean", eval mode: the network is trained
    as without the probe. "released", as in the released PNR and CaSSLe code: training mode, also through the
    momentum encoder where the method has one, so that the running statistics of both see the classes of all
    tasks, later ones too."""

    def __init__(self, feature_dim, num_classes, mode):
        super().__init__()
        self.classifier, self.mode = nn.Linear(feature_dim, num_classes), mode

    @torch.no_grad()
    def features(self, method, images):
        """Of images [N, 3, S, S]: [N, F]."""
        if self.mode == "released":
            if method.ema is not None:
                method.momentum_encoder["backbone"](images)  # for its running statistics
            return method.backbone(images)
        method.backbone.eval()
        features = method.backbone(images)
        method.backbone.train()
        return features

    def forward(self, features, labels):
        """Of this rank's share: features [N/world, F], labels int64 [N/world], -1 for none -> for the global
        batch {"online_loss": mean cross-entropy, "online_accuracy": in %}."""
        logits, labels = self.classifier(gather(full_precision(features))), gather(labels)
        known = (labels >= 0).sum().clamp(min=1)
        accuracy = 100 * (logits.detach().argmax(dim=1) == labels).sum().to(logits.dtype) / known
        return {"online_loss": F.cross_entropy(logits, labels, ignore_index=-1), "online_accuracy": accuracy}

    @torch.no_grad()
    def predict(self, features):
        """Classes int64 [M] of features [M, F]."""
        return self.classifier(features).argmax(dim=1)
