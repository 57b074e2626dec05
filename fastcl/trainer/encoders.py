"""Encoders ``(B, C, H, W) -> (B, F)`` from elsewhere: networks of torchvision and timm, and modules of the caller."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TrainError, need

GIVEN = "given"  # the name of an encoder that the caller brings
TIMM = "timm:"
_CLASSES = 1000  # of a network as torchvision builds it, with its classifier


def library_encoder(name: str, channels: int, size: tuple[int, int], stem: str = "imagenet") -> nn.Module:
    """A network of torchvision (``resnet18``, ``torchvision:resnet18``) or timm (``timm:resnet18``) without classifier.

    Its features are what the last layer of the classifier saw. For other than 3 channels the first convolution is a new
    one; a network whose positions have one size (ViT) is built for that of the images.

    Args:
        size: height and width of the images.
        stem: ``"cifar"`` for the small images of torchvision's ResNets, see :func:`~.models.build_encoder`.

    Raises:
        TrainError: there is no such network, it cannot be built for such images, or it has no such stem.
        MissingPackage: its library is not there.
    """
    if name.startswith(TIMM):
        refuse_stem(name, stem)
        return _timm(name, channels, size)
    model: Any = torchvision_model(name, channels, size)
    if stem == "cifar":
        if not isinstance(model, need("torchvision.models", f"--encoder {name}").ResNet):
            refuse_stem(name, stem)
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        path, old = _first_convolution(model)
        same = (old.out_channels, old.kernel_size, old.stride, old.padding)
        model.set_submodule(path, nn.Conv2d(channels, *same, bias=old.bias is not None))
    model.set_submodule(classifier(model), nn.Identity())
    encoder: nn.Module = model
    return encoder


def torchvision_model(name: str, channels: int, size: tuple[int, int]) -> nn.Module:
    """A classification network of torchvision as it is, with random weights and its classifier of 1,000 classes.

    Args:
        channels: of the images, for the error.

    Raises:
        TrainError, MissingPackage: see :func:`library_encoder`.
    """
    models = need(
        "torchvision.models", f"--encoder {name}", "Install it: pip install torchvision, or use --encoder conv."
    )
    name = known_to_torchvision(name)
    with _taken(name, (channels, *size)):
        model: nn.Module = models.get_model(name, weights=None, **torchvision_options(name, size))
    return model


def torchvision_options(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """What torchvision's builder of a network must be told for images of this size: no auxiliary classifiers, too."""
    name = name.removeprefix("torchvision:")
    if name.startswith("vit_"):
        return {"image_size": size[0]}
    if name.startswith("maxvit_"):
        return {"input_size": size}
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def known_to_torchvision(name: str) -> str:
    """The name without ``torchvision:``.

    Raises:
        TrainError: torchvision has no classification network of that name.
    """
    models = need("torchvision.models", name, "Install it: pip install torchvision.")
    plain, names = name.removeprefix("torchvision:"), models.list_models(module=models)
    if plain not in names:
        raise TrainError(
            f"got encoder {name!r}; expected conv, a classification network of torchvision, timm:NAME, or in Python "
            f"{GIVEN}. {_near(plain, names)}"
        )
    return plain


def known_to_timm(name: str) -> tuple[Any, str]:
    """timm, and the name without ``timm:``.

    Raises:
        TrainError: timm has no network of that name.
        MissingPackage: timm is not there.
    """
    timm, plain = need("timm", name, "Install it: pip install timm."), name.removeprefix(TIMM)
    if not timm.is_model(plain):
        raise TrainError(f"got encoder {name!r}; expected a network of timm. {_near(plain, timm.list_models(), TIMM)}")
    return timm, plain


