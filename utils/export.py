"""Writes a network of a run for others: a state_dict under torchvision's names, which timm's are too, and a
card.

example:
    python -m utils.export runs/cifar100-class5-moco-pnr-seed5 --task 4 --out moco_pnr.pt

FILE.safetensors is written by safetensors, where that is installed. FILE.json says how the network was made,
how images are prepared for it, what its numbers are, and how stock torchvision and timm load it.
"""

import json
import sys
from pathlib import Path

from utils.arguments import Parser

TORCHVISION = "import torch, torchvision; model = torchvision.models.{}(); model.fc = torch.nn.Identity()"
TIMM = "import torch, timm; model = timm.create_model('{}', num_classes=0)"
CIFAR_STEM = (
    "model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=2, bias=False), torch.nn.Identity()"
)
LOADING = {".pt": "model.load_state_dict(torch.load('{}'))"}
LOADING[".safetensors"] = "import safetensors.torch; safetensors.torch.load_model(model, '{}')"


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder of main_cssl.py")
    parser.add_argument("--task", type=int, help="the network after this task, from 0 (default: the last)")
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="a file that ends in .pt or .safetensors"
    )
    args = parser.parse_args(argv)
    parser.check_folder_of("out", args.out)
    return args


def main(args):
    from utils import UserError, checkpoint
    from utils.run import read_config, write_json

    config, path = read_config(args.run), Path(args.out)
    task = config["num_tasks"] - 1 if args.task is None else args.task
    if path.exists():
        raise UserError(f"--out {path} is there already: choose another name")
    if path.suffix not in LOADING:
        raise UserError(f"--out {path}: choose a name that ends in {' or '.join(LOADING)}")
    network = checkpoint.read_network(Path(args.run) / f"task{task}.pt")
    config, state = network["config"], {k: v.contiguous() for k, v in network["backbone"].items()}
    content = card(args.run, config, task, network["tasks"], path)
    if path.suffix == ".pt":
        checkpoint.save(path, state)
    else:
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise UserError(
                "--out: .safetensors needs the package safetensors: install it, or use .pt"
            ) from error
        save_file(state, path)
    write_json(path.with_suffix(path.suffix + ".json"), content)
    print(f"{path}: {config['backbone']} after task {task} of {args.run}; see {path}.json")


def card(run, config, task, names, path):
    """What a reader of the file has to know, as a dict."""

    def names_of(keys):
        return {key: config.get(key) for key in keys.split()}

    mean, std = config.get("normalize", (None, None))
    results_path = Path(run) / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    blocks = [
        b for b in (results, *results.values()) if isinstance(b, dict) and len(b.get("matrix", ())) > task
    ]
    model, stem = config["backbone"], [CIFAR_STEM] * (config["stem"] == "cifar")
    load = LOADING[path.suffix].format(path.name)
    stock = config["width"] == 64 and model != "resnet10"
    lines = {
        "torchvision": [TORCHVISION.format(model), *stem, load],
        "timm": [TIMM.format(model), *stem, load],
    }
    return {
        "architecture": names_of("backbone width stem"),
        "training": names_of(
            "method regularizer dataset scenario num_tasks seed epochs batch_size lr optimizer single_tasks"
        ),
        "task": task,
        "tasks": names[: task + 1],
        "preprocessing": {
            "image_size": config["image_size"],
            "mean": mean,
            "std": std,
            "range": "0 to 1, RGB",
        },
        "accuracy": [{"protocol": b["protocol"], "row": b["matrix"][task]} for b in blocks],
        "load": lines
        if stock
        else "models.resnet.build_backbone(backbone, width, stem).load_state_dict(...)",
    }


if __name__ == "__main__":
    arguments = parse_arguments()
    from utils.distributed import report_errors

    sys.exit(report_errors(lambda: main(arguments), "export"))
