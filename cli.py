"""The command line: `tpplan suggest | run | trace | hardware`; heavy imports happen inside the commands."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .cli_options import model_options, pin_options, search_options
from .errors import TpplanError, UsageError

DEBUG_HELP = "Show the traceback of an error."
YOUNG_OBJECTS = 1_000_000  # imports make nearly as many objects, and all of them stay


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tpplan")
def cli() -> None:
    """Plan how to split a PyTorch model over GPUs, and run the plan.

    \b
    tpplan suggest model.py --gpus 16          find the best layout, write plan.json
    tpplan run plan.json --steps 10            run it under torchrun
    tpplan trace model.py                      show the traced graph
    tpplan hardware                            list the hardware profiles

    Exit codes: 0 done, 1 internal error, 2 usage, 3 infeasible, 4 the model's own failure,
    6 this machine cannot do it, 130 interrupted.
    """


def debug_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--debug` on every command; `main` reads it from the context."""
    return click.option("--debug", is_flag=True, expose_value=False, callback=_set_debug, help=DEBUG_HELP)(command)


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    if value:
        context.find_root().obj = {"debug": True}
    return value


@cli.command()
@click.argument("target")
@click.option("--gpus", type=int, required=True, help="Number of GPUs.")
@click.option("--gpus-per-node", type=int, help="GPUs in one node. [default: the profile's]")
@click.option("--hardware", metavar="NAME|FILE", help="Hardware profile. [default: the local GPUs, else h100-sxm]")
@model_options
@click.option("--global-batch", type=int, help="Samples a step. [default: max(256, gpus)]")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option(
    "--memory-limit",
    "memory_limit_gib",
    type=float,
    metavar="GIB",
    help="Memory of one GPU. [default: the profile's]",
)
@pin_options
@search_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the plan goes. [default: plan.json]",
)
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@debug_option
def suggest(target: str, output: Path | None, format_: str, model_args: tuple[str, ...], **options: Any) -> None:
    """Find the fastest way to train TARGET on --gpus GPUs, prove it, and write plan.json.

    TARGET is model.py, model.py:NAME, package.module:NAME, or a Hugging Face folder or its config.json.
    """
    if format_ == "text":
        output = output or Path("plan.json")
    if output is not None:
        check_writable(output)
    from .reports.progress import progress

    with progress(format_ == "text") as (say, on_progress):
        say("start", f"planning {target} for {options['gpus']} GPUs")
        from .planner.suggest import suggest_in_detail

        found = suggest_in_detail(
            target, model_args=parse_model_args(model_args), say=say, on_progress=on_progress, **options
        )
    if output is not None:
        found.plan.save(output)
    if format_ == "json":
        click.echo(found.plan.to_json(), nl=False)
    else:
        from .reports.screen import plan_screen

        console = stdout_console()
        console.print(plan_screen(found.plan))
        then = f" Next: tpplan run {output}" if found.plan.schedule.runnable else ""
        console.print(f"\nWrote {output}.{then}", highlight=False, soft_wrap=True)
    if found.plan.solver.status == "feasible" and options["time_limit_s"] is None:
        click.echo(f"Interrupted: this is the best plan so far, gap {found.plan.solver.gap:.2%}.", err=True)
        sys.exit(130)


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is a GPU, else cpu]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True)
@click.option("--init-from", type=click.Path(path_type=Path), help="Folder with safetensors weights.")
@click.option("--metrics", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="Write one JSON object a step.")
@click.option(
    "--compile/--no-compile",
    "compile_",
    default=None,
    help="torch.compile each block. [default: on for cuda]",
)
@click.option(
    "--clip-grad-norm", type=click.FloatRange(0, min_open=True), help="Clip the global gradient norm. [default: off]"
)
@click.option("--master-port", type=int, help="Port of torchrun's rendezvous. [default: a free one]")
@debug_option
def run(plan: Path, **options: Any) -> None:
    """Train for some steps under PLAN, with torchrun, on random data of the right shape."""
    from .runtime.launch import run_plan

    sys.exit(run_plan(plan, debug=_debugging(), **options))


