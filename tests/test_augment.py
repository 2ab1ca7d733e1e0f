"""The views are torchvision's: every operation and whole views with the same parameters, the draws in
distribution; and the loader serves them in an order that is a permutation, resumes, and is shared between
ranks without changing a bit."""

import itertools
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from data import DataError, augment
from data.augment import JITTER_OPS, ViewConfig, ViewParams
from data.datasets import DIGITS_STATS, digits
from data.loader import Loader, generator

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
BUSY = ViewConfig(
    16, jitter_p=0.8, grey_p=0.4, blur_p=0.5, solarize_p=0.5
)  # each sample meets a different subset


def noise(n, height, width, seed=0):
    """uint8 [n, 3, height, width], independent pixels: the hardest input for a resize."""
    return torch.randint(0, 256, (n, 3, height, width), generator=generator(seed), dtype=torch.uint8)


def colours(size=16):
    """float [7, 3, size, size]: noise, faint noise, grey noise, the corners of the colour cube, black, white
    and mid-grey."""
    x = torch.rand(3, 3, size, size, generator=generator(1))
    x[1] = 0.5 + 0.02 * (x[1] - 0.5)
    x[2] = x[2, :1]
    corners = torch.randint(0, 2, (1, 3, size, size), generator=generator(2)).float()
    flat = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, size, size)
    return torch.cat([x, corners, flat])


def params(n, rows, columns, **changes):
    """ViewParams that take the whole image of rows x columns pixels and leave it as it is, except for the
    changes."""
    off, zero, one = torch.zeros(n, dtype=torch.bool), torch.zeros(n), torch.ones(n)
    plain = ViewParams(
        top=zero, left=zero, height=rows * one, width=columns * one, flip=off, jitter=off, brightness=one,
        contrast=one,
        saturation=one, hue=zero, grey=off, blur=off, sigma=one, solarize=off, jitter_order=JITTER_OPS,
    )  # fmt: skip
    return replace(plain, **changes)


def torchvision_crop(image, p, i, size):
    box = [int(v[i]) for v in (p.top, p.left, p.height, p.width)]
    x = F.to_dtype(image, torch.float32, scale=True)
    return F.resized_crop(x, *box, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def torchvision_view(image, p, i, size, mean, std):
    """Sample i's view, one torchvision operation after the other."""
    x = torchvision_crop(image, p, i, size)
    if p.jitter[i]:
        for name in p.jitter_order:
            x = ADJUST[name](x, getattr(p, name)[i].item())
    if p.grey[i]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if p.blur[i]:
        x = F.gaussian_blur(x, [13, 13], [p.sigma[i].item()])
    if p.solarize[i]:
        x = F.solarize(x, 0.5)
    if p.flip[i]:
        x = F.horizontal_flip(x)
    return F.normalize(x, mean, std)


def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, torch.stack(list(theirs)), rtol=0, atol=atol)


# ---- operations


def boxes(n, height, width, seed):
    """Boxes of any size and position; the first ones are the whole image, single pixels in the corners, a row
    and a column."""
    u = torch.rand(4, n, generator=generator(seed))
    h, w = (u[0] * height).floor() + 1, (u[1] * width).floor() + 1
    h[:5], w[:5] = torch.tensor([height, 1, 1, 1, height]), torch.tensor([width, 1, 1, width, 1])
    top, left = (u[2] * (height - h + 1)).floor(), (u[3] * (width - w + 1)).floor()
    top[:3], left[:3] = torch.tensor([0, 0, height - 1]), torch.tensor([0, 0, width - 1])
    return {"top": top, "left": left, "height": h, "width": w}


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (40, 24), (24, 40), (150, 97)])
def test_crop_and_resize(shape, size):
    images = noise(60, *shape)
    p = params(60, *shape, **boxes(60, *shape, seed=3))
    theirs = [torchvision_crop(image, p, i, size) for i, image in enumerate(images)]
    assert_close(augment.crop_resize(images, p, size), theirs)


def test_crop_of_the_output_size_copies_the_pixels():
    images = noise(1, 20, 30)
    p = params(1, 16, 16, top=torch.tensor([3.0]), left=torch.tensor([9.0]))
    assert_close(augment.crop_resize(images, p, 16), images[:, :, 3:19, 9:25] / 255, atol=1e-6)


