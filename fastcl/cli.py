"""The command line: ``fastcl [info | selftest | bench | tune | train | evaluate | export | report]``, also
``python -m fastcl``.

``--json`` means the same everywhere: without FILE, JSON is printed in place of the text; with FILE, it is written there
and the text is printed as well. Exit code 0: done; 1: a check failed; 2: a mistake, told in one line on stderr
(``python -X dev`` shows where it was raised).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from . import trainer
from ._checks import sentence
from ._output import add_json, check_folder, say, show
from ._version import __version__
from .trainer import command, evaluation
from .trainer.errors import TrainError

_BENCH_FLAGS: set[str] = set()  # names of what only `fastcl bench` knows


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Without a command it is ``info``.

    Args:
        argv: the words after the program's name; ``sys.argv`` when omitted.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` and words it does not know.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].partition("=")[0] == "--json":
        words = ["info", *words]
    args = _parser().parse_args(words)
    try:
        check_folder("--json", getattr(args, "json", None))
        code: int = args.execute(args)
    except BrokenPipeError:  # as in `fastcl info | head`; the interpreter's last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TrainError, ValueError, TypeError, RuntimeError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"fastcl {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


def _info(args: argparse.Namespace) -> int:
    from . import _info

    report = _info.report()
    show(report, _info.text(report), args.json)
    return 0


def _selftest(args: argparse.Namespace) -> int:
    from . import _selftest

    result = _selftest.run()
    show(result, _selftest.text(result), args.json)
    return 0 if result["passed"] else 1


def _bench(args: argparse.Namespace) -> int:
    from . import _bench, _compare

    by_peers = hasattr(args, "peers")
    measure: Any = _compare if by_peers else _bench
    known = {f.name for f in fields(measure.Settings)} | {"plots" if by_peers else "plot"}
    for name in _BENCH_FLAGS & set(vars(args)) - known:
        flag = f"--{'no-compile' if name == 'compile' else name.replace('_', '-')}"
        got = f"{flag} with --peers" if by_peers else flag
        expected = "a flag of fastcl bench --peers" if by_peers else "--peers beside it"
        raise ValueError(sentence(got, expected, "See fastcl bench --help."))
    drawn = getattr(args, "plots" if by_peers else "plot", None)
    if not by_peers:
        check_folder("--plot", drawn)
    if drawn:
        _bench.need_matplotlib()  # before minutes of measuring, not after
    given = {name: value for name, value in vars(args).items() if name in _BENCH_FLAGS - {"plot", "plots"}}
    result = measure.run(measure.Settings(**given), partial(say, file=args.json))
    show(result, None, args.json)
    if drawn:
        measure.plot(result, drawn)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from . import _tune

    settings = _tune.Settings(**{f.name: getattr(args, f.name) for f in fields(_tune.Settings)})
    show(_tune.run(settings, partial(say, file=args.json)), None, args.json)
    return 0


def _train(args: argparse.Namespace) -> int:
    return command.run(args)


def _evaluate(args: argparse.Namespace) -> int:
    result = evaluation.evaluate(args.run, args.probe, epochs=args.epochs, device=args.device)
    text = f"{evaluation.table(result)}\n\nwritten to {Path(args.run) / 'evaluation.json'}"
    show(result, text, args.json)
    return 0


def _export(args: argparse.Namespace) -> int:
    check_folder("--to", args.to)
    about = trainer.export(args.run, args.to)
    print("\n".join([f"{args.to}:", *(f"  {name:<12}{value}" for name, value in about.items())]))
    return 0


def _report(args: argparse.Namespace) -> int:
    print(trainer.write_page(args.run))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcl",
        description="Contrastive losses that never store the similarity matrix. Without a command: info.",
    )
    parser.add_argument("--version", action="version", version=f"fastcl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    info = commands.add_parser("info", help="what is installed, which devices and backends there are, and why")
    add_json(info)
    info.set_defaults(execute=_info)

    selftest = commands.add_parser(
        "selftest", help="check every backend of this machine against fp64, in about ten seconds"
    )
    add_json(selftest)
    selftest.set_defaults(execute=_selftest)

    bench = commands.add_parser("bench", help="time and peak memory, dense against fastcl, or against other libraries")
    _add_bench(bench)
    add_json(bench)
    bench.set_defaults(execute=_bench)

    tune = commands.add_parser(
        "tune", help="measure other tiles of the Triton kernels on this GPU, and keep the faster ones"
    )
    _add_tune(tune)
    add_json(tune)
    tune.set_defaults(execute=_tune)

    train = commands.add_parser("train", help="train an encoder on images, and probe it")
    command.add_arguments(train)
    train.set_defaults(execute=_train)

    evaluate = commands.add_parser("evaluate", help="probe the last checkpoint of a run, or fine-tune it")
    _add_evaluate(evaluate)
    add_json(evaluate)
    evaluate.set_defaults(execute=_evaluate)

    export = commands.add_parser("export", help="write the encoder of a run for torchvision, timm, ONNX or detectron2")
    export.add_argument("run", metavar="RUN", help="folder of the run")
    export.add_argument(
        "--to", metavar="FILE", required=True, help="FILE.pt, FILE.safetensors, FILE.onnx or, for detectron2, FILE.pkl"
    )
    export.set_defaults(execute=_export)

    report = commands.add_parser(
        "report", help="write report.html into the folder of a finished run: one page, complete"
    )
    report.add_argument("run", metavar="RUN", help="folder of the run")
    report.set_defaults(execute=_report)
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from ._bench import DTYPES, LOSSES, Settings
    from ._compare import Settings as Side

    def add(flag: str, help: str, default: Any = None, *, to: Any = parser, **options: Any) -> None:
        """What is not given is not there: the defaults are those of the settings."""
        if default is not None:
            text = ",".join(map(str, default)) if isinstance(default, tuple) else default
            help = f"{help} (default: {text})"
        _BENCH_FLAGS.add(to.add_argument(flag, default=argparse.SUPPRESS, help=help, **options).dest)

    plain, side = Settings(), Side()
    add("--rows", "rows of the matrix: views, not images", plain.rows, type=_integers, metavar="N,N,...")
    add("--dim", "features per row", plain.dim, type=int)
    add("--dtype", "of the rows", plain.dtype, choices=DTYPES)
    add("--device", "where to compute", plain.device, choices=("auto", "cpu", "cuda"))
    add("--rounds", "calls of each contender, taking turns", plain.rounds, type=int)
    add("--threads", "CPU threads (default: torch decides)", type=int)
    add(
        "--dense-limit-gb",
        "skip a contender where it would need more memory than this",
        plain.dense_limit_gb,
        type=float,
        metavar="GB",
    )
    alone = parser.add_argument_group("one loss, dense against fastcl")
    add("--loss", "which loss", plain.loss, to=alone, choices=tuple(LOSSES))
    add("--plot", "also write time and memory over N as a PNG", to=alone, metavar="FILE")
    peers = parser.add_argument_group("fastcl beside every library that is installed (nothing is installed for it)")
    add(
        "--peers",
        f"measure that, of all or of these losses: {', '.join(side.peers)}; --rows is then "
        f"{','.join(map(str, side.rows))} unless given",
        to=peers,
        nargs="?",
        const=side.peers,
        type=_words,
        metavar="LOSS,...",
    )
    add("--backends", "of fastcl (default: all that can)", to=peers, type=_words, metavar="NAME,...")
    add("--queue", "keys of MoCo's queue", side.queue, to=peers, type=int, metavar="N")
    add("--call-seconds", "skip what would take longer a call", side.call_seconds, to=peers, type=float, metavar="S")
    add("--memory-mb", "also search the largest batch within such a peak", to=peers, type=float, metavar="MB")
    add("--no-compile", "leave out torch.compile", to=peers, dest="compile", action="store_false")
    add("--plots", "also write plots into this folder", to=peers, metavar="DIR")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    from ._tune import KINDS, Settings

    default = Settings()
    kinds = ",".join(KINDS)
    parser.add_argument(
        "--kinds",
        default=default.kinds,
        type=_words,
        metavar="KIND,...",
        help=f"which launches (default: {kinds})",
    )
    parser.add_argument(
        "--dtype",
        default=default.dtype,
        choices=("bfloat16", "float16", "float32"),
        help="of the rows (default: %(default)s)",
    )
    parser.add_argument("--rows", default=default.rows, type=int, help="of the batch (default: %(default)s)")
    parser.add_argument(
        "--workers", default=default.workers, type=int, help="processes that compile (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", default=default.rounds, type=int, help="of which the median counts (default: %(default)s)"
    )
    parser.set_defaults(device=default.device)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished or interrupted run")
    parser.add_argument(
        "--probe",
        choices=evaluation.PROBES,
        help="kNN of 200 neighbours, logistic regression on all labels or on 10 and 1 of each class, or training of "
        "the whole network on all labels (default: all of them)",
    )
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--device", help="where to compute (default: that of the run)")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(sentence(text, "integers with commas between them", "Try 512,1024.")) from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
