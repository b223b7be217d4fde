"""The callback that keeps best.ckpt, the weights of the best epoch, in the run directory."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint

PATH_KEYS = ("best_model_path", "kth_best_model_path", "last_model_path")


class ModelCheckpoint(LightningModelCheckpoint):
    """Lightning's ModelCheckpoint, in a run directory that may be moved between two starts."""

    _is_resumed = False

    def write_to(self, directory: Path, is_resumed: bool) -> None:
        """Write to the run directory, unless the settings name another directory."""
        if self.dirpath is None:
            self.dirpath = str(directory)
        self._is_resumed = is_resumed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, with paths in the current directory of the run."""
        if self._is_resumed:
            state_dict = _move_paths(state_dict, str(self.dirpath))
        super().load_state_dict(state_dict)


def _move_paths(state: dict[str, Any], new_directory: str) -> dict[str, Any]:
    """Return the state with all its paths in the new directory."""
    old_directory = state["dirpath"]
    moved = dict(state)
    moved["dirpath"] = new_directory
    for key in PATH_KEYS:
        moved[key] = state[key].replace(old_directory, new_directory, 1)
    moved["best_k_models"] = {
        path.replace(old_directory, new_directory, 1): score
        for path, score in state["best_k_models"].items()
    }
    return moved
