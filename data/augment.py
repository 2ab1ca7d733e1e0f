"""The two views of a batch, made for the whole batch at once, on the device that holds the images.

`draw` turns a torch.Generator into per-sample parameters on the CPU (so that a GPU sees the same views as a
CPU, and nothing has to be read back from the device); `make_view` applies them. The operations follow
torchvision's, with these choices:

* The crop is resized with PIL's antialiased bicubic filter. Crop, resize and flip are one linear map for each
  axis, so a view is two batched matrix products, and the result is clamped to [0, 1] once.
* The order of the four colour-jitter operations is drawn once per view and step, not once per sample.
* Blur uses 13 taps (three standard deviations at the largest sigma), fewer in tiny images; borders reflect.
"""

from dataclasses import dataclass, replace

import torch

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")
BLUR_SIGMA = (0.1, 2.0)
BLUR_RADIUS = 6
CROP_TRIES = 10  # as torchvision's RandomResizedCrop: after that many misfits, the largest centred crop
CHUNK_PIXELS = 2**16  # worked on together on the CPU, so that they stay in its cache


@dataclass(frozen=True)
class ViewConfig:
    """How one of the two views is drawn; the strengths are those of torchvision's ColorJitter."""

    size: int
    min_scale: float = 0.08
    blur_p: float = 0.0
    solarize_p: float = 0.0
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey_p: float = 0.2
    flip_p: float = 0.5


@dataclass
class ViewParams:
    """Per-sample parameters of one view, [N] each, drawn on the CPU and then moved; a sample without an
    operation holds its neutral value."""

    top: torch.Tensor | None  # crop box, pixels; None where the images are crops already
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    flip: torch.Tensor  # bool
    jitter: torch.Tensor  # bool
    brightness: torch.Tensor  # factors, neutral 1
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor  # shift in turns, neutral 0
    grey: torch.Tensor  # bool
    blur: torch.Tensor  # bool
    sigma: torch.Tensor  # pixels
    solarize: torch.Tensor  # bool
    jitter_order: tuple  # names, one order for the whole batch

    def __getitem__(self, part):
        """The same parameters for a slice of the batch (a rank's share of the global draw)."""
        return ViewParams(**{k: v[part] if torch.is_tensor(v) else v for k, v in vars(self).items()})

    def to(self, device):
        """The same on the device, in one copy that the host does not wait for. A mask that no sample drew
        stays on the CPU, where this is known."""
        tensors = {k: v for k, v in vars(self).items() if torch.is_tensor(v)}
        tensors = {k: v for k, v in tensors.items() if v.dtype != torch.bool or v.any()}
        rows = torch.stack([v.float() for v in tensors.values()])
        rows = (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)
        return replace(self, **{k: row.to(v.dtype) for (k, v), row in zip(tensors.items(), rows)})


def draw(config, count, height, width, generator):
    """Parameters for one view of `count` images of height x width pixels, from a CPU generator; without boxes
    where height is None, for images that are crops already."""
    u = torch.rand(10, count, generator=generator)
    box = (None,) * 4 if height is None else draw_boxes(count, height, width, config.min_scale, generator)
    jitter = u[0] < config.jitter_p

    def factor(row, strength, neutral=1.0):
        return torch.where(jitter, neutral + strength * (2 * u[row] - 1), neutral)

    strengths = config.brightness, config.contrast, config.saturation
    factors = [factor(row, strength) for row, strength in enumerate(strengths, 2)]
    grey, blur, solarize = u[6] < config.grey_p, u[7] < config.blur_p, u[9] < config.solarize_p
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[8]
    order = tuple(JITTER_OPS[i] for i in torch.randperm(4, generator=generator))
    colour = *factors, factor(5, config.hue, 0.0), grey, blur, sigma, solarize, order
    return ViewParams(*box, u[1] < config.flip_p, jitter, *colour)


def draw_boxes(count, height, width, min_scale, generator):
    """Boxes of `count` images that are all height x width pixels; see `boxes`."""
    u = torch.rand(4, count, CROP_TRIES, generator=generator)
    return boxes(u, torch.full((count,), height), torch.full((count,), width), min_scale)