def timm_options(name: str, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """What ``timm.create_model`` must be told, besides the name, for these images and for features."""
    timm, plain = known_to_timm(name)
    about = timm.get_pretrained_cfg(plain)
    sized = about is not None and about.fixed_input_size
    return {"num_classes": 0, "in_chans": channels, **({"img_size": size} if sized else {})}


def classifier(model: nn.Module) -> str:
    """Where a network of torchvision has the last layer of its classifier: linear, or a convolution (SqueezeNet)."""
    last: list[str] = [
        path
        for path, module in model.named_modules()
        if getattr(module, "out_features", None) == _CLASSES or getattr(module, "out_channels", None) == _CLASSES
    ]
    return last[-1]


def given_encoder(module: nn.Module, shape: Sequence[int]) -> tuple[nn.Module, int]:
    """A copy of the caller's module, on the CPU and in training mode, and its features F.

    Raises:
        TrainError: it is no module, or does not take images of ``shape`` ``(C, H, W)``, or gives no ``(B, F)``.
    """
    if not isinstance(module, nn.Module):
        raise TrainError(f"got a {type(module).__name__} for encoder; expected an nn.Module. Wrap it in one.")
    encoder = copy.deepcopy(module).cpu().train()
    return encoder, feature_size(encoder, GIVEN, shape)


@torch.no_grad()
def feature_size(encoder: nn.Module, name: str, shape: Sequence[int]) -> int:
    """F, from a pass of two black images of ``shape`` ``(C, H, W)`` in evaluation mode.

    Raises:
        TrainError: they do not go through, or what comes out is no ``(2, F)``.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    with _taken(name, shape):
        features = encoder.eval()(torch.zeros(2, *shape))
    for module, training in modes:
        module.training = training
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        got = f"features {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise TrainError(
            f"got {got} of two images from the encoder {name}; expected (2, F). Pool and flatten them in its forward."
        )
    return features.shape[1]


def freeze_patch_embedding(encoder: nn.Module, name: str) -> None:
    """Leave the patch projection of a ViT at its random weights: MoCo v3, arXiv:2104.02057, section 4.2.

    Raises:
        TrainError: the first convolution does not cut images into patches, or there is none.
    """
    patches = _patches(encoder)
    if patches is None:
        raise TrainError(
            f"got freeze_patch_embedding for the encoder {name}; expected one that begins with patches, a convolution "
            "whose stride is its kernel. Leave it out, or choose a ViT: --encoder vit_b_16"
        )
    patches.requires_grad_(False)


def refuse_stem(name: str, stem: str) -> None:
    """Raise TrainError for ``"cifar"``: the encoder ``name`` has no such stem."""
    if stem == "cifar":
        raise TrainError(
            f"got stem = 'cifar' for the encoder {name}; expected a ResNet of torchvision. Leave --stem out."
        )


def _timm(name: str, channels: int, size: tuple[int, int]) -> nn.Module:
    timm, plain = known_to_timm(name)
    with _taken(name, (channels, *size)):
        options = timm_options(name, channels, size)
        model: nn.Module = timm.create_model(plain, pretrained=False, **options)
    patches = _patches(model) if "img_size" in options else None
    if patches is not None and any(side % patch for side, patch in zip(size, patches.kernel_size, strict=True)):
        with _taken(name, (channels, *size)):
            raise ValueError(f"patches of {' x '.join(map(str, patches.kernel_size))} do not divide it")
    return model


def _first_convolution(model: nn.Module) -> tuple[str, Any]:
    return next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _patches(model: nn.Module) -> nn.Conv2d | None:
    """The convolution that cuts images into patches, where the first one does."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first if first is not None and first.stride == first.kernel_size != (1, 1) else None


@contextmanager
def _taken(name: str, shape: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # networks refuse images in many ways
        raise TrainError(
            f"got images of {' x '.join(map(str, shape))} (channels, height, width), which the encoder {name} does not "
            f"take ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Choose another size (--image-size, "
            "for folders of images) or --encoder."
        ) from error


def _near(name: str, names: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=4)
    return f"Near it: {', '.join(prefix + n for n in near)}." if near else f"There are {len(names)}; none is near it."
