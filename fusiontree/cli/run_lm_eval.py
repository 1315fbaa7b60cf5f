"""``fusiontree lm-eval …``: the command of lm-evaluation-harness with the model type ``fusiontree``.

The harness up to 0.4.13 imports no model types of other packages, so that its command alone does not know ours. Later
releases find it through the entry point group ``lm_eval.models``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusiontree.utils.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the help; all options are read by the harness's parser."""
    parser = argparse.ArgumentParser(
        prog="fusiontree lm-eval",
        description="The command of lm-evaluation-harness, in which checkpoints are a type of model.",
        epilog="All other options of the harness can be given too: lm_eval run --help.",
    )
    parser.add_argument("--model", metavar="TYPE", help="type of model (default fusiontree)")
    model_args = "checkpoint=RUN, and dtype, max_length, max_gen_toks, padding_side, seed"
    parser.add_argument("--model_args", metavar="NAME=VALUE,…", help=model_args)
    parser.add_argument("--tasks", metavar="TASK,…", help="tasks, groups or tags")
    parser.add_argument("--include_path", metavar="DIR", help="folder of further task files")
    parser.add_argument("--batch_size", metavar="N", help="rows computed together (default 1)")
    parser.add_argument("--output_path", metavar="DIR", help="folder of results")
    parser.add_argument("--log_samples", action="store_true", help="write every answer there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness's command; return the exit code: 0 done, 2 user error.

    Raises:
        SystemExit: ``--help`` was asked for (code 0), or the harness's parser found a mistake.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words) or not words:
        build_parser().parse_args(["--help"])
    if words[0].startswith("-"):
        words.insert(0, "run")
    if words[0] == "run" and not {"--model", "-M", "--config", "-C"} & {word.split("=")[0] for word in words}:
        words += ["--model", "fusiontree"]
    try:
        from fusiontree.evaluation.lm_eval_tasks import require_lm_eval

        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import fusiontree.evaluation.lm_eval_model  # noqa: F401  registers the model type

        before = sys.argv
        sys.argv = ["lm_eval", *words]  # all that the harness's parser reads
        try:
            cli_evaluate()
        finally:
            sys.argv = before
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
