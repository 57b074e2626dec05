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
from .checkpoint import CHECKPOINT, load_checkpoint, restore, write_atomically
from .config import TrainConfig
from .encoders import (
    GIVEN,
    TIMM,
    known_to_timm,
    known_to_torchvision,
    timm_options,
    torchvision_model,
    torchvision_options,
)
from .errors import TrainError, need
from .models import encoder_name, run_encoder

# By the blocks of layer 3, and whether a block has three convolutions.
_RESNETS = {
    (2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101",
    (36, True): "resnet152",
}  # fmt: skip
RESNETS = tuple(_RESNETS.values())
_SHOWN = 4  # keys that an error lists of each kind


def export(run: Path | str, file: Path | str, *, encoder: nn.Module | None = None) -> dict[str, str]:
    """Write the encoder of a run's last checkpoint in the format that the suffix of ``file`` names.

    - ``.pt``: a state dict, for ``torch.load`` with ``weights_only=True``; the keys are those of the library that has
      the network: torchvision's ``load_state_dict`` with ``strict=False`` misses the classifier only, for a ResNet
      ``fc.weight`` and ``fc.bias``, as timm's does;
    - ``.safetensors``: the same tensors, with the metadata;
    - ``.onnx``: from ``images`` ``(B, C, H, W)`` to ``features`` ``(B, F)``, fp32, in evaluation mode, with the
      metadata; B is free, and H and W are where the network takes any. Features differ from torch's in the last bits;
    - ``.pkl``: a ResNet for detectron2, see :func:`detectron2_name`.

    Args:
        encoder: as :func:`~.loop.train` had it, of a run whose encoder was given.

    Returns:
        The metadata: how the encoder was trained, what it is, what its images are, where it departs from torchvision.

    Raises:
        TrainError: another suffix, no checkpoint, or an encoder that the format has no names for or cannot express.
        MissingPackage: the format needs a package that is not there.
    """
    file = Path(file)
    if file.suffix not in _WRITERS:
        raise TrainError(f"got {file.name}; expected a name that ends in {', '.join(_WRITERS)}. Choose the format.")
    trained, about = trained_encoder(run, encoder=encoder)
    content = _WRITERS[file.suffix](trained, about)
    write_atomically(file, lambda opened: opened.write(content))
    return about


def trained_encoder(run: Path | str, *, encoder: nn.Module | None = None) -> tuple[nn.Module, dict[str, str]]:
    """The encoder of a run's last checkpoint, on the CPU and in evaluation mode, and its metadata.

    Args:
        encoder: see :func:`export`.

    Raises:
        TrainError: there is no checkpoint, it cannot be read, or its weights do not fit the encoder.
    """
    file = Path(run) / CHECKPOINT
    state = load_checkpoint(file)
    config = TrainConfig(**state["config"])
    prefix = "encoder."
    weights = {name[len(prefix) :]: value for name, value in state["method"].items() if name.startswith(prefix)}
    channels, height, width = state["images"]
    with torch.random.fork_rng(devices=[]):
        trained, features = run_encoder(config, state["images"], encoder)
        restore(trained, weights, file)
        name = encoder_name(config.encoder, (height, width))
        about = {
            "method": config.method,
            "data": config.data,
            "steps": str(state["step"]),
            "encoder": name,
            "dim": str(features),
            "channels": str(channels),
            "size": f"{height} x {width}",
            "range": "0 to 1",
            "mean": json.dumps([0.0] * channels),
            "std": json.dumps([1.0] * channels),
            **_origin(name, trained, channels, (height, width)),
            "fastcl": __version__,
        }
    return trained.eval(), about


def start_from(encoder: nn.Module, init: str) -> None:
    """Give ``encoder`` the weights that ``--init`` names: ``torchvision:NAME``, ``timm:NAME`` or a file of
    :func:`export`.

    Those of the libraries expect images less ImageNet's mean and over its deviation. Here that is left to the first
    BatchNorm, whose statistics training takes anew: they are good to start from, not to use as they are.

    Raises:
        TrainError: the weights cannot be had or read, or do not fit; the message lists what differs.
    """
    pretrained = {"torchvision": _from_torchvision, "timm": _from_timm}.get(init.partition(":")[0])
    with torch.random.fork_rng(devices=[]):  # what follows has the random numbers that it has without --init
        weights = pretrained(init) if pretrained else read_weights(init)
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
    """Copy ``weights`` into a model that must have all of them; a classifier, where it has an Identity, is left out.

    Raises:
        TrainError: names or shapes differ; the message lists them.
    """
    gone = {name for name, module in model.named_modules() if isinstance(module, nn.Identity)}
    weights = {name: value for name, value in weights.items() if name.rpartition(".")[0] not in gone}
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
            "Choose the same --encoder, and data with as many channels as its first convolution has; a ViT's positions "
            "also want the same size of images."
        )
    model.load_state_dict(weights, strict=False)


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
    ``MODEL.RESNETS.DEPTH`` as it is (18, 34: ``RES2_OUT_CHANNELS`` 64), ``STRIDE_IN_1X1`` False, ``INPUT.FORMAT`` RGB,
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
    channels, size = int(about["channels"]), [int(side) for side in about["size"].split(" x ")]
    try:
        program = _any_size(encoder, channels, size) or _program(encoder, torch.zeros(2, channels, *size), "batch")
    except Exception as error:  # the exporter has many ways to fail, and a module to be what it does not take
        raise TrainError(
            f"the encoder {about['encoder']} cannot be written as .onnx ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); expected one that torch.onnx.export takes. Choose .pt."
        ) from error
    program.model.metadata_props.update(about)
    content: bytes = program.model_proto.SerializeToString()
    return content


