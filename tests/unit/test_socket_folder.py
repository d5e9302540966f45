"""The folder of an instance's sockets goes with its owner, or with the next one who comes."""

from __future__ import annotations

import stat
from pathlib import Path

from pd.supervise import socket_folder


def test_the_folder_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with socket_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.parent == tmp_path
        (folder / "steps").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_owner_has_left_goes_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    left = tmp_path / "pd-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "api").touch()
    with socket_folder(tmp_path) as first, socket_folder(tmp_path) as second:
        assert not left.exists()
        assert first.exists() and second.exists() and first != second


def test_folders_of_others_and_those_without_a_lock_are_left_alone(tmp_path: Path) -> None:
    foreign, starting = tmp_path / "pytest-0", tmp_path / "pd-starting"
    for folder in (foreign, starting):
        folder.mkdir()
    (foreign / "lock").touch()
    (starting / "unlocked").touch()
    with socket_folder(tmp_path):
        pass
    assert (foreign / "lock").exists() and (starting / "unlocked").exists()
