"""Find the images that look most like one image, by the cosine similarity of their embeddings.

    python tests/examples/similar_images.py QUERY IMAGE… [--url http://localhost:8000] [--count 5]

The service computes the embeddings: `?embedding=base64` adds them to each prediction as float16.
Prints a line for each of the most similar images: the similarity, from -1 to 1, and the file.
"""

import argparse
import base64
from pathlib import Path

import httpx
import numpy as np

IMAGES_PER_REQUEST = 16


def embed(client: httpx.Client, files: list[Path]) -> np.ndarray:
    """Return the embeddings of image files, float32 [N, D], scaled to a length of 1."""
    rows: list[np.ndarray] = []
    for start in range(0, len(files), IMAGES_PER_REQUEST):
        batch = files[start : start + IMAGES_PER_REQUEST]
        parts = [("file", (file.name, file.read_bytes())) for file in batch]
        response = client.post("/predict", params={"embedding": "base64"}, files=parts)
        response.raise_for_status()
        for file, prediction in zip(batch, response.json()["predictions"], strict=True):
            if "error" in prediction:
                raise ValueError(f"{file}: {prediction['error']['detail']}")
            rows.append(np.frombuffer(base64.b64decode(prediction["embedding"]), "<f2"))

    embeddings = np.stack(rows).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def main() -> None:
    """Print the images that are most similar to the first one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("query", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--count", type=int, default=5)
    arguments = parser.parse_args()

    with httpx.Client(base_url=arguments.url, timeout=60) as client:
        query, *candidates = embed(client, [arguments.query, *arguments.images])

    similarities = np.stack(candidates) @ query
    for index in (-similarities).argsort(kind="stable")[: arguments.count]:
        print(f"{similarities[index]:.3f}  {arguments.images[index]}")


if __name__ == "__main__":
    main()
