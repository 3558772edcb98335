"""Compare the line searches with tuned baselines and rivals: candidates x tasks x seeds.

The whole grid in miniature, on embedded data, in a few minutes:
    python scripts/compare.py --preset smoke

GLUE, Shakespeare and digits in runs of one to four minutes, two at a time. Ctrl-C at any time: the
same command goes on from there, in a later sitting too.
    python scripts/compare.py --preset cpu --jobs 2 --glue_dir GLUE --text_file shakespeare.txt \
        --output_dir model_cards/cpu

The rules that were tried before the former rule of salsa_adam_plus, in runs of half a minute:
    python scripts/compare.py --preset study --jobs 2 --glue_dir GLUE --text_file shakespeare.txt \
        --output_dir model_cards/study

The paper's own experiments, with five seeds; for a GPU, and days:
    python scripts/compare.py --preset paper --text_file shakespeare.txt

The report alone, from the runs that are there:
    python scripts/compare.py report --preset cpu --output_dir model_cards/cpu

A part of it: of the line search, of the sweep of AdamW with the new head trained first, of others
    python scripts/compare.py --preset cpu ... --candidates salsa_adam_plus
    python scripts/compare.py --preset cpu ... --candidates adamw_calibrated adamw_head_first
    python scripts/compare.py --preset cpu ... --tasks mrpc digits --candidates prodigy_cosine

The candidates are the paper's six (Adam and SGD with the paper's rates, SLS and SaLSa on both);
salsa_adam_plus and salsa_sgd_plus; the rule that both had before, as it was (former_plus,
former_sgd_plus) and with the new head trained first (former_plus_head_first). AdamW: with the best
of five peak rates, found on seeds of their own (adamw_calibrated); the same with the new head
trained first (adamw_head_first: where there is none, its runs are those of adamw_calibrated); with
Trainer's defaults (adamw_default: 5e-5, linear); by the folk rule (adamw_folk: 1e-4 for a new head
on a trained body, else 3e-3, cosine). Schedule-Free AdamW and Prodigy: with their defaults, and as
their authors advise (schedule_free_warmup: warm-up, 3e-4 for a new head on a trained body, else
their default of 2.5e-3, statistics of batch normalisation found anew before an evaluation;
prodigy_cosine: use_bias_correction, safeguard_warmup, cosine). And the package of the paper's
authors. The rivals come with
    pip install -c constraints.txt -e '.[compare]'

Each run leaves <output_dir>/<task>/<candidate>/seed_<seed>/results.json: its configuration, the
versions, loss and step size of every update, the evaluations, seconds, extra forward passes; or
the error that ended it. A run that left one is not repeated; to repeat it, delete its folder. The
report is <output_dir>/README.md, with a model card of the best line search in each task's folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison.candidates import (
    ABLATED,
    ABLATIONS,
    BY_DEFAULT,
    CANDIDATES,
    CHOSEN,
    STUDIED,
    SWEPT,
    trained_as,
)
from comparison.grid import check, run_grid
from comparison.loaders import Sources
from comparison.report import write_report
from comparison.tasks import PRESETS
from support.command_line import UsageError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("run", "report"),
        default="run",
        help="run what is missing and report (the default), or report only",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), required=True, help="which tasks")
    parser.add_argument(
        "--output_dir", type=Path, help="where the results are; by default runs/compare_PRESET"
    )
    parser.add_argument("--tasks", nargs="+", help="of the preset; by default all")
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=tuple(CANDIDATES),
        help="by default all but plus_* and former_no_clipping, ..., which are salsa_adam_plus and "
        "former_plus without one part, and tried_*, "
        "the rules that were tried before it; preset study: those beside four others",
    )
    parser.add_argument("--glue_dir", help="GLUE's own files; by default GLUE comes from the hub")
    parser.add_argument("--text_file", help="the text of the language model, Shakespeare's works")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run on a CPU")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path(f"runs/compare_{args.preset}")
    by_default = STUDIED if args.preset == "study" else BY_DEFAULT
    args.candidates = args.candidates or list(by_default)
    for name in args.tasks or ():
        if name not in PRESETS[args.preset]:
            known = ", ".join(PRESETS[args.preset])
            parser.error(f"preset {args.preset} has no task {name!r}, only {known}")
    for name in ("jobs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line by default."""
    args = parse_args(argv)
    tasks = PRESETS[args.preset]
    if args.tasks:
        tasks = {name: tasks[name] for name in args.tasks}
    sources = Sources(args.glue_dir, args.text_file, str(args.output_dir / "pretrained"))
    try:
        if args.command == "run":
            check(tasks, args.candidates, sources)
            run_grid(tasks, args.candidates, args.output_dir, sources, args.jobs, args.threads)
        write_report(
            args.output_dir,
            labels={name: c.label for name, c in CANDIDATES.items() if name not in ABLATIONS},
            tasks=tuple(PRESETS[args.preset]),
            command=command_of(args.preset),
            ablations=[
                {name: CANDIDATES[name].label for name in (whole, *parts)}
                for whole, parts in ABLATED.items()
            ],
            chosen=CHOSEN,
            references=SWEPT,
            same_runs={
                (task_name, name): trained_as(name, task)
                for task_name, task in PRESETS[args.preset].items()
                for name in CANDIDATES
            },
            chances={
                name: task.chance
                for name, task in PRESETS[args.preset].items()
                if task.chance is not None
            },
        )
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"Report: {args.output_dir / 'README.md'}")


def command_of(preset: str) -> str:
    """Return the command that fills the grid of a preset, as readers may give it."""
    settings = [task.settings for task in PRESETS[preset].values()]
    glue = " --glue_dir GLUE" if any(entry.get("task") for entry in settings) else ""
    text = " --text_file shakespeare.txt" if any(entry.get("file") for entry in settings) else ""
    return f"python scripts/compare.py --preset {preset}{glue}{text}"


if __name__ == "__main__":
    main()
