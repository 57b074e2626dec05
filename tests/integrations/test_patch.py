"""``patch`` swaps classes in place, says which, and puts them back."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastcl.integrations import patch


@pytest.fixture
def losses() -> ModuleType:
    return pytest.importorskip("lightly.loss", reason="lightly is not installed")  # type: ignore[no-any-return]


def test_classes_are_swapped_wherever_they_are_known(
    losses: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = import_module("fastcl.integrations.lightly")
    before, script = losses.NTXentLoss, ModuleType("users_script")
    script.Loss = before  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_script", script)
    with patch("lightly") as done:
        assert losses.NTXentLoss is script.Loss is ours.NTXentLoss  # type: ignore[attr-defined]
        assert import_module("lightly.loss.ntx_ent_loss").NTXentLoss is ours.NTXentLoss
        assert isinstance(losses.NTXentLoss(), before) and not losses.NTXentLoss().strict
        assert "lightly.loss.dcl_loss.DCLWLoss" in done.replaced
        with patch("lightly", verbose=False) as again:
            assert not again.replaced
    assert losses.NTXentLoss is script.Loss is before  # type: ignore[attr-defined]
    assert "lightly.loss.ntx_ent_loss.NTXentLoss" in capsys.readouterr().err


def test_strict_is_a_default_while_it_lasts(losses: ModuleType) -> None:
    with patch("lightly", strict=True, verbose=False):
        assert losses.NTXentLoss().strict and not losses.NTXentLoss(strict=False).strict
    ours = import_module("fastcl.integrations.lightly")
    assert not ours.NTXentLoss().strict and ours.NTXentLoss(strict=True).strict


def test_a_script_runs_as_it_is(losses: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from lightly.loss import NTXentLoss\n"
        "assert __name__ == '__main__'\n"
        "print(NTXentLoss.__module__, sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "fastcl.integrations", "lightly", str(script), "--lr", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "fastcl.integrations.lightly ['--lr', '1']", run.stderr
    assert "fastcl replaced lightly.loss" in run.stderr


def test_the_plugin_swaps_before_tests_are_collected(losses: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "from lightly.loss import NTXentLoss\n\n\ndef test():\n    assert NTXentLoss.__module__.startswith('fastcl')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "fastcl.integrations.pytest_plugin", "--fastcl-patch=lightly"]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout


def test_an_unknown_library_is_refused_and_nothing_replaced(losses: ModuleType) -> None:
    before = losses.NTXentLoss
    with pytest.raises(ValueError, match="expected one of lightly"):
        patch("lightly", "torchmetrics")
    assert losses.NTXentLoss is before


def test_a_library_that_is_not_there_is_an_import_error_with_its_origin() -> None:
    with pytest.raises(ImportError, match="Get it"):
        from fastcl.integrations._dropin import upstream

        upstream("no_such_library.loss", "pip install it")


def test_fp16_zero_rows_are_right_unless_strict(losses: ModuleType) -> None:
    ours = import_module("fastcl.integrations.lightly")
    views = [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)).half() for i in range(2)]
    views[0][2] = 0
    assert losses.NTXentLoss()(*views).isnan()  # the fault that strict keeps
    assert ours.NTXentLoss(strict=True)(*views).isnan()
    loss = ours.NTXentLoss()(*views)
    exact = losses.NTXentLoss()(*(view.float() for view in views))
    assert loss.dtype == torch.float16 and abs(loss.float() - exact) < 2e-3 * exact
