"""The benchmarks run, and count what they say."""

import json
import time

from conftest import arguments

from benchmarks import count, step, wall

SHAPE = "--backbone resnet10 --width 8 --image_size 8 --batch_size 16 --moco_queue_size 64 --moco_hidden 32"


def test_step_against_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "REFILL", 0)
    file = tmp_path / "step.json"
    step.main(f"{SHAPE} --workers 0 --rounds 2 --steps 1 --against plain --json {file}".split())
    found = json.loads(file.read_text())
    assert found["ratios"].keys() == {"pnr / finetune", "plain / pnr"}
    assert found["parts"]["pnr"].keys() == found["parts"]["plain"].keys()
    assert all(len(times) == 2 and min(times) > 0 for times in found["steps"].values())


def test_count_grows_with_the_batch():
    """Arithmetic and what is kept do, with each image; networks and kernels do not."""
    flags = "--regularizer pnr --moco_queue_size 64 --batch_size"
    small, large = (count.step(*count.build(arguments(f"{flags} {n}"))) for n in (16, 32))
    assert large[0]["convolutions"] == 2 * small[0]["convolutions"] > 0
    assert large[1].kernels == small[1].kernels
    for name, size in small[2].items():
        assert large[2][name] == size if name != "kept for the backward pass" else large[2][name] > 1.5 * size


def test_each_moment_counts_once(monkeypatch):
    """For the innermost part."""
    now = iter(range(0, 100, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = wall.Clock()
    inner = clock.timed("training")(lambda: None)
    clock.timed("data")(inner)()
    assert clock.spent == {"start-up": 10, "data": 20, "training": 10}
    picture = wall.draw({"a": dict.fromkeys(wall.PARTS, 1.0)})
    assert len(picture.axes[0].patches) == len(wall.PARTS)
