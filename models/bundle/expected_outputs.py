"""expected.npz: the outputs of the torch network for the samples of a bundle, and its input.

The file is checked before an array is made of it: names, types, shapes and sizes. numpy alone would
allocate what the header of an array asks for, and compare text or NaN without an error.
"""

import io
import math
import zipfile
from pathlib import Path

import numpy as np

from models.bundle.errors import BundleError
from models.bundle.manifest import Manifest

MAX_EXPECTED_BYTES = 512 << 20
"""Of expected.npz, packed or unpacked."""

_SUFFIX = ".npy"
_REQUIRED = ("probabilities", "energy")


def parse_expected_outputs(path: Path, content: bytes, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the arrays of an expected.npz with these contents, by name.

    `path` names the file in error messages. Raises BundleError for a file that is damaged or too
    large, and for arrays that can't be the outputs for the samples of the manifest.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked_bytes = sum(info.file_size for info in archive.infolist())
            if unpacked_bytes > MAX_EXPECTED_BYTES:
                raise BundleError(f"{path}: unpacks to more than {MAX_EXPECTED_BYTES} bytes")
            for info in archive.infolist():
                name = info.filename.removesuffix(_SUFFIX)
                if name in manifest.outputs or name == "pixels":
                    arrays[name] = _read_array(archive, info)
    except BundleError:
        raise
    except Exception as error:  # those of zipfile, zlib and numpy share no base class
        cause = " ".join(str(error).split()) or type(error).__name__
        raise BundleError(f"{path}: unreadable expected outputs: {cause}") from error

    _check_arrays(path, arrays, manifest)
    return arrays


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Read one array. Raises ValueError where its header does not fit the size of its data."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, is_fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"{info.filename} has the unknown format {version}")
        if dtype.kind not in "fu":
            raise ValueError(f"{info.filename} holds {dtype}, not numbers")

        data = file.read()
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{info.filename} has {len(data)} bytes, which do not fit {shape} {dtype}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran_order else "C")


def _check_arrays(path: Path, arrays: dict[str, np.ndarray], manifest: Manifest) -> None:
    """Raise BundleError where the arrays can't be the outputs for the manifest's samples."""
    for name in _REQUIRED:
        if name not in arrays:
            raise BundleError(f"{path}: lacks {name}")

    samples = len(manifest.samples)
    spec = manifest.input
    known_shapes = {
        "probabilities": (samples, len(manifest.classes)),
        "energy": (samples,),
        "pixels": (samples, spec.height, spec.width, spec.channels),
    }
    for name, array in arrays.items():
        expected = known_shapes.get(name, (samples, *array.shape[1:]))
        if array.shape != expected:
            raise BundleError(f"{path}: {name} has the shape {array.shape}, not {expected}")
        if (array.dtype == np.uint8) != (name == "pixels"):
            raise BundleError(f"{path}: {name} has the type {array.dtype}")
        if not np.isfinite(array).all():
            raise BundleError(f"{path}: {name} is not finite")
