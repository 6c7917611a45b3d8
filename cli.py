"""The command line. Importing it, and `fxpress --help`, load neither torch nor onnxruntime.

Exit codes: 0 compiled and verified; 1 a user's mistake, explained in one message; 2 compiled, but a promise was missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from ._version import __version__
from .errors import FxpressError, OptionError

app = typer.Typer(
    name="fxpress",
    help="Make a trained PyTorch model small and fast: prune, quantize, lower to ONNX INT8, verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USER_ERROR = 1
_INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, FILE.py:CALLABLE (runs that file), PACKAGE.MODULE:CALLABLE, or FILE.pt2",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="the folder that compile wrote")]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="safetensors, or a checkpoint (read without unpickling code)")
]
InputSize = Annotated[
    str | None, typer.Option("--input", metavar="CxHxW", help="size of one example, such as 3x224x224")
]
PreprocessName = Annotated[
    str | None,
    typer.Option(
        "--preprocess", metavar="NAME|FILE.toml", help="how pictures become inputs: imagenet, cifar10, none or a file"
    ),
]
TargetName = Annotated[str, typer.Option(metavar="NAME", help="where the model will run: see `fxpress targets`")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE.py", help="a file of your own that registers passes (it is run)"),
]
Json = Annotated[bool, typer.Option("--json", help="write the result to stdout as JSON")]
Seed = Annotated[int, typer.Option(help="for everything that is drawn")]
Threads = Annotated[int, typer.Option(min=1, help="threads of ONNX Runtime")]
Dump = Annotated[
    Path | None, typer.Option(metavar="DIR", help="write the graph after each pass, and a reproducer of a failure")
]


@app.command("compile")
def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="the folder to write")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="calibration: folder or zip of pictures, .npz, .npy, FILE.py:CALLABLE"),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="labelled data to judge float and compiled on")
    ] = None,
    train_data: Annotated[
        str | None, typer.Option("--train-data", metavar="DATA", help="data for recipes that train (labels where read)")
    ] = None,
    weights: Weights = None,
    input_size: InputSize = None,
    preprocess: PreprocessName = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="calibrate on that many examples, evenly spaced")
    ] = None,
    target: TargetName = "ort-x86",
    prune: Annotated[str | None, typer.Option(metavar="OPTIONS", help="for example macs=0.5,importance=l2")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME|FILE.toml", help="see `fxpress recipes`")] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="TEXT", help="the passes to run, instead of a recipe")] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(metavar="1%", help="how far the metric may fall; if need be, the fewest MACs are left in float"),
    ] = None,
    search_seconds: Annotated[
        float | None, typer.Option(help="the longest that the search for --max-drop may take [default: 1800]")
    ] = None,
    search_trials: Annotated[
        int | None, typer.Option(min=0, help="the most models that it may judge; 0: no search [default: 60]")
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="its trials; a killed search goes on from them [default: OUT.journal]"),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="measure here which ops are faster in float, and leave those in float")
    ] = False,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="keep a quantized model that is slower than the float model")
    ] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="share calibration: torchrun --nproc-per-node 2 --no-python fxpress")
    ] = False,
    seed: Seed = 0,
    threads: Threads = 1,
    dump: Dump = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> int:
    """Compile a model, verify it and write OUT with its report."""
    from .commands.compile import Request, compile_model
    from .commands.passes import load_plugins

    if pipeline is not None and recipe is not None:
        raise OptionError("--recipe has no effect beside --pipeline", hint="give one of the two")
    load_plugins(plugin or [])
    request = Request(
        model, data, eval_data, train_data, weights, input_size, preprocess, samples, target, prune, recipe, pipeline,
        max_drop, search_seconds, search_trials, journal, tune, allow_slower, seed, threads, dump, output, distributed,
    )  # fmt: skip
    return compile_model(request, as_json)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|OUT", help="a model as for compile, or a folder that compile wrote")
    ],
    weights: Weights = None,
    input_size: InputSize = None,
    target: TargetName = "ort-x86",
    everything: Annotated[bool, typer.Option("--all", help="every group and every pinned axis in its own row")] = False,
    as_json: Json = False,
) -> int:
    """Parameters, MACs, groups, blocks, and what cannot be pruned or quantized and why."""
    from .commands.inspect import inspect_artifact, inspect_model

    if Path(model).is_dir():
        if weights is not None or input_size is not None or everything:
            names = "--weights, --input and --all"
            raise OptionError(f"{names} have no effect on a compiled folder", hint="leave them out")
        return inspect_artifact(Path(model), as_json)
    return inspect_model(model, weights, input_size, target, as_json, everything)


@app.command("eval")
def eval_(
    folder: Folder,
    data: Annotated[str, typer.Option(metavar="DATA", help="labelled data")],
    preprocess: PreprocessName = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> int:
    """Metric and latency, float against compiled."""
    from .commands.measure import evaluate_artifact

    return evaluate_artifact(folder, data, preprocess, threads, as_json)


@app.command()
def bench(
    folder: Folder,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER.onnx", help="compare with this file instead of float")
    ] = None,
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 3.0,
    threads: Threads = 1,
    as_json: Json = False,
) -> int:
    """Latency by interleaved medians."""
    from .commands.measure import bench_artifact

    return bench_artifact(folder, against, seconds, threads, as_json)


@app.command()
def explain(
    folder: Folder,
    node: Annotated[str, typer.Argument(metavar="NODE", help="a layer's name, as the report has it")],
    as_json: Json = False,
) -> int:
    """One layer: range, error, or why it stays in float."""
    from .commands.inspect import explain_node

    return explain_node(folder, node, as_json)


@app.command()
def opt(
    source: Annotated[Path, typer.Argument(metavar="IN.pt2", help="a saved Program")],
    pipeline: Annotated[str, typer.Option(metavar="TEXT", help="the passes to run")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.pt2", help="the file to write")],
    target: TargetName = "ort-x86",
    data: Annotated[str | None, typer.Option(metavar="DATA", help="calibration, for passes that need it")] = None,
    seed: Seed = 0,
    dump: Dump = None,
    plugin: Plugins = None,
) -> int:
    """Run passes on a saved Program."""
    from .commands.passes import load_plugins, optimize

    load_plugins(plugin or [])
    return optimize(source, pipeline, output, target, data, seed, dump)


@app.command("passes")
def passes_(plugin: Plugins = None, as_json: Json = False) -> int:
    """The passes that pipelines are made of."""
    from .commands.passes import list_passes, load_plugins

    load_plugins(plugin or [])
    return list_passes(as_json)


@app.command()
def targets(as_json: Json = False) -> int:
    """The targets that can be compiled for."""
    from .commands.passes import list_targets

    return list_targets(as_json)


@app.command()
def recipes(as_json: Json = False) -> int:
    """The built-in recipes."""
    from .commands.passes import list_recipes

    return list_recipes(as_json)


@app.command()
def rerun(
    crash: Annotated[Path, typer.Argument(metavar="CRASH.repro", help="the reproducer of a failure")],
    target: TargetName = "ort-x86",
    data: Annotated[str | None, typer.Option(metavar="DATA", help="calibration, for passes that need it")] = None,
    dump: Dump = None,
    plugin: Plugins = None,
) -> int:
    """Replay a failure."""
    from .commands.passes import load_plugins
    from .commands.passes import rerun as replay

    load_plugins(plugin or [])
    return replay(crash, target, data, dump)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="the folder to write")] = Path(
        "fxpress-demo"
    ),
    seed: Seed = 0,
    threads: Threads = 1,
    as_json: Json = False,
) -> int:
    """The main job on data that comes with the installation: train, prune, fine-tune, compile, verify."""
    from .commands.demo import run

    return run(output, seed, threads, as_json)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"fxpress {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(guarded(lambda: app(args=arguments, standalone_mode=False)))


def guarded(run: Callable[[], int | None]) -> int:
    """Run and turn what a user can mend into one message and exit code 1."""
    from .commands.screen import show_error

    try:
        return run() or 0
    except FxpressError as error:
        show_error(error)
    except TyperException as error:
        if not error.format_message():  # a command without arguments: its help has been shown
            return USER_ERROR
        show_error(OptionError(error.format_message(), hint="see `fxpress --help`, or `fxpress COMMAND --help`"))
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    return USER_ERROR
