"""A run as one HTML page: its settings, curves, probes, nearest neighbours and a map of its features."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..pairwise import l2_normalize, pair_topk
from . import plots
from .checkpoint import CHECKPOINT, load_checkpoint, write_atomically
from .config import TrainConfig
from .data import Data, load_data
from .errors import TrainError
from .export import trained_encoder
from .models import encode
from .outcome import table

_SHOWN = 2000  # held-out images, at most, evenly spaced, on the map and among the neighbours
_QUERIES = 8
_NEIGHBOURS = 7

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; height: auto; }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: 1rem; }}
th, td {{ text-align: left; padding: 0.1rem 1.5rem 0.1rem 0; font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>{title}</h1>
<h2>Probes</h2>
<pre>{table}</pre>
<h2>Curves</h2>
{curves}
<h2>Nearest neighbours</h2>
<p>Held-out images, one of a class, and the held-out images whose features are nearest by cosine.</p>
{neighbours}
<h2>Features</h2>
{embedding}
<h2>Settings</h2>
<table>
<tr><th>setting</th><th>value</th></tr>
{settings}
</table>
</body>
</html>
"""


def write_page(run: Path | str, *, data: Data | None = None, encoder: nn.Module | None = None) -> Path:
    """Write ``report.html`` into the folder of a finished run; pictures are inside, and nothing else is loaded.

    Args:
        data: the images, where the run was given them.
        encoder: as :func:`~.loop.train` had it, of a run whose encoder was given.

    Returns:
        The file.

    Raises:
        TrainError: the run is not finished, its checkpoint cannot be read, or its data are not there.
    """
    run = Path(run)
    state = load_checkpoint(run / CHECKPOINT)
    if not (run / "result.json").is_file():
        raise TrainError(
            f"got {run}, which holds an interrupted run; expected a finished one. Continue it with: "
            f"fastcl train --resume {run}"
        )
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    config, history = TrainConfig(**state["config"]), state["history"]
    data, (trained, _) = load_data(config, data), trained_encoder(run, encoder=encoder)
    labelled = result["probe"]["trained"] != {}
    shown = (data.test.labels >= 0).nonzero().squeeze(1) if labelled else torch.arange(len(data.test))
    at = shown[:: -(-len(shown) // _SHOWN)]
    features, labels = encode(trained, data.test, at, torch.device("cpu")), data.test.labels[at]
    near = nearest_of_each_class(features, labels if labelled else torch.arange(len(labels)))
    pictures = data.test.read(at[near.flatten()]).unflatten(0, near.shape)
    page = _PAGE.format(
        title=html.escape(f"{config.method} on {config.data}, seed {config.seed}"),
        table=html.escape(table(result)),
        curves=_picture("training loss against step", plots.plot_loss, history)
        + (_picture("probes against step", plots.plot_probe, history, result["probe"]) if labelled else ""),
        neighbours=_picture(
            "images and their nearest neighbours", plots.plot_neighbours, pictures, labels[near], data.classes
        ),
        embedding=_picture("map of features", plots.plot_embedding, features, labels, data.classes),
        settings=_rows(dataclasses.asdict(config) | result["versions"]),
    )
    write_atomically(run / "report.html", lambda file: file.write(page.encode()))
    return run / "report.html"


def nearest_of_each_class(features: Tensor, labels: Tensor) -> Tensor:
    """The first image of each of the first classes, then its nearest others by cosine: indices ``(Q, 1 + K)``.

    Args:
        features: ``(N, F)``.
        labels: ``(N,)``.
    """
    every = torch.arange(len(labels))
    queries = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()[:_QUERIES]])
    z = l2_normalize(features)
    _, near = pair_topk(z[queries], z, topk=min(_NEIGHBOURS, len(z) - 1), drop=(queries, every))
    return torch.cat([queries[:, None], near], 1)


def _picture(what: str, plot: Callable[..., None], *args: Any) -> str:
    png = io.BytesIO()
    plot(png, *args)
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def _rows(settings: Mapping[str, Any]) -> str:
    return "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in settings.items()
    )
