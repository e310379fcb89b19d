"""Where the files that the project ships are: data/ of a checkout, or inside the installed package."""

from pathlib import Path


def data_folder() -> Path:
    """The folder with the shipped prompt sets and adapters."""
    package = Path(__file__).resolve().parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / "README.md").is_file():
            return folder
    raise ValueError(f"the shipped data was not found beside {package}: install the package again")
