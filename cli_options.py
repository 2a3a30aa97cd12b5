"""Families of options that the commands share: the model, pins, and how to search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

Command = Callable[..., None]


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    """The command with some options, shown in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Options that say which model and how it is called."""
    return _with(
        command,
        click.option(
            "--model-arg",
            "model_args",
            multiple=True,
            metavar="K=V",
            help="Argument of the model's factory or class.",
        ),
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="SPEC",
            help='An input, for example "ids=int64[B,S]<32000".',
        ),
        click.option(
            "--seq-len",
            type=int,
            help="Tokens a sample; for images the side. [default: min(4096, the model's maximum)]",
        ),
        click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True),
    )


def pin_options(command: Command) -> Command:
    """What the user decides before the search does."""
    return _with(
        command,
        click.option(
            "--fix",
            multiple=True,
            metavar="AXIS=VALUE",
            help="Pin an axis (tp, pp, dp, schedule, recompute, ...: an unknown one lists them), or a layer: "
            "layer:PATTERN=full. Repeatable, as are the next three.",
        ),
        click.option("--max", "most", multiple=True, metavar="AXIS=N", help="The most of a degree, for example pp=4."),
        click.option("--min", "least", multiple=True, metavar="AXIS=N", help="The least of a degree."),
        click.option(
            "--forbid", multiple=True, metavar="AXIS=VALUE", help="Rule out a value, for example recompute=full."
        ),
        click.option(
            "--pins",
            "pins_file",
            type=click.Path(path_type=Path),
            metavar="FILE.toml",
            help="Pins from a file with tables fix, max, min, forbid, layers; the command line goes first.",
        ),
    )


def search_options(command: Command) -> Command:
    """What is minimised, how far the proof goes, and how the search runs."""
    return _with(
        command,
        click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Layouts to rank."),
        click.option(
            "--objective",
            type=click.Choice(["time", "memory", "gpus", "cost"]),
            default="time",
            show_default=True,
            help="Minimise the step time; the memory of a GPU; the GPUs for --target-step-time; the money of a step.",
        ),
        click.option(
            "--target-step-time",
            "target_step_time_s",
            type=float,
            metavar="S",
            help="What --objective gpus must reach.",
        ),
        click.option("--price", "price_per_gpu_hour", type=float, metavar="MONEY", help="Of one GPU for an hour."),
        click.option(
            "--gap",
            type=click.FloatRange(0, 1),
            default=0.005,
            show_default=True,
            help="Stop when this close to the proven bound.",
        ),
        click.option(
            "--time-limit",
            "time_limit_s",
            type=click.FloatRange(0, min_open=True),
            metavar="S",
            help="Stop the search after S seconds.",
        ),
        click.option("--audit", is_flag=True, help="Solve pruned combinations again, without their bounds."),
        click.option(
            "--dump-lp",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE.lp",
            help="Write the integer programme of the plan's combination.",
        ),
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes. [default: one a core]"),
    )
