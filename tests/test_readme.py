"""The README's worked examples of a new method and a new regulariser work as they stand, and its links lead
somewhere."""

import json
import re
import sys
import types

import pytest
from conftest import BASE, ROOT, run, tiny

from losses import METHODS, REGULARIZERS
from losses.base import over_views

README = (ROOT / "README.md").read_text()


@pytest.fixture
def register(monkeypatch):
    """Puts the README's losses/<name>.py where an import finds it, and its line into the registry."""

    def put(registry, name, class_name):
        code = re.search(rf"<!-- losses/{name}.py -->\n```python\n(.*?)```", README, re.DOTALL)[1]
        module = types.ModuleType(f"losses.{name}")
        exec(compile(code, f"losses/{name}.py", "exec"), vars(module))
        monkeypatch.setitem(sys.modules, f"losses.{name}", module)
        monkeypatch.setitem(registry, name, class_name)
        return module

    return put


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_new_method(regularizer, tmp_path, register):
    register(METHODS, "simsiam", "SimSiam")
    flags = f"{BASE} --method simsiam --simsiam_dim 32 --regularizer {regularizer} --num_tasks 2 --epochs 1"
    assert run(f"{flags} --out_dir {tmp_path}") == 0 and (tmp_path / "task1.pt").exists()


@pytest.mark.parametrize("method", ["moco", "vicreg"])
def test_new_regularizer(method, tmp_path, register):
    """It sees the features of student and teacher, which part less under a large weight than a small one."""
    module, distances = register(REGULARIZERS, "feature_l2", "FeatureL2"), []
    for weight in (1e-6, 20):
        out, flags = (
            tmp_path / str(weight),
            f"{tiny(method)} --regularizer feature_l2 --num_tasks 2 --epochs 1",
        )
        flags += " --lr 0.05 --eval none --log_every 1"
        module.over_views = lambda *views, weight=weight: weight * over_views(*views)
        assert run(f"{flags} --out_dir {out}") == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(("feature_l2" in row) == (row["task"] == 1) for row in rows)
        distances.append(sum(row.get("feature_l2", 0) for row in rows) / weight)
    assert distances[1] < distances[0] / 1.5


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links(page):
    """To files that are there, and to headings in them."""
    links = re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / page).read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        titles = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in (
            re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
        ), link
    if page == "README.md":
        assert {f"losses/{name}.py" for name in (METHODS | REGULARIZERS)} <= set(links)
