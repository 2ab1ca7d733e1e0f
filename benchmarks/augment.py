"""Views per second of this project's augmentation, of torchvision's per image (PIL) and of Kornia's per
batch, on one CPU core.

    python -m benchmarks.augment --batch_size 256 --size 32 --repeats 20

A repeat makes both views of one batch with the CIFAR-100 settings, random parameters included, from what each
pipeline likes best (uint8 tensors; PIL images) to a normalised float batch. The contenders take turns, so
that a busy machine slows them all alike, and the median repeat counts. Kornia is left out where it is not
installed.
"""

import argparse
import statistics

import torch
import torchvision
from torchvision.transforms.functional import to_pil_image

from benchmarks.plain import PilViews
from benchmarks.step import in_turn
from data.augment import BLUR_RADIUS, BLUR_SIGMA, ViewConfig, draw, make_view
from data.datasets import CIFAR_STATS
from data.loader import generator

try:
    import kornia
except ImportError:
    kornia = None

TAPS = 2 * BLUR_RADIUS + 1


def ours(images, views):
    """This project's pipeline; images: uint8 [N, 3, H, W]."""
    rng = generator(0)
    return lambda: [
        make_view(images, draw(v, len(images), *images.shape[2:], rng), v, *CIFAR_STATS) for v in views
    ]


def per_image(images, views):
    """torchvision's transforms on one PIL image after the other."""
    pictures, transform = [to_pil_image(image) for image in images], PilViews(views, *CIFAR_STATS)
    return lambda: [torch.stack(view) for view in zip(*map(transform, pictures))]


def per_batch(images, views):
    """Kornia's transforms on the whole batch, in its fastest form: it resizes without the antialiasing of the
    other two."""
    K = kornia.augmentation

    def pipeline(v):
        return torch.nn.Sequential(
            K.RandomResizedCrop(
                (v.size, v.size), (v.min_scale, 1.0), resample="BICUBIC", cropping_mode="resample"
            ),
            K.ColorJitter(v.brightness, v.contrast, v.saturation, v.hue, p=v.jitter_p),
            K.RandomGrayscale(p=v.grey_p),
            *([K.RandomGaussianBlur(TAPS, BLUR_SIGMA, p=v.blur_p)] if v.blur_p else []),
            K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=v.solarize_p),
            K.RandomHorizontalFlip(p=v.flip_p),
            K.Normalize(*CIFAR_STATS),
        )

    pipelines = [pipeline(view) for view in views]
    return lambda: [transform(images.float() / 255) for transform in pipelines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=256, help="images; each gives two views")
    parser.add_argument("--size", type=int, default=32, help="pixels of the images and of their views")
    parser.add_argument("--blur_p", type=float, default=0.0, help="of both views; 0 for CIFAR-100")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    views = [ViewConfig(args.size, min_scale=0.08, blur_p=args.blur_p, solarize_p=p) for p in (0.0, 0.2)]
    contenders = {"this project": ours(images, views), "torchvision, PIL": per_image(images, views)}
    if kornia:
        contenders["kornia"] = per_batch(images, views)

    with torch.inference_mode():
        assert all(view.shape == images.shape for run in contenders.values() for view in run())
        times = in_turn(images.device, contenders, args.repeats)
    rate = {name: 2 * args.batch_size / statistics.median(found) for name, found in times.items()}
    print(
        f"batch {args.batch_size}, {args.size}x{args.size}, blur {args.blur_p:g}, median of {args.repeats} "
        "repeats, one core"
    )
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, kornia "
        f"{kornia.__version__ if kornia else '-'}"
    )
    print(f"{'':18}{'views/s':>10}{'ours is':>10}")
    for name, r in rate.items():
        print(f"{name:18}{r:10,.0f}{rate['this project'] / r:9.1f}x")
    if not kornia:
        print("kornia            not installed: pip install kornia")


if __name__ == "__main__":
    main()
