"""Recipes by name, and the translation of `run DATA …` to arguments of `fit`."""

import os
from pathlib import Path

from train.data.sources import READERS
from train.data.sources.remote import source_name
from train.data.sources.several import LIST_SUFFIX, split_sources

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = RECIPES / "folder.yaml"
MAX_NAME_LENGTH = 63  # of a model in the store


class UsageError(ValueError):
    """A command that cannot be run as given; the message is one line: what is wrong, what to do."""


def expand_data_command(command: str, arguments: list[str]) -> list[str]:
    """Return the arguments of `fit` for `DATA [--recipe R] [--root DIR] [fit flags]`.

    Without --recipe, the recipe with the name of the data is used, or else the one for folders.
    Messages name `command`. Raises UsageError.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        return ["fit", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            f"{command}: name the data first, e.g. python -m train {command} digits, or a folder "
            "of class folders"
        )

    data = arguments[0]
    recipe, rest = extract_flag(arguments[1:], "--recipe")
    root, rest = extract_flag(rest, "--root")

    fit_arguments = ["fit", "--config", str(find_recipe(recipe, data)), "--data.source", data]
    if root:
        fit_arguments += ["--data.root", root]
    return fit_arguments + rest


def find_recipe(recipe: str | None, data: str) -> Path:
    """Return the file of a recipe that is given by path or by name.

    None stands for the recipe with the name of the data, of several sources the first one, or else
    the one for folders.
    """
    if recipe is None:
        data = split_sources(data)[0]
    if recipe is None and "/" in data:
        return DEFAULT_RECIPE
    if recipe is None:
        named_like_data = RECIPES / f"{data}.yaml"
        return named_like_data if named_like_data.is_file() else DEFAULT_RECIPE
    if Path(recipe).is_file():
        return Path(recipe)

    named = RECIPES / f"{recipe.removesuffix('.yaml')}.yaml"
    if not named.is_file():
        raise UsageError(
            f"--recipe {recipe}: no such recipe or file; there are {', '.join(list_recipes())}"
        )
    return named


def list_recipes() -> list[str]:
    """Return the names of all recipes."""
    files = RECIPES.rglob("*.yaml")
    return sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in files)


def extract_flag(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of `--flag VALUE` or `--flag=VALUE`, and the other arguments."""
    for i, argument in enumerate(arguments):
        if argument == flag:
            if i + 1 == len(arguments):
                raise UsageError(f"{flag}: needs a value")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments


def default_model_name(source: str) -> str:
    """Return a valid model name, made of the data's name or of the last part of its path or URL.

    A scheme such as hf:, the query of a URL, and the ending of a table or an archive are not part
    of it. Several sources have the name of the first one, or of the file that lists them.
    """
    if source.endswith(LIST_SUFFIX):
        source = source.removesuffix(LIST_SUFFIX)
    else:
        source = split_sources(source)[0]
    scheme, colon, location = source.partition(":")
    if colon and scheme in READERS and location:
        source = location
    is_path = "/" in source or source in (".", "..")
    if is_path and "://" not in source:
        source = str(Path(os.path.expanduser(source)).resolve())
    name = source_name(source)

    characters: list[str] = []
    for character in name.lower():
        is_allowed = character.isascii() and (character.isalnum() or character in "._-")
        characters.append(character if is_allowed else "-")
    return "".join(characters).strip("._-")[:MAX_NAME_LENGTH] or "model"
