"""The README's worked examples of a new method and a new regulariser work as they stand."""

import json
import re
import sys
import types

import pytest
from conftest import BASE, ROOT, run, tiny

from losses import METHODS, REGULARIZERS

README = (ROOT / "README.md").read_text()


def build(name, monkeypatch):
    """The module losses/<name>.py as the README has it."""
    code = re.search(rf"<!-- losses/{name}.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) < 60
    module = types.ModuleType(f"losses.{name}")
    monkeypatch.setitem(sys.modules, f"losses.{name}", module)
    exec(compile(code, f"losses/{name}.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_new_method(regularizer, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "simsiam", build("simsiam", monkeypatch).SimSiam)
    flags = f"{BASE} --method simsiam --simsiam_dim 32 --regularizer {regularizer} --num_tasks 2 --epochs 1"
    assert run(f"{flags} --out_dir {tmp_path}") == 0
    assert (tmp_path / "task1.pt").exists()


@pytest.mark.parametrize("method", ["moco", "vicreg"])
def test_new_regularizer(method, tmp_path, monkeypatch):
    """It sees the features of student and teacher, which part less under its weight than without."""
    monkeypatch.setitem(REGULARIZERS, "feature_l2", build("feature_l2", monkeypatch).FeatureL2)
    distances = []
    for weight in (1e-6, 100):
        out = tmp_path / str(weight)
        flags = (
            f"{tiny(method)} --regularizer feature_l2 --feature_l2_weight {weight} --num_tasks 2 --epochs 1"
        )
        assert run(f"{flags} --lr 0.1 --eval none --log_every 1 --out_dir {out}") == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(("feature_l2" in row) == (row["task"] == 1) for row in rows)
        distances.append(sum(row.get("feature_l2", 0) for row in rows) / weight)
    assert distances[1] < distances[0] / 1.5


def test_links_and_methods_are_there():
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / link.split("#")[0]).exists(), link
    assert "@@" not in README
    listed = re.findall(r"`run_cifar100.sh (\w+) (\w+)`", README)
    assert len(listed) >= 18 and all(m in METHODS and r in REGULARIZERS for m, r in listed)
