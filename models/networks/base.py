"""`Network`: the base class of all networks, with the outputs that a bundle needs from one pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Network(nn.Module, ABC):
    """Maps normalised images [N,C,H,W] to logits [N,K], as `classify(pool(forward_features(x)))`.

    A subclass sets `head`, its last linear layer (D to K), and defines `forward_features`. Where
    `spatial` is true, the features are maps [N,D,h,w], which `pool` reduces to [N,D], so there are
    class-activation maps. Otherwise the features are [N,D] already.
    """

    head: nn.Linear

    spatial = True
    """Whether features are maps [N,D,h,w]."""

    logit_scale = 1.0
    """Factor of the logits."""

    dropout = 0.0
    """Probability of dropout on the embedding, in training."""

    prepare: Callable[[Tensor], None] | None = None
    """Sets weights from normalised training images [n,C,H,W] before training; None: has none."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to features: [N,D,h,w] where spatial, else [N,D]."""

    def pool(self, features: Tensor) -> Tensor:
        """Reduce features to embeddings [N,D]; by default with global average pooling."""
        return features.mean((2, 3)) if self.spatial else features

    def classify(self, embedding: Tensor) -> Tensor:
        """Map embeddings [N,D] to logits [N,K]."""
        if self.dropout:
            embedding = nn.functional.dropout(embedding, self.dropout, self.training)
        return self.head(embedding) * self.logit_scale

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to logits [N,K]."""
        return self.classify(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Map images [N,C,H,W] to embeddings [N,D], the input of the last linear layer."""
        return self.pool(self.forward_features(x))

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Return `logits` [N,K], `embedding` [N,D] and, where spatial, `cam` [N,K,h,w].

        A class-activation map is the sum of the feature maps, weighted by the class's row of the
        head. Under average pooling its mean is the logit less the bias (Zhou et al., "Learning deep
        features for discriminative localization", 2016).
        """
        features = self.forward_features(x)
        embedding = self.pool(features)
        outputs = {"logits": self.classify(embedding), "embedding": embedding}
        if self.spatial:
            maps = torch.einsum("ndhw,kd->nkhw", features, self.head.weight)
            outputs["cam"] = maps * self.logit_scale
        return outputs

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Return all parameters in groups, ordered from the first layer to the head.

        Learning rates can decay over the groups, and the first of them can be frozen. Here each
        kernel starts a group, and the biases and norms after it belong to it.
        """
        head = set(self.head.parameters())
        groups: list[list[nn.Parameter]] = [[]]
        for parameter in self.parameters():
            if parameter in head:
                continue
            if parameter.ndim > 1 and groups[-1]:
                groups.append([])
            groups[-1].append(parameter)
        return [*groups, list(self.head.parameters())]

    def convert_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under the names of this network's state.

        Here they keep their names: only Imago writes weights of its small networks.
        """
        return tensors
