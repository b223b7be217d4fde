"""Exact and near duplicates among images.

Near duplicates are found in two steps. A descriptor of each image, its coarse colours with the data set's own
correlations taken out (PCA whitening), makes unlike images orthogonal, so that a matrix product finds the few that are
alike. These are then compared in detail: the normalised correlation of the band-passed images over small shifts and
scales, which brightness, contrast, colour casts, frames and slight crops leave high.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, interpolate, normalize, pad

COARSE = {
    1: 14,
    3: 8,
}  # channels -> side of the descriptor's picture, in pixels: 192 numbers either way
LEAST = 24  # pixels a side; smaller pictures are too few pixels to tell apart
COMPONENTS = 64
ALIKE = 0.6  # cosine of two descriptors that makes a pair worth a closer look
LOOKS, FEW = (
    0.25,
    15_000,
)  # pairs an image, on average, that get it, or so many in all; of more, the closest
CERTAIN = 0.9  # so alike are hardly any two that are not; where not all of those are looked at, that is to be said
SAME = 0.9  # correlation in detail that makes them near duplicates
CELL = 4096  # images that are compared with one another at once
WHOLE = 65536  # more images than this only meet those in nearby cells
SIDE, SHIFT, SCALES = (
    32,
    3,
    (0.87, 1.15),
)  # of the detailed comparison, in pixels of its pictures; beside scale 1
HOPE = 0.4  # less than this at scale 1 is no duplicate at any
FLAT = 2.0  # standard deviation in gray levels below which a band-passed image shows nothing to compare


@dataclass(frozen=True)
class Pairs:
    """Pairs of positions, first < second, closest first."""

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P]
    likeness: np.ndarray  # float32 [P], 1 for exact duplicates
    complete: bool = True  # whether all that looked like duplicates were compared in detail


def exact(digests: np.ndarray, usable: np.ndarray) -> Pairs:
    """Each image with the first one that has the same sha256 digest, uint8 [N, 32]."""
    index = np.flatnonzero(usable)
    keys = np.ascontiguousarray(digests[index]).view("V32").reshape(-1)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    copies = first[group] != np.arange(len(index))
    return Pairs(index[first[group][copies]], index[copies], np.ones(int(copies.sum()), np.float32))


def told_apart(pixels: np.ndarray) -> bool:
    """Whether near duplicates can be looked for among uint8 [N, H, W, C] at all."""
    return min(pixels.shape[1:3]) >= LEAST


def near(
    pixels: np.ndarray, usable: np.ndarray, device: torch.device, mirrored: bool = False
) -> Pairs:
    """Near duplicates among the usable images of uint8 [N, H, W, C]; exact copies come with a likeness of about 1.

    `mirrored`: mirror images count as well, as they must where training mirrors them.
    """
    index = np.flatnonzero(usable)
    if not told_apart(pixels) or len(index) < 2:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    plain, flipped = _descriptors(pixels, index, device)
    least, pairs, likeness = _least(plain), [], []
    for others in (plain, flipped) if mirrored else (plain,):
        found = _candidates(plain, others, least)
        close = np.concatenate(
            [
                _likeness(pixels, index[some], device, others is flipped)
                for some in np.array_split(found, len(found) // 256 + 1)
            ]
        )
        pairs.append(found[close >= SAME])
        likeness.append(close[close >= SAME])
    order = np.argsort(-np.concatenate(likeness), kind="stable")
    both, likeness_of = np.concatenate(pairs)[order], np.concatenate(likeness)[order]
    once = np.sort(
        np.unique(both, axis=0, return_index=True)[1]
    )  # an image that is its own mirror image came twice
    return Pairs(index[both[once, 0]], index[both[once, 1]], likeness_of[once], least <= CERTAIN)


def _descriptors(
    pixels: np.ndarray, index: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 [M, COMPONENTS] of length 1, and those of the mirror images."""
    coarse, side = [], COARSE[pixels.shape[3]]
    for rows in np.array_split(index, -(-len(index) // CELL)):
        images = torch.from_numpy(pixels[rows]).to(device).permute(0, 3, 1, 2).float()
        flat = adaptive_avg_pool2d(images, side).flatten(1)
        flat = flat - flat.mean(1, keepdim=True)
        coarse.append(
            flat / (flat.norm(dim=1, keepdim=True) + 30)
        )  # plus 30: noise in flat images stays small
    features = torch.cat(coarse)
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    values, vectors = values.flip(0)[:COMPONENTS], vectors.flip(1)[:, :COMPONENTS]
    whitening = vectors / (values + 0.01 * values[0]).sqrt()
    flipped = features.unflatten(1, (-1, side, side)).flip(3).flatten(1)
    return normalize(features @ whitening), normalize(flipped @ whitening)


def _least(descriptors: Tensor) -> float:
    """The cosine that makes a pair worth a closer look: ALIKE, or more where that gives more than LOOKS and FEW."""
    count = len(descriptors)
    looks = max(LOOKS, FEW / count)
    chosen = np.random.default_rng(0).choice(count, min(count, 512), replace=False)
    some = descriptors[torch.from_numpy(chosen).to(descriptors.device)]
    cosines = (some @ descriptors.T).flatten()
    allowed = len(some) + round(2 * looks * len(some))  # each of them is most like itself
    return max(ALIKE, float(cosines.topk(min(allowed, len(cosines))).values[-1]))


def _candidates(descriptors: Tensor, others: Tensor, least: float) -> np.ndarray:
    """int64 [P, 2], first < second: rows of `descriptors` and of `others` with a cosine of `least` or more.

    Very many images are sorted into cells around randomly chosen ones, each into the two closest (an inverted file,
    Jégou et al., 2011), so that the work grows with N^1.5 instead of N^2.
    """
    count, device = len(descriptors), descriptors.device
    if count <= WHOLE:
        everything = torch.arange(count, device=device)
        return _closest(descriptors, everything, others, everything, least)
    chosen = np.random.default_rng(0).choice(count, count // CELL, replace=False)
    centres = descriptors[torch.from_numpy(chosen).to(device)]
    cells, theirs = (
        torch.cat([(rows @ centres.T).topk(2).indices for rows in of.split(CELL)])
        for of in (descriptors, others)
    )
    found = []
    for k in range(len(centres)):
        rows, columns = ((of == k).any(1).nonzero()[:, 0] for of in (cells, theirs))
        found.append(_closest(descriptors[rows], rows, others[columns], columns, least))
    return np.unique(np.concatenate(found), axis=0)


def _closest(
    descriptors: Tensor, rows: Tensor, others: Tensor, columns: Tensor, least: float
) -> np.ndarray:
    """Pairs of the rising `rows` and `columns`, row < column, with a cosine of `least` or more, int64 [P, 2]."""
    pairs = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(rows), 1024):
        since = int(
            torch.searchsorted(columns, rows[start])
        )  # the columns before are less than any of these rows
        cosine = descriptors[start : start + 1024] @ others[since:].T
        one, other = (cosine >= least).nonzero(as_tuple=True)
        one, other = rows[one + start], columns[other + since]
        pairs.append(torch.stack([one, other], 1)[one < other].cpu().numpy())
    return np.concatenate(pairs)


def _likeness(
    pixels: np.ndarray, pairs: np.ndarray, device: torch.device, mirrored: bool
) -> np.ndarray:
    """float32 [P] for pairs of positions [P, 2]: the best correlation of either image's middle, at any scale, with any
    place in the other, or in its mirror image."""
    if not len(pairs):
        return np.zeros(0, np.float32)
    first, second = (_gray(pixels[side], device) for side in pairs.T)
    second = second.flip(3) if mirrored else second
    best = _correlation(_band(first, SIDE), _band(second, SIDE))
    near_miss = ((best >= HOPE) & (best < SAME)).nonzero()[:, 0]  # most pairs are decided already
    first, second = first[near_miss], second[near_miss]
    for one, two in ((first, second), (second, first)) if len(near_miss) else ():
        whole = _band(two, SIDE)
        for scale in SCALES:
            best[near_miss] = torch.maximum(
                best[near_miss], _correlation(_band(one, round(SIDE * scale)), whole)
            )
    return best.cpu().numpy()


def _gray(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [P, H, W, C] to float32 [P, 1, H, W]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().mean(1, keepdim=True)


def _band(gray: Tensor, side: int) -> Tensor:
    """[P, 1, side, side] without its slow and its fastest changes (difference of Gaussians)."""
    scaled = interpolate(gray, (side, side), mode="bilinear", antialias=True)
    fine, slow = (gaussian(side, sigma, gray.device) for sigma in (1.0, 3.0))
    return fine @ scaled @ fine.T - slow @ scaled @ slow.T


def gaussian(side: int, sigma: float, device: torch.device) -> Tensor:
    """[side, side]: the matrix that blurs columns of so many pixels, with the border mirrored.

    Small pictures are blurred several times faster by matrices than by convolutions of one channel.
    """
    reach = round(3 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=device) ** 2) / (2 * sigma**2))
    mirrored = pad(torch.eye(side, device=device)[None, None], (0, 0, reach, reach), "reflect")
    return conv2d(mirrored, (kernel / kernel.sum()).view(1, 1, -1, 1))[0, 0]


def _correlation(part: Tensor, whole: Tensor) -> Tensor:
    """[P]: the largest normalised correlation of the middle of `part` with `whole`, over shifts; 0 for flat images."""
    side = min(part.shape[2], SIDE) - 2 * SHIFT
    middle = _centre(part, side).flatten(1)
    whole = _centre(whole, side + 2 * SHIFT)
    places = whole[:, 0].unfold(1, side, 1).unfold(2, side, 1).flatten(3).flatten(1, 2)
    middle = middle - middle.mean(1, keepdim=True)
    mean, square = (
        avg_pool2d(avg_pool2d(of, (side, 1), 1), (1, side), 1).flatten(1)
        for of in (whole, whole**2)
    )
    norms = (square - mean**2).clamp_min(0).sqrt() * side  # [P, shifts]
    length = middle.norm(dim=1)
    product = (places @ middle[:, :, None])[:, :, 0]
    product = product.where(
        (norms >= FLAT * side) & (length >= FLAT * side)[:, None], torch.zeros_like(product)
    )
    return (product / (norms * length[:, None]).clamp_min(1e-6)).amax(1)


def _centre(images: Tensor, side: int) -> Tensor:
    start = (images.shape[2] - side) // 2
    return images[:, :, start : start + side, start : start + side]
