"""The views are torchvision's: every operation and whole views with the same parameters, the draws in
distribution. The loader serves them in an order that resumes, and that ranks share without a bit changed."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from data import augment
from data.augment import JITTER_OPS, ViewConfig
from data.datasets import ImageSet, digits
from data.loader import Loader, generator
from utils import UserError

STATS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
PLAIN = ViewConfig(16, jitter_p=0, grey_p=0, flip_p=0)
BUSY = ViewConfig(16, grey_p=0.4, blur_p=0.5, solarize_p=0.5)  # each sample meets other operations
ORDERS = [*((name,) for name in JITTER_OPS), JITTER_OPS, JITTER_OPS[::-1]]


def noise(n, height, width, seed=0):
    """uint8 [n, 3, height, width], independent pixels: the hardest input for a resize."""
    return torch.randint(0, 256, (n, 3, height, width), generator=generator(seed), dtype=torch.uint8)


def colours(size):
    """float [7, 3, size, size]: noise, faint noise, grey noise, corners of the colour cube; flat ones."""
    x = noise(7, size, size, seed=1) / 255
    x[1], x[2], x[3] = 0.5 + 0.02 * (x[1] - 0.5), x[2, :1], x[3].round()
    x[4], x[5], x[6] = 0.0, 1.0, 0.5
    return x


def params(n, **changes):
    """ViewParams that change nothing, but for the changes."""
    return replace(augment.draw(PLAIN, n, None, None, generator(0)), **changes)


def torchvision_crop(images, p, size):
    """One sample and one torchvision operation after the other."""
    for i, box in enumerate(torch.stack((p.top, p.left, p.height, p.width), dim=1).int().tolist()):
        x = F.to_dtype(images[i], torch.float32, scale=True)
        x = F.resized_crop(x, *box, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        yield F.horizontal_flip(x) if p.flip[i] else x


def torchvision_distort(images, p):
    for i, x in enumerate(images):
        for name in p.jitter_order if p.jitter[i] else ():
            x = getattr(F, f"adjust_{name}")(x, getattr(p, name)[i].item())
        x = F.rgb_to_grayscale(x, num_output_channels=3) if p.grey[i] else x
        taps = 2 * min(6, x.shape[-1] - 1) + 1  # a tiny image has no more to reflect
        x = F.gaussian_blur(x, [taps, taps], [p.sigma[i].item()]) if p.blur[i] else x
        yield F.solarize(x, 0.5) if p.solarize[i] else x


def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, torch.stack(list(theirs)), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("height, width", [(8, 8), (32, 32), (40, 24), (24, 40), (150, 97)])
def test_crop_resize_flip_and_normalize(height, width, size):
    """Boxes of any size and place; the first are the whole image, pixels in corners, a row and a column."""
    u = torch.rand(5, 60, generator=generator(3))
    u[:4, :5] = 0.999 * torch.tensor([[1, 0, 0, 0, 1], [1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]])
    h, w = (u[0] * height).floor() + 1, (u[1] * width).floor() + 1
    top, left = (u[2] * (height - h + 1)).floor(), (u[3] * (width - w + 1)).floor()
    images, p = noise(60, height, width), params(60, top=top, left=left, height=h, width=w, flip=u[4] < 0.5)
    ours = augment.crop_resize(images, p, size)
    assert_close(ours, torchvision_crop(images, p, size))
    assert_close(augment.normalize(ours.clone(), *STATS), (F.normalize(x, *STATS) for x in ours))


@pytest.mark.parametrize("size", [5, 16, 32])
@pytest.mark.parametrize("what", [*ORDERS, "grey", "blur", "solarize"])
def test_distortion(what, size):
    """Of samples that drew it, by their own factors; jitter in the drawn order; blur in tiny images, too."""
    factor = torch.tensor([0, 0.6, 0.92, 1, 1.4]).repeat_interleave(7)  # each on every kind of image
    p = params(35, brightness=factor, contrast=factor, saturation=factor, hue=(factor - 1) / 2)
    p.sigma, x = torch.linspace(0.1, 2, 35), colours(size).repeat(5, 1, 1, 1)
    p.jitter_order, name = ((), what) if isinstance(what, str) else (what, "jitter")
    setattr(p, name, torch.arange(35) % 3 < 2 if size > 5 else torch.ones(35, dtype=torch.bool))
    atol = 1e-4 if len(p.jitter_order) > 1 else 1e-5
    assert_close(augment.distort(x.clone(), p), torchvision_distort(x, p), atol)


@pytest.mark.parametrize("source", ["digits", "colours"])
@pytest.mark.parametrize("size", [16, 32])
def test_make_view_is_the_chain_of_torchvision_operations(source, size):
    """On digits; and on noise of several scales: edges, gradients and flat regions that saturate."""
    layers = [F.resize(noise(150, s, s).float(), [24, 40], InterpolationMode.BICUBIC) for s in (2, 5, 12)]
    images, stats = (sum(layers) - 255).clamp(0, 255).byte(), STATS
    if source == "digits":
        data = digits("train", None)
        images, stats = data.images[:150], (data.mean, data.std)
    config, before = replace(BUSY, size=size), images.clone()
    p = augment.draw(config, 150, *images.shape[-2:], generator(6))
    assert all(0 < drawn.sum() < 150 for drawn in (p.flip, p.jitter, p.grey, p.blur, p.solarize))
    view = augment.make_view(images, p, config, *stats)
    assert view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    theirs = (F.normalize(x, *stats) for x in torchvision_distort(torchvision_crop(images, p, size), p))
    assert_close(view, theirs, atol=1e-4)  # rounding errors are divided by the standard deviation, too


def test_views_of_a_gpu(monkeypatch):
    """There the parameters come in one copy, and each operation computes all samples and then chooses."""
    images, config = noise(80, 24, 40), replace(BUSY, solarize_p=0.0)
    p = augment.draw(config, 80, 24, 40, generator(14))
    moved, there = p.to(torch.device("cpu")), p.to(torch.device("meta"))
    assert all(torch.equal(v, getattr(moved, k)) for k, v in vars(p).items() if torch.is_tensor(v))
    assert moved.jitter_order == p.jitter_order and moved.flip.dtype == torch.bool
    assert there.blur.device.type == "meta" and there.solarize.device.type == "cpu"  # which no sample drew
    view, abroad = (augment.make_view(x, p, config, *STATS) for x in (images, images.to("meta")))
    assert abroad.device.type == "meta" and abroad.shape == view.shape
    monkeypatch.setattr(augment, "on_samples", augment.on_all)
    torch.testing.assert_close(augment.make_view(images, moved, config, *STATS), view, rtol=0, atol=1e-5)


def distance(a, b):
    """Kolmogorov-Smirnov: the largest difference between the distribution functions of two samples."""
    points = torch.cat([a, b]).double()
    below = [torch.searchsorted(x.double().sort().values, points, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("height, width", [(32, 32), (96, 64), (16, 128), (128, 16)])
@pytest.mark.parametrize("min_scale", [0.08, 0.2])
def test_boxes_are_distributed_as_torchvisions(height, width, min_scale):
    """In the elongated images most tries are misfits: there the number of tries and the fallback count."""
    image, limits = torch.empty(3, height, width), ((min_scale, 1), (3 / 4, 4 / 3))
    torch.manual_seed(8)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, *limits) for _ in range(5000)]).float().T

    def measured(top, left, h, w):
        return torch.stack((top, left, h, w, h * w, w / h, height - h - top, width - w - left))

    ours = measured(*augment.draw_boxes(5000, height, width, min_scale, generator(7)))
    assert torch.equal(ours[:4], ours[:4].round()) and ours.min() >= 0 and ours[2:4].min() >= 1
    distances = list(map(distance, ours, measured(*theirs)))
    assert max(distances) < 0.036, distances  # equal distributions exceed it once in about 300


@pytest.mark.parametrize("shape", [(4, 100), (5, 101), (100, 4), (101, 5), (64, 21)])
def test_fallback_box_is_torchvisions(shape):
    ours = torch.stack(augment.draw_boxes(8, *shape, 0.9, generator(9)))
    theirs = RandomResizedCrop.get_params(torch.empty(3, *shape), (0.9, 1), (3 / 4, 4 / 3))
    assert ours.T.tolist() == [list(theirs)] * 8


@pytest.mark.parametrize("field", ["flip", "jitter", "grey", "blur", "solarize"])
def test_probabilities(field):
    for p, low, high in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.3, 0.27, 0.33)):
        drawn = getattr(augment.draw(replace(BUSY, **{f"{field}_p": p}), 4000, 32, 32, generator(10)), field)
        assert low <= drawn.float().mean() <= high


def test_strengths_are_uniform_and_neutral_without_jitter():
    p = augment.draw(ViewConfig(16, contrast=0.3), 10000, 32, 32, generator(11))
    for name, neutral, reach in zip(JITTER_OPS, (1, 1, 1, 0), (0.4, 0.3, 0.2, 0.1)):
        drawn, idle = getattr(p, name)[p.jitter] - neutral, getattr(p, name)[~p.jitter]
        assert distance(drawn, torch.linspace(-reach, reach, 10000)) < 0.02
        assert drawn.abs().max() <= reach + 1e-6 and len(idle) and (idle == neutral).all()
    assert distance(p.sigma, torch.linspace(0.1, 2, 10000)) < 0.02


def test_parameters_are_independent():
    """No two rest on the same random number (each operation would still look right on its own)."""
    p = augment.draw(BUSY, 10000, 32, 32, generator(12))
    drawn = {k: v.float() for k, v in vars(p).items() if k not in ("height", "width", "jitter_order")}
    drawn |= {"ratio": torch.log(p.width / p.height), "area": p.width * p.height}  # these two are independent
    drawn |= {"top": p.top / (33 - p.height), "left": p.left / (33 - p.width)}
    small = drawn["area"] < 500  # larger boxes are less free in ratio and position
    correlation = torch.corrcoef(torch.stack([v[small] for v in drawn.values()])).fill_diagonal_(0)
    assert len(drawn) == 14 and correlation.abs().max() < 0.1


def test_every_jitter_order_occurs():
    rng = generator(13)
    orders = [augment.draw(BUSY, 1, 32, 32, rng).jitter_order for _ in range(300)]
    assert len(set(orders)) == 24 and all(sorted(order) == sorted(JITTER_OPS) for order in orders)


def test_generator_depends_on_every_entry_of_its_key():
    """On their order and number too: an epoch's order and its first step's views are different streams."""
    keys = [(5, 1, 2, 3), (6, 1, 2, 3), (5, 2, 2, 3), (5, 1, 3, 3), (5, 1, 2, 4), (1, 5, 2, 3), (5, 1, 3, 2)]
    keys += [(5, 1, 2), (0,), (0, 0), (5, 1, 0), (5, 1, 0, 0)]
    first, again = ([tuple(torch.rand(4, generator=generator(*k)).tolist()) for k in keys] for _ in range(2))
    assert len(set(first)) == len(keys) and first == again


def serve(n=46, epoch=0, seed=5, task=1, steps=None):
    """The labels [steps, 5] of an epoch; the task is the odd ones of n images, which show their labels."""
    pixels = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    images, views = ImageSet(pixels, torch.arange(n), [], (0,) * 3, (1,) * 3), [PLAIN, replace(PLAIN, size=8)]
    loader = Loader(images, torch.arange(1, n, 2), 5, views, seed, task, steps=steps)
    batches = list(loader.epoch(epoch))
    for (first, second), labels in batches:
        assert first.shape == (5, 3, 16, 16) and second.shape == (5, 3, 8, 8)
        assert all(torch.equal((x[:, 0, 0, 0] * 255).round().long(), labels) for x in (first, second))
    return torch.stack([labels for _, labels in batches])


def test_order_is_a_permutation_of_the_task():
    """Another one for each epoch, seed and task."""
    orders = [serve(40, **key).flatten().tolist() for key in ({}, {"epoch": 1}, {"seed": 6}, {"task": 2}, {})]
    assert all(sorted(order) == list(range(1, 40, 2)) for order in orders) and orders.pop() == orders[0]
    assert len({tuple(order) for order in [*orders, range(1, 40, 2)]}) == 5


def test_only_whole_batches():
    """The last images of an order are left out, others each time; more steps begin the same order again."""
    order = serve()  # of 23 images
    assert order.shape == (4, 5) and len(order.unique()) == 20
    assert len(torch.cat([serve(epoch=e) for e in range(10)]).unique()) == 23
    assert torch.equal(serve(steps=6), torch.cat([order, order[:2]]))
    assert serve(10).shape == (1, 5)
    with pytest.raises(UserError, match=r"--batch_size 5.* 4 images"):
        serve(8)


def serve_noise(count, batch_size, rank=0, world=1, epoch=0, start=0, seed=5, task=0, steps=None):
    """(view 1, view 2, labels) for each step; both views are drawn with the same settings."""
    images, everything = ImageSet(noise(count, 16, 16), torch.arange(count), [], *STATS), torch.arange(count)
    loader = Loader(images, everything, batch_size, [BUSY, BUSY], seed, task, rank, world, steps=steps)
    return [(*views, labels) for views, labels in loader.epoch(epoch, start)]


def test_start_resumes_the_epoch():
    whole, resumed = serve_noise(40, 8, epoch=3), serve_noise(40, 8, epoch=3, start=2)
    assert (len(whole), len(resumed)) == (5, 3)
    assert all(all(map(torch.equal, batch, again)) for batch, again in zip(whole[2:], resumed))


def test_views_differ_from_each_other_and_by_seed_task_epoch_and_step():
    """Image by image: the second step serves the same ones."""
    keys = ({}, {"epoch": 1}, {"task": 1}, {"seed": 6})
    steps = [step for key in keys for step in serve_noise(8, 8, steps=2, **key)]
    views = torch.stack([view[labels.argsort()] for *pair, labels in steps for view in pair], dim=1)
    assert all(len(of_one.unique(dim=0)) == 16 for of_one in views.flatten(2))


@pytest.mark.parametrize("batch_size, world", [(8, 2), (8, 8), (160, 2)])
def test_ranks_together_see_what_one_process_sees(batch_size, world):
    """Bit for bit: a view does not depend on its neighbours, nor on how the CPU cuts a share into chunks."""
    ranks = [serve_noise(2 * batch_size, batch_size, rank, world) for rank in range(world)]
    for step, *parts in zip(serve_noise(2 * batch_size, batch_size), *ranks, strict=True):
        assert all(torch.equal(torch.cat(shares), x) for x, *shares in zip(step, *parts))
        assert {len(labels) for *_, labels in parts} == {batch_size // world}