@torch.no_grad()
def _any_size(encoder: nn.Module, channels: int, size: list[int]) -> Any | None:
    """The program with H and W free, or None where the network, or what it decides by their size, does not allow it.

    A decision of Python is made once, for the image that the exporter sees: the windows of a Swin are not shifted at
    any size where they are not at that one. So the program is run for another size too, before it is believed.
    """
    height, width = (max(64, side) for side in size)  # none so small that a later layer has one pixel
    other = torch.linspace(0, 1, channels * 2 * height * width).view(1, channels, 2 * height, width)
    try:
        expected = encoder(other)
    except Exception:  # positions may be for one size
        return None
    program = _program(encoder, torch.zeros(2, channels, height, width), "batch", "height", "width")
    try:
        found = program.exported_program.module()(other)
    except Exception:  # the guards of that decision
        return None
    return program if torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())) else None


def _program(encoder: nn.Module, images: Tensor, *free: str) -> Any:
    return torch.onnx.export(
        encoder,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=(dict(zip((0, 2, 3), free, strict=False)),),
    )


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


def _from_torchvision(init: str) -> dict[str, Tensor]:
    name = known_to_torchvision(init)
    models = need("torchvision.models", f"--init {init}", "Install it: pip install torchvision.")
    chosen = models.get_model_weights(name).DEFAULT
    try:
        weights: dict[str, Tensor] = models.get_model(name, weights=chosen, progress=False).state_dict()
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"torchvision's weights {chosen.url} cannot be had ({reason}). Where there is no network, put that file "
            f"into {Path(torch.hub.get_dir()) / 'checkpoints'}, or start from a file: --init FILE.pt"
        ) from error
    return {key: value for key, value in weights.items() if not key.startswith("AuxLogits.")}  # of Inception


def _from_timm(init: str) -> dict[str, Tensor]:
    timm, name = known_to_timm(init)
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the network, of the hub, of a name that has no weights
        reason = str(error).partition("\n")[0]
        raise TrainError(
            f"the weights of {init} cannot be had ({type(error).__name__}: {reason}). Where there is no network, start "
            "from a file: --init FILE.safetensors"
        ) from error
    return weights


def _architecture(weights: Mapping[str, Tensor]) -> str | None:
    """The ResNet of these weights, by their names; ResNeXt and wide ones have other widths."""
    first = weights.get("layer1.0.conv2.weight")
    if first is None or tuple(first.shape) != (64, 64, 3, 3) or "conv1.weight" not in weights:
        return None
    blocks = {name.split(".")[1] for name in weights if name.startswith("layer3.")}
    return _RESNETS.get((len(blocks), "layer1.0.conv3.weight" in weights))


def _origin(name: str, encoder: nn.Module, channels: int, size: tuple[int, int]) -> dict[str, str]:
    """What builds the network in the library that it is of, and where it departs from that."""
    if name.startswith(TIMM):
        return {"timm": f"create_model({_call(name.removeprefix(TIMM), timm_options(name, channels, size))})"}
    if name in ("conv", GIVEN):
        return {"torchvision": "no such model"}
    name, options = known_to_torchvision(name), torchvision_options(name, size)
    plain, own = torchvision_model(name, channels, size).state_dict(), encoder.state_dict()
    about = f"{name}({_call(None, options)})" if options else name
    about += f" without {' and '.join(key for key in plain if key not in own)}"
    for key, value in own.items():
        if value.shape != plain[key].shape:
            about += f"; {key} is {tuple(value.shape)} in place of {tuple(plain[key].shape)}: replace "
            about += f"{key.rpartition('.')[0]} first"
    if isinstance(getattr(encoder, "maxpool", None), nn.Identity):  # the stem of CIFAR
        about += ", and maxpool by torch.nn.Identity()"
    return {"torchvision": about}


def _call(first: str | None, options: Mapping[str, Any]) -> str:
    return ", ".join([repr(first)] * (first is not None) + [f"{key}={value!r}" for key, value in options.items()])


def _counts(name: str) -> bool:
    """Whether a file must have this tensor: torchvision's older ones have no step counters, which decide nothing."""
    return not name.endswith("num_batches_tracked")


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
