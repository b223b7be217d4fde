"""Exact and near duplicates among images.

Exact duplicates have the same sha256. The search for near duplicates has two steps:
    candidates  A descriptor of each image: its colours on a coarse grid, projected on principal
                components and whitened, so that correlations common to the data set are removed and
                unlike images are close to orthogonal. A matrix product of descriptors finds the few
                similar pairs; very large sets are searched by an inverted file (Jégou et
                al., "Product Quantization for Nearest Neighbor Search", 2011).
    comparison  The normalized cross-correlation of band-passed images (difference of Gaussians),
                maximized over small shifts and scales. Changes of brightness, contrast or colour,
                frames and slight crops leave it high.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, interpolate, normalize, pad

MIN_SIDE = 24  # pixels; smaller images have too few pixels to compare

# Descriptors
GRID_SIDE = {1: 14, 3: 8}  # channels -> cells a side: 196 or 192 numbers
COMPONENTS = 64
NORM_FLOOR = 30  # gray levels added to the length: noise in flat images stays small
WHITENING_FLOOR = 0.01  # share of the largest eigenvalue added to all
DESCRIPTOR_BATCH = 4096  # images

# Candidates
MIN_COSINE = 0.6  # of the descriptors of a candidate
COMPLETE_COSINE = 0.9  # hardly any two unlike images exceed it
SAMPLED_ROWS = 512  # descriptors that the number of candidates is estimated on
ROW_BATCH = 1024  # descriptors multiplied at once

# Comparison
SIDE = 32  # pixels of the compared pictures
MAX_SHIFT = 3  # pixels of these
SCALES = (0.87, 1.15)  # besides 1
MIN_CORRELATION = 0.9  # of near duplicates
HOPELESS_CORRELATION = 0.4  # pairs below this at scale 1 are not compared at other scales
FLAT_STD = 2.0  # gray levels; a band-passed picture below it shows nothing to compare
FINE_SIGMA = 1.0  # pixels, of the difference of Gaussians
COARSE_SIGMA = 3.0
PAIR_BATCH = 256  # pairs


@dataclass(frozen=True)
class SearchLimits:
    """What bounds the work of the search for near duplicates."""

    pairs_per_image: float = 0.25  # candidates compared in detail; of more, the closest
    min_pairs: int = 15_000  # compared in any case
    max_exhaustive: int = 65_536  # images; larger sets are searched by cells
    cell_size: int = 4096  # images a cell, on average


DEFAULT_LIMITS = SearchLimits()


@dataclass(frozen=True)
class Pairs:
    """Pairs of positions, first < second, the closest first."""

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P]
    similarity: np.ndarray  # float32 [P], 1 for exact duplicates
    complete: bool = True  # whether all pairs with similar descriptors were compared in detail


@dataclass(frozen=True)
class Duplicates:
    """Exact and near duplicates of one data set. Near ones link first copies only."""

    images: int  # N
    exact: Pairs  # of the first copy and each other copy
    near: Pairs

    def groups(self) -> np.ndarray:
        """Return int64 [N], equal for images that a chain of duplicates connects."""
        first = np.concatenate([self.exact.first, self.near.first])
        second = np.concatenate([self.exact.second, self.near.second])
        links = coo_array((np.ones(len(first), bool), (first, second)), (self.images, self.images))
        return connected_components(links, directed=False)[1]

    def have_duplicate_in(self, selected: np.ndarray) -> np.ndarray:
        """Return bool [N]: images of `selected` bool [N], their copies and near duplicates.

        A near duplicate of one copy is one of all copies. Chains do not count: a near duplicate of
        a near duplicate may be an unlike image.
        """
        first_copy = np.arange(self.images)
        first_copy[self.exact.second] = self.exact.first

        # Of each first copy: whether one of its copies is selected.
        selected_copies = np.zeros(self.images, bool)
        selected_copies[first_copy[selected]] = True

        reached = selected_copies.copy()
        reached[self.near.first[selected_copies[self.near.second]]] = True
        reached[self.near.second[selected_copies[self.near.first]]] = True
        return reached[first_copy]


def find_duplicates(
    pixels: np.ndarray,
    digests: np.ndarray,
    usable: np.ndarray,
    device: torch.device,
    mirrored: bool = False,
) -> Duplicates:
    """Find exact and near duplicates; for the arguments see `find_near_duplicates`."""
    exact = find_exact_duplicates(digests, usable)
    first_copies = usable.copy()
    first_copies[exact.second] = False
    near = find_near_duplicates(pixels, first_copies, device, mirrored)
    return Duplicates(len(usable), exact, near)


def find_exact_duplicates(digests: np.ndarray, usable: np.ndarray) -> Pairs:
    """Pair each usable image with the first one of the same sha256 digest, uint8 [N, 32]."""
    index = np.flatnonzero(usable)
    keys = np.ascontiguousarray(digests[index]).view("V32").reshape(-1)
    _, first_of_key, key = np.unique(keys, return_index=True, return_inverse=True)
    first = first_of_key[key]
    is_copy = first != np.arange(len(index))
    similarity = np.ones(int(is_copy.sum()), np.float32)
    return Pairs(index[first[is_copy]], index[is_copy], similarity)


def can_find_near_duplicates(pixels: np.ndarray) -> bool:
    """Whether uint8 [N, H, W, C] are large enough to compare."""
    return min(pixels.shape[1:3]) >= MIN_SIDE


def find_near_duplicates(
    pixels: np.ndarray,
    usable: np.ndarray,
    device: torch.device,
    mirrored: bool = False,
    limits: SearchLimits = DEFAULT_LIMITS,
) -> Pairs:
    """Find near duplicates; exact copies come with a similarity of about 1.

    Args:
        pixels: uint8 [N, H, W, C].
        usable: bool [N], the images to compare.
        device: where they are compared.
        mirrored: whether mirror images count, as they must where training mirrors images.
        limits: bounds of the work.
    """
    index = np.flatnonzero(usable)
    if not can_find_near_duplicates(pixels) or len(index) < 2:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    descriptors, mirrored_descriptors = _compute_descriptors(pixels, index, device)
    min_cosine = _candidate_cosine(descriptors, limits)
    candidates = _find_candidates(descriptors, descriptors, min_cosine, limits)
    rows, similarity = _compare_candidates(pixels, index, candidates, device)
    if mirrored:
        candidates = _find_candidates(descriptors, mirrored_descriptors, min_cosine, limits)
        more_rows, more_similarity = _compare_candidates(
            pixels, index, candidates, device, mirrored=True
        )
        rows = np.concatenate([rows, more_rows])
        similarity = np.concatenate([similarity, more_similarity])

    order = np.argsort(-similarity, kind="stable")
    rows = rows[order]
    # A pair that matches with and without mirroring is listed twice.
    unique = np.sort(np.unique(rows, axis=0, return_index=True)[1])
    first = index[rows[unique, 0]]
    second = index[rows[unique, 1]]
    return Pairs(first, second, similarity[order][unique], min_cosine <= COMPLETE_COSINE)


# Candidates


def _compute_descriptors(
    pixels: np.ndarray, index: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return float32 [M, COMPONENTS] of length 1, of the images and of their mirror images."""
    side = GRID_SIDE[pixels.shape[3]]
    batches = []
    for rows in np.array_split(index, -(-len(index) // DESCRIPTOR_BATCH)):
        images = torch.from_numpy(pixels[rows]).to(device).permute(0, 3, 1, 2).float()
        grid = adaptive_avg_pool2d(images, side).flatten(1)
        grid = grid - grid.mean(1, keepdim=True)
        batches.append(grid / (grid.norm(dim=1, keepdim=True) + NORM_FLOOR))
    features = torch.cat(batches)

    # eigh sorts ascending.
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    values = values.flip(0)[:COMPONENTS]
    vectors = vectors.flip(1)[:, :COMPONENTS]
    whitening = vectors / (values + WHITENING_FLOOR * values[0]).sqrt()

    mirrored = features.unflatten(1, (-1, side, side)).flip(3).flatten(1)
    return normalize(features @ whitening), normalize(mirrored @ whitening)


def _candidate_cosine(descriptors: Tensor, limits: SearchLimits) -> float:
    """Return the least cosine of candidates: MIN_COSINE, or more to stay within the limits.

    The number of pairs is estimated from a sample of rows.
    """
    count = len(descriptors)
    pairs_per_image = max(limits.pairs_per_image, limits.min_pairs / count)
    chosen = np.random.default_rng(0).choice(count, min(count, SAMPLED_ROWS), replace=False)
    sample = descriptors[torch.from_numpy(chosen).to(descriptors.device)]
    cosines = (sample @ descriptors.T).flatten()

    # Each image meets itself once, and each pair from both sides.
    allowed = len(sample) + round(2 * pairs_per_image * len(sample))
    largest = cosines.topk(min(allowed, len(cosines))).values
    return max(MIN_COSINE, float(largest[-1]))


def _find_candidates(
    descriptors: Tensor, others: Tensor, min_cosine: float, limits: SearchLimits
) -> np.ndarray:
    """Return int64 [P, 2], first < second: rows of `descriptors` and `others` that are alike.

    Very many images are sorted into cells around randomly chosen ones, each into the two closest
    (an inverted file), so that the work grows with N^1.5 instead of N^2.
    """
    count = len(descriptors)
    device = descriptors.device
    if count <= limits.max_exhaustive:
        rows = torch.arange(count, device=device)
        return _find_close_pairs(descriptors, rows, others, rows, min_cosine)

    chosen = np.random.default_rng(0).choice(count, count // limits.cell_size, replace=False)
    centers = descriptors[torch.from_numpy(chosen).to(device)]
    cells = _closest_centers(descriptors, centers, limits.cell_size)
    other_cells = _closest_centers(others, centers, limits.cell_size)
    pairs = []
    for k in range(len(centers)):
        rows = (cells == k).any(1).nonzero()[:, 0]
        columns = (other_cells == k).any(1).nonzero()[:, 0]
        pairs.append(
            _find_close_pairs(descriptors[rows], rows, others[columns], columns, min_cosine)
        )
    return np.unique(np.concatenate(pairs), axis=0)


def _closest_centers(descriptors: Tensor, centers: Tensor, batch_size: int) -> Tensor:
    """Return int64 [M, 2]: the two closest of the centers to each descriptor."""
    batches = [(rows @ centers.T).topk(2).indices for rows in descriptors.split(batch_size)]
    return torch.cat(batches)


def _find_close_pairs(
    descriptors: Tensor, rows: Tensor, others: Tensor, columns: Tensor, min_cosine: float
) -> np.ndarray:
    """Return int64 [P, 2]: alike pairs of ascending `rows` and `columns`, row < column."""
    pairs = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(rows), ROW_BATCH):
        # The columns before are less than any of these rows.
        first_column = int(torch.searchsorted(columns, rows[start]))
        cosine = descriptors[start : start + ROW_BATCH] @ others[first_column:].T
        row, column = (cosine >= min_cosine).nonzero(as_tuple=True)
        first = rows[row + start]
        second = columns[column + first_column]
        pairs.append(torch.stack([first, second], 1)[first < second].cpu().numpy())
    return np.concatenate(pairs)


# Comparison


def _compare_candidates(
    pixels: np.ndarray,
    index: np.ndarray,
    candidates: np.ndarray,
    device: torch.device,
    mirrored: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidates [P, 2] that are near duplicates, and their similarities [P]."""
    batches = np.array_split(candidates, len(candidates) // PAIR_BATCH + 1)
    similarity = np.concatenate(
        [_compare_pairs(pixels, index[batch], device, mirrored) for batch in batches]
    )
    is_duplicate = similarity >= MIN_CORRELATION
    return candidates[is_duplicate], similarity[is_duplicate]


def _compare_pairs(
    pixels: np.ndarray, pairs: np.ndarray, device: torch.device, mirrored: bool
) -> np.ndarray:
    """Return the similarity of pairs of positions [P, 2]: float32 [P].

    It is the largest correlation of the centre of either image, at any scale, with the other image
    at any shift, or with its mirror image.
    """
    if len(pairs) == 0:
        return np.zeros(0, np.float32)

    first = _to_gray(pixels[pairs[:, 0]], device)
    second = _to_gray(pixels[pairs[:, 1]], device)
    if mirrored:
        second = second.flip(3)
    best = _max_correlation(_band_pass(first, SIDE), _band_pass(second, SIDE))

    # Most pairs are decided already.
    undecided = ((best >= HOPELESS_CORRELATION) & (best < MIN_CORRELATION)).nonzero()[:, 0]
    if len(undecided) == 0:
        return best.cpu().numpy()

    first = first[undecided]
    second = second[undecided]
    for scaled, other in ((first, second), (second, first)):
        whole = _band_pass(other, SIDE)
        for scale in SCALES:
            correlation = _max_correlation(_band_pass(scaled, round(SIDE * scale)), whole)
            best[undecided] = torch.maximum(best[undecided], correlation)
    return best.cpu().numpy()


def _to_gray(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 [P, H, W, C] to float32 [P, 1, H, W]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().mean(1, keepdim=True)


def _band_pass(gray: Tensor, side: int) -> Tensor:
    """Resize to [P, 1, side, side] and apply a difference of Gaussians."""
    resized = interpolate(gray, (side, side), mode="bilinear", antialias=True)
    fine = _blur_matrix(side, FINE_SIGMA, gray.device)
    coarse = _blur_matrix(side, COARSE_SIGMA, gray.device)
    return fine @ resized @ fine.T - coarse @ resized @ coarse.T


def _blur_matrix(side: int, sigma: float, device: torch.device) -> Tensor:
    """Return [side, side]: the matrix that blurs columns by a Gaussian, with a mirrored border.

    Matrices blur small pictures several times faster than convolutions of one channel.
    """
    radius = round(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    columns = pad(torch.eye(side, device=device)[None, None], (0, 0, radius, radius), "reflect")
    return conv2d(columns, (kernel / kernel.sum()).view(1, 1, -1, 1))[0, 0]


def _max_correlation(part: Tensor, whole: Tensor) -> Tensor:
    """Return [P]: the largest normalized correlation of the centre of `part` with `whole`.

    The maximum is over shifts of up to MAX_SHIFT pixels. Flat images correlate with nothing: 0.
    """
    side = min(part.shape[2], SIDE) - 2 * MAX_SHIFT
    center = _crop_center(part, side).flatten(1)
    center = center - center.mean(1, keepdim=True)
    whole = _crop_center(whole, side + 2 * MAX_SHIFT)
    windows = whole[:, 0].unfold(1, side, 1).unfold(2, side, 1).flatten(3).flatten(1, 2)

    # Length of each window less its mean: [P, shifts]
    mean = _window_means(whole, side)
    mean_square = _window_means(whole**2, side)
    window_norms = (mean_square - mean**2).clamp_min(0).sqrt() * side
    center_norms = center.norm(dim=1)[:, None]

    products = (windows @ center[:, :, None])[:, :, 0]
    min_norm = FLAT_STD * side
    has_contrast = (window_norms >= min_norm) & (center_norms >= min_norm)
    products = products.where(has_contrast, torch.zeros_like(products))
    return (products / (window_norms * center_norms).clamp_min(1e-6)).amax(1)


def _window_means(images: Tensor, side: int) -> Tensor:
    """Return [P, shifts]: the mean of each side x side window."""
    return avg_pool2d(avg_pool2d(images, (side, 1), 1), (1, side), 1).flatten(1)


def _crop_center(images: Tensor, side: int) -> Tensor:
    start = (images.shape[2] - side) // 2
    return images[:, :, start : start + side, start : start + side]
