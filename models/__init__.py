"""Networks: backbones, heads, the queue, frozen copies, and what makes several ranks compute as one."""

# name: torchvision's block, and how many of them each stage has
BACKBONES = {
    "resnet10": ("BasicBlock", (1, 1, 1, 1)),
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
}
STEMS = ("cifar", "imagenet")


def add_network_arguments(parser):
    """The flags that say what the backbone is and where it runs; returns the group's add_argument."""
    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=BACKBONES, default="resnet18")
    add("--width", type=int, default=64, help="base channels, from 8; 16 teaches and tests quickly")
    add("--stem", choices=("auto", *STEMS), default="auto", help="first layers; auto: cifar up to 64 pixels")
    add("--image_size", type=int, help="side of the views (default: the images'; 224 if they differ in size)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    text = "autocast type (default: bf16 on CUDA, where GPUs before Ampere are faster in fp16; fp32 on CPU: "
    text += "there bf16 pays with AMX, and may be slower without); losses: --loss_precision"
    add("--precision", choices=("fp32", "bf16", "fp16"), help=text)
    return add


def resolve_network(args, side, device):
    """Settles what these flags leave open. side: of the images, in pixels; device: that training has."""
    args.image_size = args.image_size or side
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    if args.stem == "auto":
        args.stem = "cifar" if args.image_size <= 64 else "imagenet"
