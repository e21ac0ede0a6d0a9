"""A home that is missing or cannot be written: the sentence names the setting and the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_core.errors import ConfigError, Unavailable
from distill_core.training.checkpoint import STATE, writing
from distill_service.settings import load_settings, of_a_folder, settings
from distillery_cli.app import main

SERVERS = ("distillery_trainer.server", "distillery_trainer.worker", "distillery_converter.worker")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """No folder can be made in it, whoever asks: it is a file."""
    path = tmp_path / "nonexistent"
    path.write_text("")
    for name in [name for name in os.environ if name.startswith("DISTILLERY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(path))
    settings.cache_clear()
    yield path
    settings.cache_clear()


@pytest.mark.parametrize("command", [["models"], ["train", "edm_digits"], ["up"]])
def test_a_command_says_which_setting_names_the_folder_that_it_cannot_write(home, capsys, command):
    assert main(command) == 75
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"set DISTILLERY_STATE_DIR (now {home}/.local/state/distillery) to where you can write" in said
    assert "checkpoint" not in said
    assert "internal error" not in said


def test_doctor_names_the_setting_of_each_folder(home, capsys, monkeypatch):
    monkeypatch.setenv("DISTILLERY_RUNS_DIR", str(home / "runs"))
    main(["doctor"])
    said = capsys.readouterr().out
    for name, variable in (
        ("state folder", "STATE_DIR"),
        ("run folders", "RUNS_DIR"),
        ("cache", "CACHE_DIR"),
    ):
        assert f"{name}: make it writable, or set DISTILLERY_{variable} to another" in said


@pytest.mark.parametrize("module", SERVERS)
def test_a_service_ends_with_that_sentence_and_no_traceback(home, module):
    ended = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True)
    assert ended.returncode == 75
    assert "DISTILLERY_STATE_DIR" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_user_without_a_home_is_told_the_setting(monkeypatch):
    monkeypatch.setattr(Path, "expanduser", _no_home)
    with pytest.raises(ConfigError, match=r"set HOME, or DISTILLERY_STATE_DIR") as caught:
        load_settings()
    assert caught.value.field == "state_dir"
    with pytest.raises(ConfigError, match=r"set HOME, or DISTILLERY_CACHE_DIR"):
        load_settings(state_dir="/srv/state")
    assert load_settings(state_dir="/srv/state", cache_dir="/srv/cache").runs == Path("/srv/state/runs")


def _no_home(path: Path) -> Path:
    """What pathlib does where HOME is unset and the user is in no list of users."""
    if str(path).startswith("~"):
        raise RuntimeError("Could not determine home directory.")
    return path


def test_the_setting_is_the_one_that_would_move_the_folder(tmp_path):
    known = load_settings(state_dir=tmp_path / "a", cache_dir=tmp_path / "b", runs_dir=tmp_path / "a" / "own")
    assert known.naming(tmp_path / "a" / "store" / "x") == {"DISTILLERY_STATE_DIR": tmp_path / "a"}
    assert known.naming(tmp_path / "a" / "own" / "x") == {"DISTILLERY_RUNS_DIR": tmp_path / "a" / "own"}
    assert known.naming(tmp_path).keys() == {f"DISTILLERY_{name}_DIR" for name in ("STATE", "CACHE", "RUNS")}
    assert known.naming(tmp_path.parent / "other") == {}


def test_other_faults_of_files_are_said_as_they_are(tmp_path):
    known = load_settings(state_dir=tmp_path, cache_dir=tmp_path / "cache")
    full = OSError(28, "No space left on device", str(tmp_path / "store" / "x"))
    assert str(of_a_folder(full, known)) == f"No space left on device: {tmp_path}/store/x"
    gone = FileNotFoundError(2, "No such file or directory", str(tmp_path / "x"))
    assert "DISTILLERY" not in str(of_a_folder(gone, known))
    assert "DISTILLERY" not in str(of_a_folder(PermissionError(13, "Permission denied", "/elsewhere"), known))


def test_a_checkpoint_is_spoken_of_only_where_there_is_one(tmp_path):
    with pytest.raises(Unavailable, match="then begin again"), writing("it", tmp_path):
        raise OSError(28, "No space left on device")
    (tmp_path / "000000007").mkdir()
    (tmp_path / "000000007" / STATE).write_text("{}")
    with pytest.raises(Unavailable, match="then continue from the last checkpoint"), writing("it", tmp_path):
        raise OSError(28, "No space left on device")