def test_flip_is_folded_into_the_crop():
    images = noise(40, 40, 24)
    p = params(40, 40, 24, **boxes(40, 40, 24, seed=4), flip=torch.arange(40) % 2 == 0)
    theirs = [torchvision_crop(image, p, i, 16) for i, image in enumerate(images)]
    assert_close(
        augment.crop_resize(images, p, 16),
        [F.horizontal_flip(x) if p.flip[i] else x for i, x in enumerate(theirs)],
    )


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.0, 1.4])
def test_brightness_contrast_and_saturation(name, factor):
    x = colours()
    theirs = [ADJUST[name](sample, factor) for sample in x]
    operation = getattr(augment, f"{name}_")
    assert_close(operation(x.clone(), torch.full((len(x), 1, 1, 1), factor)), theirs)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.0, 0.04, 0.1, 0.5])
def test_hue(shift):
    x = colours()
    theirs = [F.adjust_hue(sample, shift) for sample in x]
    assert_close(augment.hue_(x.clone(), torch.full((len(x), 1, 1, 1), shift)), theirs)


def test_factors_belong_to_their_samples():
    x = torch.rand(6, 3, 16, 16, generator=generator(5))
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ]:
        factors = torch.linspace(low, high, 6)
        theirs = [ADJUST[name](sample, f.item()) for sample, f in zip(x, factors)]
        assert_close(getattr(augment, f"{name}_")(x.clone(), factors.view(-1, 1, 1, 1)), theirs)


@pytest.mark.parametrize(
    "order", [JITTER_OPS, JITTER_OPS[::-1], ("hue", "brightness", "saturation", "contrast")]
)
def test_jitter_follows_the_drawn_order(order):
    x = colours()
    p = params(
        7, 16, 16, jitter=torch.ones(7, dtype=torch.bool), jitter_order=order,
        brightness=torch.linspace(0.6, 1.4, 7), contrast=torch.linspace(1.4, 0.6, 7),
        saturation=torch.linspace(0.8, 1.2, 7), hue=torch.linspace(0.1, -0.1, 7),
    )  # fmt: skip
    theirs = list(x)
    for name in order:
        theirs = [ADJUST[name](sample, getattr(p, name)[i].item()) for i, sample in enumerate(theirs)]
    assert_close(augment.distort(x.clone(), p), theirs, atol=1e-4)


def test_greyscale_only_where_drawn():
    x = colours()
    p = params(7, 16, 16, grey=torch.arange(7) % 2 == 0)
    theirs = [F.rgb_to_grayscale(sample, 3) if p.grey[i] else sample for i, sample in enumerate(x)]
    assert_close(augment.distort(x.clone(), p), theirs)


@pytest.mark.parametrize("size", [16, 32])
def test_blur_has_a_sigma_for_each_sample(size):
    x = colours(size)
    p = params(
        7, size, size, blur=torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool(), sigma=torch.linspace(0.1, 2, 7)
    )
    theirs = [
        F.gaussian_blur(sample, [13, 13], [p.sigma[i].item()]) if p.blur[i] else sample
        for i, sample in enumerate(x)
    ]
    assert_close(augment.distort(x.clone(), p), theirs)


def test_solarize_only_where_drawn():
    x = colours()
    p = params(7, 16, 16, solarize=torch.arange(7) % 2 == 0)
    theirs = [F.solarize(sample, 0.5) if p.solarize[i] else sample for i, sample in enumerate(x)]
    assert_close(augment.distort(x.clone(), p), theirs)


def test_normalize():
    x = colours()
    theirs = [F.normalize(sample, MEAN, STD) for sample in x]
    assert_close(augment.normalize(x.clone(), MEAN, STD), theirs)


# ---- whole views


def digit_images():
    data = digits("train", None)
    return data.images[:150], DIGITS_STATS


def colour_images():
    """Noise at several scales, so that there are edges, gradients and flat regions; strong enough to
    saturate."""
    layers = [
        F.resize(noise(150, s, s, seed=s).float(), [24, 40], InterpolationMode.BICUBIC) for s in (2, 5, 12)
    ]
    return (sum(layers) - 255).clamp(0, 255).byte(), (MEAN, STD)


@pytest.mark.parametrize("source", [digit_images, colour_images])
@pytest.mark.parametrize("size", [16, 32])
def test_make_view_is_the_chain_of_torchvision_operations(source, size):
    images, (mean, std) = source()
    config = replace(BUSY, size=size)
    p = augment.draw(config, len(images), *images.shape[-2:], generator(6))
    for drawn in (p.flip, p.jitter, p.grey, p.blur, p.solarize):
        assert 0 < drawn.sum() < len(images)
    before = images.clone()
    view = augment.make_view(images, p, config, mean, std)
    assert view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    # the pixels here are divided by the standard deviation, and so are the rounding errors
    assert_close(
        view, [torchvision_view(image, p, i, size, mean, std) for i, image in enumerate(images)], atol=1e-4
    )


