"""Writes a network of a run for others: a state_dict under torchvision's names, which timm's are too, and a
card.

example:
    python -m utils.export runs/cifar100-class5-moco-pnr-seed5 --task 4 --out moco_pnr.pt

FILE.safetensors is written by safetensors, where that is installed. FILE.json says how the network was made,
how images are prepared for it, what its numbers are, and how stock torchvision and timm load it.
"""

import sys
from pathlib import Path

from utils.arguments import Parser

TORCHVISION = "import torch, torchvision; model = torchvision.models.{}(); model.fc = torch.nn.Identity()"
TIMM = "import torch, timm; model = timm.create_model('{}', num_classes=0)"
CIFAR_STEM = "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=2, bias=False)"
CIFAR_STEM += "; model.maxpool = torch.nn.Identity()"
LOADING = {".pt": "model.load_state_dict(torch.load('{}'))"}
LOADING[".safetensors"] = "import safetensors.torch; safetensors.torch.load_model(model, '{}')"


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder of main_cssl.py")
    parser.add_argument("--task", type=int, help="the network after this task, from 0 (default: the last)")
    add = parser.add_argument
    add("--out", metavar="FILE", required=True, help="a file that ends in .pt or .safetensors")
    args = parser.parse_args(argv)
    parser.check_folder_of("out", args.out)
    return args


def main(args):
    from utils import UserError, checkpoint
    from utils.run import read_config, read_results, write_json

    config, path = read_config(args.run), Path(args.out)
    task = config["num_tasks"] - 1 if args.task is None else args.task
    if path.exists():
        raise UserError(f"--out {path} is there already: choose another name")
    if path.suffix not in LOADING:
        raise UserError(f"--out {path}: choose a name that ends in {' or '.join(LOADING)}")
    network = checkpoint.read_network(Path(args.run) / f"task{task}.pt")
    config, state = network["config"], {k: v.contiguous() for k, v in network["backbone"].items()}
    results = read_results(Path(args.run) / "results.json")
    content = card({"": results, **results}, config, task, network["tasks"], path)
    if path.suffix == ".pt":
        checkpoint.save(path, state)
    else:
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise UserError("--out: .safetensors needs the package safetensors, or use .pt") from error
        save_file(state, path)
    write_json(path.with_suffix(path.suffix + ".json"), content)
    print(f"{path}: {config['backbone']} after task {task} of {args.run}; see {path}.json")


def card(results, config, task, names, path):
    """What a reader of the file has to know, as a dict. results: blocks by name."""

    def known(*keys):
        return {key: config.get(key) for key in keys}

    model, mean, std = config["backbone"], *config.get("normalize", (None, None))
    last = [*[CIFAR_STEM] * (config["stem"] == "cifar"), LOADING[path.suffix].format(path.name)]
    lines = {"torchvision": [TORCHVISION.format(model), *last], "timm": [TIMM.format(model), *last]}
    if config["width"] != 64 or model == "resnet10":
        lines = "models.resnet.build_backbone(backbone, width, stem).load_state_dict(...)"
    blocks = {name: block for name, block in results.items() if isinstance(block, dict)}
    blocks = {name: block for name, block in blocks.items() if len(block.get("matrix", ())) > task}
    training = "method regularizer dataset scenario num_tasks seed epochs batch_size lr optimizer"
    training += " single_tasks"
    return {
        "architecture": known("backbone", "width", "stem"),
        "training": known(*training.split()),
        "task": task,
        "tasks": names[: task + 1],
        "preprocessing": {**known("image_size"), "mean": mean, "std": std, "range": "0 to 1, RGB"},
        "accuracy": {k: {"protocol": b["protocol"], "row": b["matrix"][task]} for k, b in blocks.items()},
        "load": lines,
    }


if __name__ == "__main__":
    arguments = parse_arguments()
    from utils.distributed import report_errors

    sys.exit(report_errors(lambda: main(arguments), "export"))