@cli.command()
@click.argument("target")
@model_options
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Samples that the figures are for.",
)
@click.option("--full", is_flag=True, help="Trace every layer, instead of replaying repeated ones.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write the whole graph as JSON; - is stdout.",
)
@click.option(
    "--svg",
    "svg_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write a picture of the folded graph; - is stdout.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What stdout gets: the table, or the totals as JSON.",
)
@debug_option
def trace(target: str, model_args: tuple[str, ...], inputs: tuple[str, ...], seq_len: int | None,
          precision: str, batch_size: int, full: bool, json_file: Path | None, svg_file: Path | None,
          format_: str) -> None:  # fmt: skip
    """Show the graph of TARGET: layers, parameters, FLOPs, bytes saved for backward, what tp may split."""
    from .reports.trace_outputs import TraceOutputs

    outputs = TraceOutputs(json_file, svg_file, format_)
    outputs.check()
    if seq_len is not None and seq_len < 1:
        raise UsageError(f"--seq-len is {seq_len}.", "Give --seq-len 1 or more.")
    from .reports.progress import progress

    with progress(format_ == "text") as (say, _):
        say("load", f"loading {target}")
        from .planner.sharding import analyse
        from .planner.target import load_target
        from .planner.trace import trace as trace_target

        loaded = load_target(target, model_args=parse_model_args(model_args), inputs=inputs, precision=precision)
        length = seq_len or loaded.default_sequence_length()
        say("trace", f"tracing {loaded.name} at sequence length {length}")
        graph = trace_target(loaded, sequence_length=length, precision=precision, full=full)
        say("shard", f"finding what tensor parallelism may split in {len(graph.classes)} classes of layers")
        sharding = analyse(graph)
    for path in outputs.write(graph, sharding, batch_size, stdout_console()):
        click.echo(f"tpplan: wrote {path}", err=True)


@cli.command()
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@debug_option
def hardware(format_: str) -> None:
    """List the hardware profiles that come with tpplan."""
    from .hardware_profiles.catalog import describe_profiles

    frame = describe_profiles()
    if format_ == "json":
        click.echo(frame.to_json(orient="records", indent=2))
        return
    from .reports.screen import frame_table

    stdout_console().print(frame_table(frame))


def parse_model_args(values: tuple[str, ...]) -> dict[str, str]:
    """`--model-arg k=v` texts as a mapping."""
    parsed = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not all(part.isidentifier() for part in name.strip().split(".")):
            raise UsageError(f"--model-arg {text} is not NAME=VALUE.", "For example --model-arg n_layer=12.")
        parsed[name.strip()] = value
    return parsed


def check_writable(path: Path) -> None:
    """Refuse early, before the search, to write where `Plan.save` would refuse."""
    from .planner.plan import check_destination

    check_destination(path)


def stdout_console() -> Any:
    """A console for the result; no colour where stdout is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(highlight=False, width=width)


def _debugging() -> bool:
    context = click.get_current_context(silent=True)
    return bool(context and context.find_root().obj and context.find_root().obj.get("debug"))


def main() -> None:
    """Entry point: runs the command, turns errors into one or two lines and an exit code."""
    debug = "--debug" in sys.argv
    _collect_rarely()
    if not debug:
        _silence_libraries()
    try:
        code = cli.main(standalone_mode=False, prog_name="tpplan")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except TpplanError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        click.echo(f"error: internal error: {type(error).__name__}: {error}", err=True)
        click.echo("This is a defect of tpplan: run again with --debug and report the traceback.", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _collect_rarely() -> None:
    """Look for garbage in cycles only after many new objects, and not once more at the end of the process.

    What torch and transformers import lives as long as the process: to go through it again and again takes a second
    and frees nothing, and so does the interpreter's own collection after the last exit handler.
    """
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)


def _silence_libraries() -> None:
    """No warnings of torch or transformers between our lines."""
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