# ---- draws


def distance(a, b):
    """Kolmogorov-Smirnov: the largest difference between the distribution functions of two samples."""
    a, b = a.double().sort().values, b.double().sort().values
    points = torch.cat([a, b])
    below = [torch.searchsorted(s, points, right=True) / len(s) for s in (a, b)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (16, 128), (128, 16)])
@pytest.mark.parametrize("min_scale", [0.08, 0.2])
def test_boxes_are_distributed_as_torchvisions(shape, min_scale):
    """In the elongated images most tries are misfits, so there the number of tries and the fallback count
    too."""
    n = 5000
    top, left, h, w = augment.draw_boxes(n, *shape, min_scale, generator(7))
    for start, length, side in ((top, h, shape[0]), (left, w, shape[1])):
        assert torch.equal(start, start.round()) and torch.equal(length, length.round())
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= side).all()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        image = torch.empty(3, *shape)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, (min_scale, 1), (3 / 4, 4 / 3)) for _ in range(n)]
        )
    their_top, their_left, their_h, their_w = theirs.T
    pairs = {
        "top": (top, their_top),
        "left": (left, their_left),
        "height": (h, their_h),
        "width": (w, their_w),
        "scale": (h * w, their_h * their_w),
        "ratio": (w / h, their_w / their_h),
        "room below": (shape[0] - h - top, shape[0] - their_h - their_top),
        "room right": (shape[1] - w - left, shape[1] - their_w - their_left),
    }
    distances = {name: distance(*pair) for name, pair in pairs.items()}
    assert max(distances.values()) < 0.036, (
        distances
    )  # two samples of one distribution exceed it once in about 300


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
    config = ViewConfig(16, jitter_p=0.8, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    p = augment.draw(config, 10000, 32, 32, generator(11))
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        drawn, idle = getattr(p, name)[p.jitter], getattr(p, name)[~p.jitter]
        assert distance(drawn, torch.linspace(low, high, 10000)) < 0.02
        assert low - 1e-6 <= drawn.min() and drawn.max() <= high + 1e-6
        assert (idle == (0.0 if name == "hue" else 1.0)).all()
    assert distance(p.sigma, torch.linspace(0.1, 2, 10000)) < 0.02


def test_parameters_are_independent():
    """No two rest on the same random number (each operation would still look right on its own)."""
    config = ViewConfig(16, jitter_p=0.5, grey_p=0.5, flip_p=0.5, blur_p=0.5, solarize_p=0.5)
    p = augment.draw(config, 10000, 32, 32, generator(12))
    drawn = {k: v.float() for k, v in vars(p).items() if torch.is_tensor(v) and k != "width"}
    drawn["ratio"] = torch.log(p.width / p.height)
    drawn["height"] = p.width * p.height  # the area, which does not depend on the ratio
    drawn["top"] = p.top / (33 - p.height)
    drawn["left"] = p.left / (33 - p.width)
    small = p.height * p.width < 500  # larger boxes are less free in ratio and position
    correlation = torch.corrcoef(torch.stack([v[small] for v in drawn.values()])).fill_diagonal_(0)
    assert len(drawn) == 14 and correlation.abs().max() < 0.1


def test_every_jitter_order_occurs():
    rng = generator(13)
    orders = [augment.draw(BUSY, 1, 32, 32, rng).jitter_order for _ in range(300)]
    assert len(set(orders)) == 24 and all(sorted(order) == sorted(JITTER_OPS) for order in orders)


def test_draw_is_a_function_of_the_generator():
    def fields(p):
        return torch.stack([v.float() for v in vars(p).values() if torch.is_tensor(v)]), p.jitter_order

    first, again, other = (fields(augment.draw(BUSY, 64, 32, 32, generator(seed))) for seed in (14, 14, 15))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], other[0])
    assert len(first[0].unique(dim=1).T) == 64  # samples differ from each other


def test_slice_of_params_is_the_rows_of_the_whole():
    p = augment.draw(BUSY, 50, 32, 32, generator(16))
    part = p[13:29]
    assert isinstance(part, ViewParams) and part.jitter_order == p.jitter_order
    for name, value in vars(p).items():
        assert name == "jitter_order" or torch.equal(getattr(part, name), value[13:29])


# ---- loader


