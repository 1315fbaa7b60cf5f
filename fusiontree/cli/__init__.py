"""The console command ``fusiontree VERB …``. Each verb is a program of its own, imported when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from fusiontree.utils.errors import nearest


class Verb(NamedTuple):
    """A program and its line in the help."""

    module: str
    purpose: str
    function: str = "main"


VERBS = {
    "train": Verb("fusiontree.train", "train a model; started again, the run goes on"),
    "generate": Verb("fusiontree.generate", "continue prompts with a checkpoint"),
    "evaluate": Verb("fusiontree.evaluate", "measure a checkpoint: perplexity, needle, recall"),
    "lm-eval": Verb("fusiontree.cli.run_lm_eval", "lm-evaluation-harness with the model type fusiontree"),
    "benchmark": Verb("fusiontree.benchmark", "measure throughput, MFU and memory of a configuration"),
    "benchmark-decoding": Verb("fusiontree.cli.benchmark_decoding", "measure decoding beside the memory's bandwidth"),
    "plan": Verb("fusiontree.plan", "estimate memory and speed of a configuration in every layout"),
    "preflight": Verb("fusiontree.preflight", "measure the links between the nodes of a job"),
    "study": Verb("fusiontree.study", "train the arms of a study side by side and compare them"),
    "report": Verb("fusiontree.report", "goodput, interruptions and losses of a run"),
    "plot": Verb("fusiontree.cli.plot_run", "draw losses, gates, learning rate and throughput of a run"),
    "quickstart": Verb("fusiontree.cli.quickstart", "build data, train, resume, generate and plot with a small model"),
    "data build": Verb("fusiontree.cli.build_shards", "turn text into token shards"),
    "data inspect": Verb("fusiontree.cli.show_dataset", "show a dataset's contents and a document", "inspect_main"),
    "data verify": Verb("fusiontree.cli.show_dataset", "check every byte of a dataset", "verify_main"),
    "checkpoint convert": Verb("fusiontree.cli.convert_checkpoint", "convert between checkpoint formats"),
    "checkpoint analyze": Verb("fusiontree.cli.analyze_checkpoint", "rank the parts of a model by what they are worth"),
    "checkpoint prune": Verb("fusiontree.cli.prune_checkpoint", "write a smaller model from a trained one"),
    "checkpoint inspect": Verb("fusiontree.cli.inspect_checkpoint", "show, verify or compare checkpoints"),
}
_HELP = ("-h", "--help")


def usage(verbs: Sequence[str] = tuple(VERBS)) -> str:
    """Return the help: one line per verb."""
    lines = [f"  {name:20}{VERBS[name].purpose}" for name in verbs]
    return "\n".join(["usage: fusiontree VERB [options]", "", *lines, "", "fusiontree VERB --help shows its options."])


def find_verb(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the verb that ``words`` begin with, and the words behind it; None if they begin with no verb."""
    for length in (1, 2):
        name = " ".join(words[:length])
        if len(words) >= length and name in VERBS:
            return name, list(words[length:])
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code: 2 if the verb is unknown or the verb reports a user error."""
    words = sys.argv[1:] if argv is None else list(argv)
    first, second = [*words, "", ""][:2]
    group = [name for name in VERBS if name.startswith(f"{first} ")]
    if first in ("", *_HELP) or (group and second in ("", *_HELP)):
        print(usage(group or tuple(VERBS)))
        return 0
    found = find_verb(words)
    if found is None:
        wrong = f"{first} {second}" if group else first
        known = ", ".join(dict.fromkeys(group or [name.split()[0] for name in VERBS]))
        print(f"error: there is no verb '{wrong}'{nearest(wrong, group or VERBS)}; known are: {known}", file=sys.stderr)
        return 2
    name, rest = found
    verb = VERBS[name]
    program = getattr(importlib.import_module(verb.module), verb.function)
    before, sys.argv[0] = sys.argv[0], f"fusiontree {name}"  # usage lines show what was typed
    try:
        return program(rest)
    finally:
        sys.argv[0] = before
