"""Files with valid framing that no encoder writes: each gives pixels or an ImageError.

`tests/reliability/fuzz_images.py` runs the same mutations for minutes, in child processes.
"""

import random

import pytest

from models.image import ImageError, InputSpec, decode
from support.image_mutations import FORMATS, mutate_image, write_seed_images

SPEC = InputSpec(height=32, width=32)
SEEDS = write_seed_images()
MUTATIONS = 200


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_seed_image_survives_splitting_and_joining(file_format):
    split, join = FORMATS[file_format]
    for data in SEEDS[file_format]:
        assert decode(join(split(data)), SPEC).tolist() == decode(data, SPEC).tolist()


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_mutated_image_gives_pixels_or_an_image_error(file_format):
    rng = random.Random(file_format)
    for _ in range(MUTATIONS):
        data = mutate_image(file_format, SEEDS[file_format], rng)
        try:
            outcome = decode(data, SPEC, max_pixels=1_000_000).shape
        except ImageError as error:
            outcome = error.status
        assert outcome in ((32, 32, 3), 413, 415, 422)
