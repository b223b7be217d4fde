"""The examples run: the notebook in a process of its own, the scripts against the server."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, tiny_bundle

EXAMPLES = ROOT / "tests" / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# Run before and after the cells of digits.ipynb, in the same process.
READ_HANDLERS = """
import signal, sys

handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

"""
NOTEBOOK_CHECKS = """

assert test.accuracy > 0.9
assert sum(p.label == str(d) for p, d in zip(predictions, digits.target)) >= 9
assert sum(digits.target[nearest] == digits.target[query]) >= 6
assert activation_map.shape == (8, 8)
assert len(plt.get_fignums()) == 3
assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
assert not {"litserve", "uvicorn"} & set(sys.modules)
"""


def read_cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]


def read_code(notebook: Path) -> str:
    cells = [cell for cell in read_cells(notebook) if cell["cell_type"] == "code"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs(notebook):
    for cell in read_cells(notebook):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    ast.parse(read_code(notebook))
    assert f"tests/examples/{notebook.name}" in (ROOT / "README.md").read_text()


def test_the_notebook_trains_predicts_embeds_explains_and_plots(commands, tmp_path):
    pytest.importorskip("matplotlib")
    script = tmp_path / "cells.py"
    script.write_text(READ_HANDLERS + read_code(EXAMPLES / "digits.ipynb") + NOTEBOOK_CHECKS)
    command = commands.run(script=script, cwd=tmp_path, env={"MPLBACKEND": "Agg"})
    assert "test accuracy 0.9" in command.text
    assert (tmp_path / "artifacts" / "store" / "digits" / "1" / "manifest.json").is_file()


def test_similar_images_ranks_by_cosine_similarity(server, tmp_path):
    files: list[Path] = []
    for i in range(18):  # more than a request takes
        files.append(tmp_path / f"{i:02d}-{tiny_bundle.CLASSES[i % 3]}.png")
        files[-1].write_bytes(tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i))
    query = tmp_path / "query.png"
    query.write_bytes(tiny_bundle.make_image("green", seed=99))

    result = subprocess.run(
        [sys.executable, EXAMPLES / "similar_images.py", query, *files, "--url", server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    similarities = [float(line.split()[0]) for line in lines]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] <= 1.001
    assert all(line.endswith("green.png") for line in lines)
