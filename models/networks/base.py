"""What every network here has in common: trunk, pooling, head, and the outputs of one pass for the bundle."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Network(nn.Module, ABC):
    """Normalised images [N,C,H,W] to logits [N,K], by `head(pool(trunk(x)))`.

    A subclass sets `head` (its last linear layer, D to K) and defines `trunk`. Where `spatial` is true the trunk gives
    feature maps [N,D,h,w] which `pool` makes [N,D], so class activation maps exist; otherwise it gives [N,D] itself.
    """

    spatial = True
    head: nn.Linear
    scale = 1.0  # of the logits
    dropout = 0.0  # on the embedding, in training
    prepare: Callable[[Tensor], None] | None = (
        None  # for what is fixed from normalised training images [n,C,H,W]
    )

    @abstractmethod
    def trunk(self, x: Tensor) -> Tensor:
        """[N,C,H,W] to feature maps [N,D,h,w], or to [N,D] where not spatial."""

    def pool(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3)) if self.spatial else maps

    def classify(self, embedding: Tensor) -> Tensor:
        """Embedding [N,D] to logits [N,K]."""
        if self.dropout:
            embedding = nn.functional.dropout(embedding, self.dropout, self.training)
        return self.head(embedding) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pool(self.trunk(x)))

    def embed(self, x: Tensor) -> Tensor:
        """[N,C,H,W] to what the last linear layer sees, [N,D]."""
        return self.pool(self.trunk(x))

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """`logits` [N,K], `embedding` [N,D] and, where spatial, `cam` [N,K,h,w], in one pass.

        A class activation map weighs the feature maps by the class's row of the head; under average pooling its mean is
        the logit less the bias (Zhou et al., "Learning deep features for discriminative localization", 2016).
        """
        found = self.trunk(x)
        embedding = self.pool(found)
        outputs = {"logits": self.classify(embedding), "embedding": embedding}
        if self.spatial:
            outputs["cam"] = torch.einsum("ndhw,kd->nkhw", found, self.head.weight) * self.scale
        return outputs
