"""`InputSpec`: size, channels and resize policy of a network's input; part of manifest.json."""

from typing import Literal

from pydantic import BaseModel, Field

SIXTEEN_BITS = 16


class InputSpec(BaseModel):
    """The input of a network: uint8 [N, height, width, channels], RGB or gray.

    `resize` says how an image of another size is brought to this one:

    - crop: scale the short side to `short_side`, then cut out the centre
    - stretch: scale both sides to the size, without keeping their ratio
    - pad: scale the long side to the size and fill the rest with black

    `interpolation` says how pixels between those of the image are computed where it is not reduced
    to less than half its size: linear, or cubic, which most pretrained networks are trained with.

    Images with 16 bits a sample are reduced to 8: 0 is black, 2**significant_bits - 1 and more is
    white.
    """

    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    channels: Literal[1, 3] = 3
    resize: Literal["crop", "stretch", "pad"] = "crop"
    short_side: int | None = Field(
        default=None, gt=0, le=8192, description="for crop; by default the larger side"
    )
    interpolation: Literal["linear", "cubic"] = "linear"

    significant_bits: int = Field(
        default=SIXTEEN_BITS,
        ge=8,
        le=SIXTEEN_BITS,
        description="bits that 16-bit samples use, such as 12 of many cameras and scanners",
    )

    @property
    def crop_short_side(self) -> int:
        """Pixels to which crop scales the short side: at least the larger side of the input."""
        return max(self.short_side or 0, self.height, self.width)