def test_generator_depends_on_every_entry_of_its_key():
    keys = [
        (5, 1, 2, 3),
        (6, 1, 2, 3),
        (5, 2, 2, 3),
        (5, 1, 3, 3),
        (5, 1, 2, 4),
        (1, 5, 2, 3),
        (5, 1, 3, 2),
        (5, 1, 2),
    ]
    keys += [
        (0,),
        (0, 0),
        (5, 1, 0),
        (5, 1, 0, 0),
    ]  # an epoch's order and its first step's views are different streams
    streams = {tuple(torch.rand(4, generator=generator(*key)).tolist()): key for key in keys}
    assert len(streams) == len(keys), f"only these keys have streams of their own: {list(streams.values())}"
    assert all(
        tuple(torch.rand(4, generator=generator(*key)).tolist()) == stream for stream, key in streams.items()
    )


def numbered_loader(n=46, batch_size=5, seed=5, task=1):
    """A loader of flat images whose colour is their number, with views that leave it: odd numbers below n are
    the task."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    view = ViewConfig(8, jitter_p=0, grey_p=0, flip_p=0)
    return Loader(images, torch.arange(1, n, 2), batch_size, [view, view], (0.0,) * 3, (1.0,) * 3, seed, task)


def numbers(batches):
    """The numbers of the images in each batch; both views must agree on them."""
    first, second = (
        torch.stack([(v[:, 0, 0, 0] * 255).round().long() for v in views]) for views in zip(*batches)
    )
    assert torch.equal(first, second)
    return first


def test_order_is_a_permutation_of_the_task():
    seen = numbers(numbered_loader(n=40).epoch(0))
    assert seen.shape == (4, 5)
    assert sorted(seen.flatten().tolist()) == list(range(1, 40, 2))
    assert seen.flatten().tolist() != list(range(1, 40, 2))


def test_order_differs_by_epoch_seed_and_task():
    orders = [numbers(numbered_loader().epoch(e)) for e in (0, 1)]
    orders += [numbers(numbered_loader(seed=6).epoch(0)), numbers(numbered_loader(task=2).epoch(0))]
    assert len({tuple(order.flatten().tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], numbers(numbered_loader().epoch(0)))


def test_last_incomplete_batch_is_dropped():
    loader = numbered_loader(n=46)  # 23 images
    seen = numbers(loader.epoch(0))
    assert loader.steps == 4 and seen.shape == (4, 5) and len(seen.unique()) == 20
    assert (
        len(torch.cat([numbers(loader.epoch(e)) for e in range(10)]).unique()) == 23
    )  # others are dropped each time


def test_task_smaller_than_a_batch_is_an_error():
    with pytest.raises(DataError, match=r"task 1 has 4 .* --batch_size 5"):
        numbered_loader(n=8)
    assert numbered_loader(n=10).steps == 1


def noise_loader(images, batch_size, rank=0, world=1, seed=5, task=0):
    views = [BUSY, replace(BUSY, min_scale=0.3, solarize_p=0.1)]
    return Loader(images, torch.arange(len(images)), batch_size, views, MEAN, STD, seed, task, rank, world)


def test_first_step_resumes_the_epoch():
    loader = noise_loader(noise(40, 16, 16), 8)
    whole, resumed = list(loader.epoch(3)), list(loader.epoch(3, first_step=2))
    assert len(whole) == 5 and len(resumed) == 3
    for expected, got in zip(whole[2:], resumed):
        assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])


def test_views_differ_from_each_other_and_by_seed_task_epoch_and_step():
    images = noise(8, 16, 16)
    moments = [(5, 0, 0, 0), (5, 0, 0, 1), (5, 0, 1, 0), (5, 1, 0, 0), (6, 0, 0, 0)]
    views = []
    for seed, task, epoch, step in moments:
        loader = noise_loader(images, 8, seed=seed, task=task)
        loader.views = [BUSY, BUSY]
        views += loader.augment([images, images], epoch, step, images.shape[-2:])
    for a, b in itertools.combinations(views, 2):
        assert not any(torch.equal(*pair) for pair in zip(a, b))


@pytest.mark.parametrize("batch_size, world", [(8, 2), (8, 8), (160, 2)])
def test_ranks_together_see_what_one_process_sees(batch_size, world):
    """Bit for bit: a view does not depend on its neighbours, nor on how the CPU cuts a share into chunks."""
    images = noise(2 * batch_size, 16, 16)
    whole = list(noise_loader(images, batch_size).epoch(1))
    shares = [list(noise_loader(images, batch_size, rank, world).epoch(1)) for rank in range(world)]
    for step in range(2):
        for view in range(2):
            parts = [share[step][view] for share in shares]
            assert all(len(part) == batch_size // world for part in parts)
            assert torch.equal(torch.cat(parts), whole[step][view])
