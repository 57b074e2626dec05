"""A run's encoder as a file that other libraries read, and encoders that start from such a file.

The images of every file are 0 to 1, without a mean taken off or a division by a standard deviation, as in training.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from .checkpoint import load_checkpoint, write_atomically
from .config import TrainConfig
from .errors import TrainError, need
from .models import build_encoder

RESNETS = ("resnet18", "resnet50")
_HEAD = ("fc.weight", "fc.bias")  # of torchvision's ResNets: the classifier, which an encoder has not
_SHOWN = 4  # keys that an error lists of each kind


def export(run: Path | str, file: Path | str) -> dict[str, str]:
    """Write the encoder of a run's last checkpoint in the format that the suffix of ``file`` names.

    - ``.pt``: a state dict, for ``torch.load`` with ``weights_only=True``; a ResNet's keys are torchvision's and
      timm's, whose ``load_state_dict`` with ``strict=False`` misses ``fc.weight`` and ``fc.bias`` only;
    - ``.safetensors``: the same tensors, with the metadata;
    - ``.onnx``: from ``images`` ``(B, C, H, W)`` to ``features`` ``(B, F)``, fp32, in evaluation mode, with the
      metadata; B, H and W are free. Features differ from torch's in the last bits;
    - ``.pkl``: a ResNet for detectron2, see :func:`detectron2_name`.

    Returns:
        The metadata: how the encoder was trained, what it is, what its images are, where it departs from torchvision.

    Raises:
        TrainError: another suffix, no checkpoint, or an encoder that the format has no names for.
        MissingPackage: the format needs a package that is not there.
    """
    file = Path(file)
    if file.suffix not in _WRITERS:
        raise TrainError(f"got {file.name}; expected a name that ends in {', '.join(_WRITERS)}. Choose the format.")
    encoder, about = trained_encoder(run)
    content = _WRITERS[file.suffix](encoder, about)
    write_atomically(file, lambda opened: opened.write(content))
    return about


def trained_encoder(run: Path | str) -> tuple[nn.Module, dict[str, str]]:
    """The encoder of a run's last checkpoint, on the CPU and in evaluation mode, and its metadata.

    Raises:
        TrainError: there is no checkpoint, or it cannot be read.
    """
    state = load_checkpoint(Path(run) / "checkpoint.pt")
    config = TrainConfig(**state["config"])
    prefix = "encoder."
    weights = {name[len(prefix) :]: value for name, value in state["method"].items() if name.startswith(prefix)}
    name = config.encoder or _architecture(weights) or "conv"
    stem = next(value for value in weights.values() if value.ndim == 4)
    with torch.random.fork_rng(devices=[]):
        encoder, features = build_encoder(name, stem.shape[1], config.image_size, config.stem)
    encoder.load_state_dict(weights)
    channels = stem.shape[1]
    about = {
        "method": config.method,
        "data": config.data,
        "steps": str(state["step"]),
        "encoder": name,
        "dim": str(features),
        "channels": str(channels),
        "range": "0 to 1",
        "mean": json.dumps([0.0] * channels),
        "std": json.dumps([1.0] * channels),
        "torchvision": _departure(name, stem),
        "fastcl": __version__,
    }
    return encoder.eval(), about


def start_from(encoder: nn.Module, init: str) -> None:
    """Give ``encoder`` the weights that ``--init`` names: ``torchvision:resnet18`` or a file of :func:`export`.

    Those of torchvision expect images less ImageNet's mean and over its deviation. Here that is left to the first
    BatchNorm, whose statistics training takes anew: they are good to start from, not to use as they are.

    Raises:
        TrainError: the weights cannot be had or read, or do not fit; the message lists what differs.
    """
    library, _, name = init.partition(":")
    weights = _pretrained(name) if library == "torchvision" else read_weights(init)
    load_weights(encoder, weights, f"--init {init}")


def read_weights(file: Path | str) -> dict[str, Tensor]:
    """The tensors of an exported ``.pt`` or ``.safetensors`` file, on the CPU, by their names.

    Raises:
        TrainError: another suffix, or a file that is not there, damaged, or not a state dict.
        MissingPackage: safetensors is not installed.
    """
    file = Path(file)
    if file.suffix not in (".pt", ".pth", ".safetensors"):
        raise TrainError(
            f"got {file}; expected a .pt or .safetensors file. Write one with: fastcl export RUN --to FILE"
        )
    try:
        if file.suffix == ".safetensors":
            weights = need("safetensors.torch", "a .safetensors file").load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except TrainError:
        raise
    except Exception as error:  # both raise almost anything for a damaged file
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"{file} cannot be read ({type(error).__name__}: {reason}). Write it with: fastcl export RUN --to {file}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise TrainError(
            f"got {file}, which is no state dict; expected names and tensors alone. Of a checkpoint, take the run: "
            f"fastcl export RUN --to {file}"
        )
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy ``weights`` into a model that must have all of them; torchvision's classifier is left out.

    Raises:
        TrainError: names or shapes differ; the message lists them.
    """
    given, own = ({k: v for k, v in d.items() if _counts(k)} for d in (weights, model.state_dict()))
    kinds = {
        "missing": [name for name in own if name not in given],
        "unknown": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(value.shape)} in place of {tuple(own[name].shape)}"
            for name, value in given.items()
            if name in own and value.shape != own[name].shape
        ],
    }
    if any(kinds.values()):
        differences = "; ".join(f"{kind}: {_first(names)}" for kind, names in kinds.items() if names)
        raise TrainError(
            f"the weights of {source} do not fit the encoder ({differences}); expected the same names and shapes. "
            "Choose the same --encoder, and data with as many channels as its first convolution has."
        )
    model.load_state_dict({k: v for k, v in weights.items() if k not in _HEAD}, strict=False)


