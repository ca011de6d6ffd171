"""The command line."""

import pytest

from effattn_lite.__main__ import main
from effattn_lite.registry import METHODS


def test_where_prints_rooms_filled_and_hollow(capsys):
    assert main(["where", "retention"]) == 0
    out = capsys.readouterr().out
    assert "RetNet  (retnet; fixed decay" in out
    assert "■ reference  effattn_lite/reference/retnet.py" in out
    assert main(["where", "nsa"]) == 0
    assert "□" in capsys.readouterr().out


def test_list_prints_every_method(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)


@pytest.mark.parametrize("command", ["where", "check", "bench"])
def test_an_unknown_name_gives_near_ones_and_code_2(command, capsys):
    assert main([command, "retnett"]) == 2
    assert "near names: retnet" in capsys.readouterr().err


def test_what_does_not_stand_is_not_measured(capsys):
    missing = next(name for name, row in METHODS.items() if not row.inputs)
    assert main(["bench", missing]) == 2
    assert "no op yet" in capsys.readouterr().err


def test_a_wrong_command_is_code_2():
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2


def test_check_without_the_tests_compares_forms(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("effattn_lite.__main__.ROOT", tmp_path)
    assert main(["check", "retnet"]) == 0
    assert "chunkwise = recurrent, relative error" in capsys.readouterr().out


def test_train_runs_and_goes_on(tmp_path, capsys):
    out = str(tmp_path / "run")
    asked = ["train", "--model", "retnet", "--data", "parity", "--steps", "3", "--batch", "4", "--out", out]
    assert main([*asked, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "step 3/3" in said.err and "held out: loss" in said.out and "bits a token" in said.out
    assert b"<svg" in (tmp_path / "run" / "loss.svg").read_bytes()
    assert main(asked) == 2 and "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", out]) == 0
    assert main(["train", "--resume", "--out", out, "--lr", "0.5"]) == 2
    assert "--lr is 0.5, but the run was begun with 0.001" in capsys.readouterr().err


def test_train_names_the_argument_that_is_wrong(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "--model", "sambo", "--data", "parity", *out]) == 2
    assert "--model is 'sambo'" in capsys.readouterr().err
    assert main(["train", "--model", "retnet", *out]) == 2
    assert "--data is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["train", "--steps", "many"])
    assert stop.value.code == 2 and "--steps" in capsys.readouterr().err
