"""Checkpoints: written whole or not at all, read without unpickling objects, and in the layouts of others."""

import argparse
import os
import re
import sys
import zipfile
from pathlib import Path

import torch

from models import BACKBONES
from utils import UserError

# foreign names and ours, by a prefix that marks the layout; longer prefixes come before those that they
# contain
HEADS = {
    "projector.": "projector.",
    "momentum_projector.": "momentum_encoder.projector.",
    "classifier.": "classifier.",
    "predictor.": "predictor.",
    "queue_ptr": "queue.pointer",
    "queue": "queue.rows",
}
LAYOUTS = {
    "encoder_q.": {
        "encoder_q.fc.": "projector.",
        "encoder_k.fc.": "momentum_encoder.projector.",
        "encoder_q.": "backbone.",
        "encoder_k.": "momentum_encoder.backbone.",
    },
    "encoder.": {"encoder.": "backbone.", "momentum_encoder.": "momentum_encoder.backbone.", **HEADS},
    "backbone.": {"backbone.": "backbone.", "momentum_backbone.": "momentum_encoder.backbone.", **HEADS},
    "": {"": "backbone."},
}
KNOWN = "PNR, CaSSLe, solo-learn, MoCo, Barlow Twins, VICReg, torchvision, timm, lightly"
# of a torch.nn.Sequential of ResNet's children, as lightly has them
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
IS_FOLDER = 0x10  # in a zip file's attributes
LAST, PREVIOUS = "last.pt", "last.prev.pt"


def save(path, state, keep_previous=None):
    """Writes state (tensors, numbers, strings, lists, dicts) to path: temporary file, fsync, rename.
    keep_previous: where the file that path now holds is moved first. Raises UserError, path left as it was,
    if the disk is full or not writable."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous is not None and path.exists():
            os.replace(path, keep_previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the renames survive a power failure
        os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError on top of the OSError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        temporary.unlink(missing_ok=True)
        left = "the one before it is intact" if path.exists() else "nothing was left half-written"
        advice = "free some space and run the same command again"
        raise UserError(f"cannot save {path}: {cause}; {left}; {advice}") from error


def load(path):
    """What `save`, or torch.save, wrote; tensors on the CPU. Raises UserError if it cannot be read, if a bit
    of it has changed, or if it holds objects."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                folders = (entry.filename for entry in archive.infolist() if entry.external_attr & IS_FOLDER)
                if name := archive.testzip() or next(folders, None):  # torch.load looks at neither
                    raise RuntimeError(f"{name} in it has changed")
        # a Namespace of hyper-parameters is the one plain object that Lightning checkpoints commonly carry
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what damage leads to is not known
        words = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        reason = f"it is damaged or no checkpoint ({words})"
        found = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        if isinstance(error, FileNotFoundError):
            reason = "there is none"
        elif "global" in str(error).lower():
            reason = f"it holds a Python object ({found and (found[1] or found[2])}), which is not opened: "
            reason += "if you trust it, keep its tensors: c = torch.load(FILE, weights_only=False); "
            reason += "torch.save(c['state_dict'], NEW), of a model torch.save(c.state_dict(), NEW)"
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error


def states(folder):
    """The states of a run folder to resume from, the newest first."""
    return [Path(folder) / name for name in (LAST, PREVIOUS) if (Path(folder) / name).exists()]


def load_last(folder, warn=True):
    """The newest state of a run folder that can be read, or None in a new one; warn: of those that cannot."""
    for path in states(folder):
        try:
            state = load(path)
            if isinstance(state, dict) and "counters" in state:
                return state
            reason = f"{path} is not the state of a run"
        except UserError as error:
            reason = error
        if warn:
            print(f"warning: {reason}; going back to the one before it", file=sys.stderr)
    if states(folder):
        raise UserError(f"no readable checkpoint in {folder}: remove {LAST} and {PREVIOUS} to start anew")
    return None


