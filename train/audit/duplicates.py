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
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, normalize, pad

COARSE = {1: 14, 3: 8}  # channels -> side of the descriptor's picture, in pixels: 192 numbers either way
COMPONENTS = 64
ALIKE = 0.6  # cosine of two descriptors that makes a pair worth a closer look
LOOKS = 0.25  # pairs an image, on average, that get it; where more are alike, the closest
SAME = 0.9  # correlation in detail that makes them near duplicates
CELL = 4096  # images that are compared with one another at once
WHOLE = 65536  # more images than this only meet those in nearby cells
SIDE, SHIFT, SCALES = 32, 3, (0.87, 1.15)  # of the detailed comparison, in pixels of its pictures; beside scale 1
HOPE = 0.4  # less than this at scale 1 is no duplicate at any
FLAT = 2.0  # standard deviation in gray levels below which a band-passed image shows nothing to compare


@dataclass(frozen=True)
class Pairs:
    """Pairs of positions, first < second, closest first."""

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P]
    likeness: np.ndarray  # float32 [P], 1 for exact duplicates


def exact(digests: np.ndarray, usable: np.ndarray) -> Pairs:
    """Each image with the first one that has the same sha256 digest, uint8 [N, 32]."""
    index = np.flatnonzero(usable)
    keys = np.ascontiguousarray(digests[index]).view("V32").reshape(-1)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    copies = first[group] != np.arange(len(index))
    return Pairs(index[first[group][copies]], index[copies], np.ones(int(copies.sum()), np.float32))


