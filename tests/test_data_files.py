"""Where the shipped data is looked for: an installed package has it inside, a checkout beside it."""

from pathlib import Path

import pytest

from safety_mech import data_files


def test_an_installed_packages_own_data_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path.resolve() / "safety_mech"
    inside, beside = package / "data", package.parent / "data"
    for folder in (inside, beside):
        folder.mkdir(parents=True)
        (folder / "README.md").touch()
    monkeypatch.setattr(data_files, "__file__", str(package / "data_files.py"))
    assert data_files.data_folder() == inside
    (inside / "README.md").unlink()
    assert data_files.data_folder() == beside
    (beside / "README.md").unlink()
    with pytest.raises(ValueError, match="install the package again"):
        data_files.data_folder()