def read_network(path):
    """A backbone, and the heads that came with it, of a taskN.pt or any layout that is KNOWN. Returns a dict:
    "backbone" and "heads" (state_dicts, in this project's names), "config" (the arguments of the run that
    wrote it, or None), and "left_out" (what has no place here: the first part of its names)."""
    content = load(path)
    content = content if isinstance(content, dict) else {}
    if all(isinstance(content.get(k), dict) for k in ("backbone", "heads")):
        if not all(x.isfinite().all() for x in content["backbone"].values()):
            raise UserError(f"{path} holds weights that are not finite: its training has diverged")
        config = content.get("config")
        return {**content, "config": config if isinstance(config, dict) else None, "left_out": set()}
    content = next((content[k] for k in ("state_dict", "model") if isinstance(content.get(k), dict)), content)
    tensors = {str(k).removeprefix("module."): v for k, v in content.items() if torch.is_tensor(v)}
    unknown = f"{path} has no known layout ({KNOWN}): it begins with"
    if not tensors:
        raise UserError(f"{unknown} {', '.join(map(str, [*content][:3])) or 'nothing'}")
    renames = next(table for mark, table in LAYOUTS.items() if any(k.startswith(mark) for k in tensors))
    backbone, heads, left_out = {}, {}, set()
    for key, value in tensors.items():
        prefix = next((p for p in renames if key == p or (key.startswith(p) and p[-1:] in (".", ""))), None)
        if prefix is None or key.startswith((f"{prefix}fc.", "fc.")):
            left_out.add(key.split(".")[0])
        elif renames[prefix] == "backbone.":
            first, dot, rest = key.removeprefix(prefix).partition(".")
            backbone[CHILDREN.get(first, first) + dot + rest] = value
        else:
            heads[renames[prefix] + key.removeprefix(prefix)] = value
    if "conv1.weight" not in backbone:
        raise UserError(f"{unknown} {', '.join([*tensors][:3])}")
    return {"backbone": backbone, "heads": heads, "config": None, "left_out": left_out}


def architecture(backbone, path):
    """The flags {"backbone", "width", "stem"} of a backbone's state_dict. Raises UserError where no ResNet
    has such stages."""
    stages = [{key.split(".")[1] for key in backbone if key.startswith(f"layer{n}.")} for n in (1, 2, 3, 4)]
    block = "Bottleneck" if "layer1.0.conv3.weight" in backbone else "BasicBlock"
    layers = (block, tuple(map(len, stages)))
    first = tuple(backbone["conv1.weight"].shape)
    stem = {(3, 3, 3): "cifar", (3, 7, 7): "imagenet"}.get(first[1:])
    for name, known in BACKBONES.items():
        if known == layers and stem is not None:
            return {"backbone": name, "width": first[0], "stem": stem}
    words = f"{block}s {layers[1]} with a first convolution {first}"
    raise UserError(f"{path} holds {words}: no backbone of {', '.join(BACKBONES)}, or no known stem")


