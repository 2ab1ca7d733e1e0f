"""The README's worked example of a new method works as it stands."""

import re
import sys
import types

import pytest
from conftest import BASE, ROOT, run

from losses import METHODS, REGULARIZERS

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_new_method(regularizer, tmp_path, monkeypatch):
    code = re.search(r"<!-- losses/simsiam.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) < 60
    module = types.ModuleType("losses.simsiam")
    monkeypatch.setitem(sys.modules, "losses.simsiam", module)
    exec(compile(code, "losses/simsiam.py", "exec"), vars(module))
    monkeypatch.setitem(METHODS, "simsiam", module.SimSiam)
    flags = f"{BASE} --method simsiam --simsiam_dim 32 --regularizer {regularizer} --num_tasks 2 --epochs 1"
    assert run(f"{flags} --out_dir {tmp_path}") == 0
    assert (tmp_path / "task1.pt").exists()


def test_links_and_methods_are_there():
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / link.split("#")[0]).exists(), link
    assert "@@" not in README
    for method in METHODS:
        for regularizer in REGULARIZERS:
            assert f"`run_cifar100.sh {method} {regularizer}`" in README