def resnet_name(weights: Mapping[str, Tensor], source: str) -> str:
    """Which ResNet of :data:`RESNETS` has these weights.

    Raises:
        TrainError: none has.
    """
    name = _architecture(weights)
    if name is None:
        raise TrainError(
            f"got {source}, whose tensors are no ResNet's ({_first(list(weights))}); expected one of "
            f"{', '.join(RESNETS)}. Train with --encoder resnet18."
        )
    return name


def detectron2_name(name: str) -> str:
    """The name of a ResNet's tensor in detectron2, as its ``tools/convert-torchvision-to-d2.py`` gives it.

    ``conv1`` and ``bn1`` become ``stem.conv1`` and ``stem.conv1.norm``, ``layer1`` to ``layer4`` ``res2`` to ``res5``,
    ``bn2`` ``conv2.norm``, and ``downsample`` ``shortcut`` with its ``norm``. Its config must say what the file is:
    ``MODEL.RESNETS.DEPTH`` 18 or 50 (18: ``RES2_OUT_CHANNELS`` 64), ``STRIDE_IN_1X1`` False, ``INPUT.FORMAT`` RGB,
    ``MODEL.PIXEL_MEAN`` [0, 0, 0], ``MODEL.PIXEL_STD`` [255, 255, 255].
    """
    renamed = name if name.startswith("layer") else f"stem.{name}"
    renamed = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", renamed)
    renamed = re.sub(r"\bbn(\d)", r"conv\1.norm", renamed)
    return renamed.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _pt(encoder: nn.Module, about: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save(_weights(encoder), buffer)
    return buffer.getvalue()


def _safetensors(encoder: nn.Module, about: Mapping[str, str]) -> bytes:
    content: bytes = need("safetensors.torch", "a .safetensors file").save(_weights(encoder), dict(about))
    return content


def _onnx(encoder: nn.Module, about: Mapping[str, str]) -> bytes:
    for package in ("onnx", "onnxscript"):
        need(package, "an .onnx file")
    free = {0: "batch", 2: "height", 3: "width"}
    program: Any = torch.onnx.export(
        encoder,
        (torch.zeros(2, int(about["channels"]), 64, 64),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=(free,),
    )
    program.model.metadata_props.update(about)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _detectron2(encoder: nn.Module, about: Mapping[str, str]) -> bytes:
    weights = _weights(encoder)
    resnet_name(weights, f"encoder {about['encoder']}")
    model = {detectron2_name(k): v.numpy() for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return pickle.dumps({"model": model, "__author__": f"fastcl {__version__}", "matching_heuristics": True})


_WRITERS: dict[str, Callable[[nn.Module, Mapping[str, str]], bytes]] = {
    ".pt": _pt,
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".pkl": _detectron2,
}


def _weights(encoder: nn.Module) -> dict[str, Tensor]:
    """A plain state dict; contiguous, where training had channels last."""
    return {name: value.contiguous() for name, value in encoder.state_dict().items()}


def _pretrained(name: str) -> dict[str, Tensor]:
    if name not in RESNETS:
        raise TrainError(
            f"got --init torchvision:{name}; expected one of {', '.join(RESNETS)} after torchvision:. Choose one."
        )
    models = need("torchvision.models", f"--init torchvision:{name}", "Install it: pip install torchvision.")
    chosen = models.get_model_weights(name).DEFAULT
    try:
        weights: dict[str, Tensor] = chosen.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"torchvision's weights {chosen.url} cannot be had ({reason}). Where there is no network, put that file "
            f"into {Path(torch.hub.get_dir()) / 'checkpoints'}, or start from a file: --init FILE.pt"
        ) from error
    return weights


def _architecture(weights: Mapping[str, Tensor]) -> str | None:
    """The ResNet of these weights, by their names: 18 has two blocks in layer 3, 50 six of three convolutions."""
    if "conv1.weight" not in weights or "layer4.1.conv2.weight" not in weights:
        return None
    blocks = {name.split(".")[1] for name in weights if name.startswith("layer3.")}
    kinds = {(2, False): "resnet18", (6, True): "resnet50"}
    return kinds.get((len(blocks), "layer1.0.conv3.weight" in weights))


def _departure(name: str, stem: Tensor) -> str:
    """Where an encoder differs from torchvision's model of that name."""
    if name not in RESNETS:
        return "no such model"
    same = tuple(stem.shape) == (64, 3, 7, 7)
    other = "" if same else f"; conv1.weight is {tuple(stem.shape)} in place of (64, 3, 7, 7): replace conv1 first"
    if stem.shape[-1] == 3:  # the stem of CIFAR, which does not pool
        other += ", and maxpool by torch.nn.Identity()"
    return f"{name} without {' and '.join(_HEAD)}{other}"


def _counts(name: str) -> bool:
    """Whether a file must have this tensor: torchvision's older ones have no step counters, which decide nothing."""
    return name not in _HEAD and not name.endswith("num_batches_tracked")


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