def boxes(u, height, width, min_scale):
    """Boxes of torchvision's RandomResizedCrop (scale min_scale-1, ratio 3/4-4/3): top, left, height, width,
    [N] each. u: uniform random numbers [4, N, CROP_TRIES]; height, width: [N], pixels."""
    height, width = height.float(), width.float()
    area = (height * width).unsqueeze(1) * (min_scale + (1 - min_scale) * u[0])
    ratio = torch.exp((2 * u[1] - 1) * torch.log(torch.tensor(4 / 3)))
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= width.unsqueeze(1)) & (h > 0) & (h <= height.unsqueeze(1))
    found, first = fits.any(dim=1), fits.int().argmax(dim=1, keepdim=True)  # the first try that fits
    w, h, u_top, u_left = (x.gather(1, first)[:, 0] for x in (w, h, u[2], u[3]))
    # where none fits, the largest centred box with a ratio in 3/4-4/3
    full_h = torch.where(width / height < 3 / 4, (width.double() / (3 / 4)).round().float(), height)
    full_w = torch.where(width / height > 4 / 3, (height.double() * (4 / 3)).round().float(), width)
    w, h = torch.where(found, w, full_w), torch.where(found, h, full_h)
    top = torch.where(found, (u_top * (height - h + 1)).floor(), (height - h).div(2, rounding_mode="floor"))
    left = torch.where(found, (u_left * (width - w + 1)).floor(), (width - w).div(2, rounding_mode="floor"))
    return top, left, h, w