def near(pixels: np.ndarray, usable: np.ndarray, device: torch.device) -> Pairs:
    """Near duplicates among the usable images of uint8 [N, H, W, C]; exact copies come with a likeness of about 1."""
    index = np.flatnonzero(usable)
    if min(pixels.shape[1:3]) < 2 * max(COARSE.values()) - 4 or len(index) < 2:
        return Pairs(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.float32)))  # too few pixels to tell apart
    pairs = _candidates(_descriptors(pixels, index, device))
    chunks = np.array_split(pairs, len(pairs) // 256 + 1)
    likeness = np.concatenate([_likeness(pixels, index[some], device) for some in chunks])
    found = np.flatnonzero(likeness >= SAME)
    found = found[np.argsort(-likeness[found], kind="stable")]
    return Pairs(index[pairs[found, 0]], index[pairs[found, 1]], likeness[found])


def _descriptors(pixels: np.ndarray, index: np.ndarray, device: torch.device) -> Tensor:
    """float32 [M, COMPONENTS] of length 1."""
    coarse = []
    for rows in np.array_split(index, -(-len(index) // CELL)):
        images = torch.from_numpy(pixels[rows]).to(device).permute(0, 3, 1, 2).float()
        flat = adaptive_avg_pool2d(images, COARSE[images.shape[1]]).flatten(1)
        flat = flat - flat.mean(1, keepdim=True)
        coarse.append(flat / (flat.norm(dim=1, keepdim=True) + 30))  # plus 30: noise in flat images stays small
    features = torch.cat(coarse)
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    values, vectors = values.flip(0)[:COMPONENTS], vectors.flip(1)[:, :COMPONENTS]
    return normalize(features @ (vectors / (values + 0.01 * values[0]).sqrt()))


def _candidates(descriptors: Tensor) -> np.ndarray:
    """int64 [P, 2], first < second: pairs of descriptors with a cosine of ALIKE or more, or the closest of them.

    Very many images are sorted into cells around randomly chosen ones, each into the two closest (an inverted file,
    Jégou et al., 2011), so that the work grows with N^1.5 instead of N^2.
    """
    count, draw = len(descriptors), np.random.default_rng(0)
    some = descriptors[torch.from_numpy(draw.choice(count, min(count, 512), replace=False)).to(descriptors.device)]
    cosines = (some @ descriptors.T).flatten()
    allowed = len(some) + round(2 * LOOKS * len(some))  # each of them is most like itself
    least = max(ALIKE, float(cosines.topk(min(allowed, len(cosines))).values[-1]))
    if count <= WHOLE:
        return _closest(descriptors, torch.arange(count, device=descriptors.device), least)
    centres = descriptors[torch.from_numpy(draw.choice(count, count // CELL, replace=False)).to(descriptors.device)]
    cells = torch.cat([(rows @ centres.T).topk(2).indices for rows in descriptors.split(CELL)])
    members = [(cells == k).any(1).nonzero()[:, 0] for k in range(len(centres))]
    return np.unique(np.concatenate([_closest(descriptors[rows], rows, least) for rows in members]), axis=0)


def _closest(descriptors: Tensor, rows: Tensor, least: float) -> np.ndarray:
    """Pairs of the rising `rows` with a cosine of `least` or more, int64 [P, 2]."""
    pairs = []
    for start in range(0, len(rows), 1024):
        cosine = descriptors[start:start + 1024] @ descriptors[start:].T
        one, other = (cosine >= least).nonzero(as_tuple=True)
        later = one < other
        pairs.append(torch.stack([rows[one[later] + start], rows[other[later] + start]], 1).cpu().numpy())
    return np.concatenate(pairs)


def _likeness(pixels: np.ndarray, pairs: np.ndarray, device: torch.device) -> np.ndarray:
    """float32 [P] for pairs of positions [P, 2]: the best correlation of either image's middle, at any scale, with any
    place in the other."""
    if not len(pairs):
        return np.zeros(0, np.float32)
    first, second = (_gray(pixels[side], device) for side in pairs.T)
    best = _correlation(_band(first, SIDE), _band(second, SIDE))
    near_miss = ((best >= HOPE) & (best < SAME)).nonzero()[:, 0]  # most pairs are decided already
    first, second = first[near_miss], second[near_miss]
    for one, two in ((first, second), (second, first)) if len(near_miss) else ():
        whole = _band(two, SIDE)
        for scale in SCALES:
            best[near_miss] = torch.maximum(best[near_miss], _correlation(_band(one, round(SIDE * scale)), whole))
    return best.cpu().numpy()


def _gray(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [P, H, W, C] to float32 [P, 1, H, W]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().mean(1, keepdim=True)


def _band(gray: Tensor, side: int) -> Tensor:
    """[P, 1, side, side] without its slow and its fastest changes (difference of Gaussians)."""
    scaled = interpolate(gray, (side, side), mode="bilinear", antialias=True)
    return gaussian_blur(scaled, 1.0) - gaussian_blur(scaled, 3.0)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """[P, 1, H, W], with the border mirrored."""
    reach = round(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=images.device) ** 2 / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    images = conv2d(pad(images, (reach, reach, 0, 0), "reflect"), kernel)
    return conv2d(pad(images, (0, 0, reach, reach), "reflect"), kernel.mT)


def _correlation(part: Tensor, whole: Tensor) -> Tensor:
    """[P]: the largest normalised correlation of the middle of `part` with `whole`, over shifts; 0 for flat images."""
    side = min(part.shape[2], SIDE) - 2 * SHIFT
    middle = _centre(part, side).flatten(1)
    places = _centre(whole, side + 2 * SHIFT)[:, 0].unfold(1, side, 1).unfold(2, side, 1).flatten(3).flatten(1, 2)
    middle = middle - middle.mean(1, keepdim=True)
    norms = places.var(2, correction=0).sqrt() * side  # [P, shifts]
    length = middle.norm(dim=1)
    product = (places @ middle[:, :, None])[:, :, 0]
    product = product.where((norms >= FLAT * side) & (length >= FLAT * side)[:, None], torch.zeros_like(product))
    return (product / (norms * length[:, None]).clamp_min(1e-6)).amax(1)


def _centre(images: Tensor, side: int) -> Tensor:
    start = (images.shape[2] - side) // 2
    return images[:, :, start:start + side, start:start + side]