def load_strictly(module, state, path, what):
    """module.load_state_dict; raises UserError with the first misfit. what: the flags that built the
    module."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        misfit = str(error).split("\n")[1].strip()
        raise UserError(f"{path} is a checkpoint of another architecture than {what}: {misfit}") from error


def given(path, start_task=None):
    """The networks of the tasks that a file, or a run's folder, gives: task0.pt to that file, or as many as
    there are, or, with start_task, those before it. Raises UserError where one is missing."""
    path = Path(path)
    last = len([*path.glob("task*.pt")]) - 1 if path.is_dir() else read_network(path).get("task", 0)
    count = last + 1 if start_task is None else start_task
    if count == 1 and last == 0 and not path.is_dir():  # whatever its name is
        return [path]
    paths = [(path if path.is_dir() else path.parent) / f"task{task}.pt" for task in range(count)]
    if count == last + 1 and not path.is_dir():
        paths[-1] = path
    if lacking := [x for x in paths or [path / "task0.pt"] if not x.exists()]:
        raise UserError(f"--init_from {path}: to go on at task {count}, {lacking[0]} is missing")
    return paths


def load_method(learner, path, args, tasks, task=0):
    """Puts the network of a task into a learner: all of it from a taskN.pt, from other layouts what the
    method has a place for; heads of another form start anew. args: those that the learner was built of;
    tasks: the names of this run's tasks; raises UserError if a taskN.pt is of others, of another task, method
    or regulariser. Where a checkpoint has no momentum encoder, that starts as a copy of the student; a
    predictor, or a queue of the same size, that it does not have stays random. Raises UserError if it has no
    classifier for the learner's online probe. Returns a line that says what became of what, and whether the
    task is done: it is not where the file has no projector."""
    method, online = learner.method, learner.online
    network, flags = read_network(path), ("method", "backbone", "width", "stem")
    what = " ".join(f"--{name} {getattr(args, name)}" for name in flags)
    state = {f"backbone.{k}": v for k, v in network["backbone"].items()} | network["heads"]
    classifier = {k: state.pop(k) for k in list(state) if k.startswith("classifier.")}
    classifier = network["online"] if isinstance(network.get("online"), dict) else classifier
    found = architecture(network["backbone"], path) if network["config"] is None else {}
    if any(getattr(args, name) != value for name, value in found.items()):
        advice = "pass " + " ".join(f"--{name} {value}" for name, value in found.items())
        raise UserError(f"{path} is a checkpoint of another architecture than {what}: {advice}")
    pretrained = network["config"] is None and projector(state) != projector(method.state_dict())
    if online is not None and not classifier and not pretrained:
        advice = "train the first task with --online_probe, too, or pass --online_probe off"
        raise UserError(f"--online_probe: {path} holds no classifier that could go on: {advice}")
    if network.get("task", 0) != task or network.get("tasks", tasks)[: task + 1] != tasks[: task + 1]:
        raise UserError(f"{path} is no network of this run's task {task}: other data, classes, or tasks")
    theirs, flags = network["config"] or {}, ["method"]
    flags += ["regularizer", "seed", "image_size", "single_tasks"] if task else []
    for name in (name for name in flags if name in theirs and theirs[name] != getattr(args, name)):
        raise UserError(f"{path} is of a run with --{name} {theirs[name]}: go on with that")
    fresh, left_out = fit(state, method.state_dict()) if network["config"] is None else (set(), set())
    left_out |= network["left_out"] | ({"classifier"} if classifier and online is None else set())
    load_strictly(method, state, path, what)
    if online is not None and classifier:
        load_strictly(online, classifier, path, "this run's --online_probe, one classifier of all classes")
        state |= classifier
    own = learner.regularizer.state_dict()
    kept = {name: value for name, value in network.get("regularizer", {}).items() if name in own}
    load_strictly(learner.regularizer, own | kept, path, f"--regularizer {args.regularizer}")
    taken = {key.split(".")[0] for key in state} - fresh
    if "momentum_encoder" in fresh:
        fresh = fresh - {"momentum_encoder"} | {"momentum_encoder (a copy of the student)"}
    fresh |= {"classifier"} if online is not None and not classifier else set()
    first = f"task {task}{' to be trained' * pretrained} from {path}"
    notes = ((first, taken), ("started anew", fresh), ("left out", left_out))
    words = "; ".join(f"{words}: {', '.join(sorted(names))}" for words, names in notes if names)
    return words, not pretrained


def projector(state):
    """The names of its tensors."""
    return {key for key in state if key.startswith("projector.")}


def fit(state, own):
    """Makes another project's state one for a method whose own is given, in place: a queue of the same size
    is turned ([2, D, K] there), what has no place is dropped, what is missing is filled in; but for the
    backbone, and a projector of the same layers, which have to fit. Returns the names of what was filled in,
    and of what was dropped."""
    rows, pointer = state.pop("queue.rows", None), state.pop("queue.pointer", None)
    dropped, needed = set() if rows is None and pointer is None else {"queue"}, ("backbone.", "projector.")
    if projector(state) != projector(own):
        needed = ("backbone.",)
        for key in [key for key in state if key.startswith(("projector.", "momentum_encoder."))]:
            del state[key]
            dropped.add(key.split(".")[0])
    if rows is not None and rows.dim() == 3 and pointer is not None and pointer.numel() == 1:
        rows = rows.transpose(1, 2).contiguous()
        if "queue.rows" in own and own["queue.rows"].shape == rows.shape:
            state["queue.rows"], state["queue.pointer"], dropped = rows, pointer.reshape(()), set()
    for key in [key for key in state if key not in own and not key.startswith(needed)]:
        del state[key]
        dropped.add(key.split(".")[0])
    fresh = [key for key in own if key not in state and not key.startswith(needed)]
    for key in fresh:
        state[key] = state.get(key.removeprefix("momentum_encoder."), own[key])
    return {key.split(".")[0] for key in fresh}, dropped