def make_view(images, params, config, mean, std):
    """One normalised view of every image. images: uint8 [N, 3, H, W] on any device, or crops [N, 3, size,
    size]; params: ViewParams of the same N, without boxes for crops; mean, std: three floats each. Returns
    float32 [N, 3, size, size], channels_last."""
    device, size = images.device, config.size
    params = params if device.type == "cpu" else params.to(device)
    view = torch.empty(len(images), 3, size, size, device=device, memory_format=torch.channels_last)
    chunk = min(64, max(4, CHUNK_PIXELS // size**2)) if device.type == "cpu" else max(len(images), 1)
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        crops = (images[part], params[part])
        x = flip_crops(*crops) if params.top is None else crop_resize(*crops, size)
        view[part] = normalize(distort(x, params[part]), mean, std)
    return view


def normalize(x, mean, std):
    """In place, per channel. x: float [N, 3, H, W] in [0, 1]; mean, std: three floats each."""
    for channel, (m, s) in enumerate(zip(mean, std)):
        x[:, channel].sub_(m).mul_(1 / s)
    return x


def flip_crops(images, params):
    """uint8 [N, 3, S, S] -> float [N, 3, S, S] in [0, 1], mirrored where drawn."""
    x = images.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    return on_samples(x, params.flip, lambda part, _: part.flip(3))


def crop_resize(images, params, size):
    """Crop, antialiased bicubic resize and flip: uint8 [N, 3, H, W] -> float [N, 3, size, size] in [0, 1]."""
    device, (n, c, height, width) = images.device, images.shape
    rows = resize_weights(params.top, params.height, height, size, device)
    columns = resize_weights(params.left, params.width, width, size, device, params.flip)
    x = images.float().view(n, c * height, width) @ columns.transpose(1, 2)  # N x CH x size
    x = rows.unsqueeze(1) @ x.view(n, c, height, size)
    return x.mul_(1 / 255).clamp_(0, 1)


def resize_weights(start, length, in_size, out_size, device, flip=None):
    """Weights [N, out_size, in_size] that cut [start, start + length) from an axis and resize it to out_size.
    PIL's antialiased bicubic (a = -0.5): the filter widens with the scale and is renormalised at the box's
    borders."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / out_size
    out = (torch.arange(out_size, device=device) + 0.5).view(1, out_size, 1)
    if flip is not None:
        out = torch.where(flip.to(device, non_blocking=True).view(-1, 1, 1), out_size - out, out)
    position = torch.arange(in_size, device=device) + 0.5 - start  # N x 1 x in, from the box's edge
    t = (position - out * scale).div_(scale.clamp(min=1)).abs_()
    u = (2 - t).clamp_(min=0)
    v = (1 - t).clamp_(min=0)
    # the cubic kernel as a sum of truncated pieces: u^2 (u - 1) / 2 on |t| < 2 and v^2 (1 - 2 v) on |t| < 1
    weights = (u * u).mul_((u - 1).mul_(0.5)).add_((v * v).mul_(1 - 2 * v))
    weights *= (position > 0) & (position < length)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def distort(x, params):
    """Colour jitter, grey, blur, solarise, on the samples that drew them. x: float [N, 3, S, S] in [0, 1],
    which may be overwritten."""
    ops = {"brightness": brightness_, "contrast": contrast_, "saturation": saturation_, "hue": hue_}

    def jitter(part, chosen):
        for name in params.jitter_order:
            part = ops[name](part, getattr(params, name)[chosen].view(-1, 1, 1, 1))
        return part

    x = on_samples(x, params.jitter, jitter)
    x = on_samples(x, params.grey, lambda part, _: grey(part).expand_as(part).contiguous())
    x = on_samples(x, params.blur, lambda part, chosen: blur(part, params.sigma[chosen]))
    return on_samples(x, params.solarize, lambda part, _: torch.where(part >= 0.5, 1 - part, part))


def on_samples(x, mask, function):
    """x with function(part, chosen) in place of x[mask]. The function may overwrite its part; chosen: which
    samples these are, as an index."""
    if mask.device.type != "cpu":
        return on_all(x, mask, function)
    index = mask.nonzero()[:, 0]
    if len(index) == len(x):
        return function(x, mask)
    if len(index):
        x[index] = function(x.index_select(0, index), mask)
    return x


def on_all(x, mask, function):
    """The same without indices, which a GPU would have to be sent."""
    return torch.where(mask.view(-1, 1, 1, 1), function(x.clone(), slice(None)), x)


def grey(x):
    """Luminance [N, 1, H, W] (ITU-R 601-2, as PIL and torchvision)."""
    return (0.2989 * x[:, :1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)


def brightness_(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def contrast_(x, factor):
    """Blends with the mean luminance of each image. factor: [N, 1, 1, 1]."""
    mean = grey(x).mean(dim=(1, 2, 3), keepdim=True)
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation_(x, factor):
    """Blends with each pixel's luminance."""
    luminance = grey(x)
    return x.mul_(factor).add_(luminance.mul_(1 - factor)).clamp_(0, 1)


def hue_(x, shift):
    """Turns the hue of x [N, 3, H, W] by shift [N, 1, 1, 1] turns, as torchvision's adjust_hue, in place."""
    red, green, blue = x.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    inverse = 1 / chroma.clamp(min=1e-8)
    # the hue in sixths of a turn, measured from whichever channel is largest (red before green before blue on
    # ties); lerp with weights 0 and 1 chooses, several times faster than torch.where on a CPU
    hue = (red - green).mul_(inverse).add_(4)
    hue = hue.lerp_((blue - red).mul_(inverse).add_(2), green.clone().eq_(high))
    hue = hue.lerp_((green - blue).mul_(inverse), red.clone().eq_(high)).add_(6 * shift[:, 0])
    hue.sub_((hue / 6).floor_().mul_(6))  # 0 to 6
    # a channel is `high` up to one sixth of a turn away from its own hue, `low` from two sixths on: red lies
    # at 0 and 6
    torch.addcmul(low, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=red)
    torch.addcmul(low, chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), out=green)
    torch.addcmul(low, chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), out=blue)
    return x


def blur(x, sigma):
    """Gaussian blur with a standard deviation of its own for each sample. x: [N, 3, H, W]; sigma: [N],
    pixels."""
    n, c, height, width = x.shape
    radius = min(BLUR_RADIUS, height - 1, width - 1)  # what a reflected border can give
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.view(-1, 1)) ** 2)
    kernel = torch.where(kernel > 1e-12, kernel, 0.0)  # a CPU is slow with denormal numbers
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)  # NC x taps
    x = x.reshape(1, n * c, height, width)
    x = torch.nn.functional.pad(x, (radius,) * 4, mode="reflect")
    x = torch.nn.functional.conv2d(x, kernel.view(n * c, 1, 1, -1), groups=n * c)
    x = torch.nn.functional.conv2d(x, kernel.view(n * c, 1, -1, 1), groups=n * c)
    return x.view(n, c, height, width)
