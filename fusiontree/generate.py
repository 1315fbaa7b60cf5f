"""Generates text from a checkpoint: ``python -m fusiontree.generate --checkpoint DIR --prompt TEXT …``.

Prompts and their continuations go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.generated_text import Printer, read_line, read_prompts, summary
from fusiontree.cli.program import add_device_options, run_program
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.data.tokenizers import Tokenizer
    from fusiontree.generation.decoding import Generation
    from fusiontree.generation.sampling import SamplingConfig
    from fusiontree.models.model import FusionTreeModel


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.generate",
        description="Continue prompts with a trained model. Without sampling options, tokens are drawn from the "
        "model's distribution; filters apply in the order penalty, temperature, top-k, top-p, min-p.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a run folder (its newest checkpoint) or one step"
    )
    _add_prompts(parser)
    _add_sampling(parser)
    _add_execution(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt, with tokens and logprobs"
    )
    output.add_argument(
        "--interactive",
        action="store_true",
        help="read prompts from the terminal, one per line, and print each continuation while it is generated; an "
        "empty line or Ctrl-D ends, Ctrl-C ends a continuation",
    )
    output.add_argument(
        "--stream", action="store_true", help="print text while it is generated, one prompt after the other"
    )
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the options of the texts to continue and of their ends."""
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="file whose whole content is one prompt; a .jsonl file holds one object with a 'prompt' per line; "
        "- reads standard input",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of new tokens per prompt (default 256, less if the model's length is reached before)",
    )
    stop = "end the output before this text; may be given several times"
    add("--stop", action="append", default=[], metavar="TEXT", help=stop)
    add("--allow-longer", action="store_true", help="allow texts longer than the model was trained for")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of :class:`SamplingConfig` and the seed."""
    add = parser.add_argument
    add("--greedy", action="store_true", help="always choose the most likely token")
    add("--temperature", type=float, default=1.0, help="below 1 sharpens, above 1 flattens (default 1)")
    add("--top-k", type=int, metavar="K", help="draw only from the K most likely tokens")
    top_p = "draw only from the most likely tokens that together have probability P"
    add("--top-p", type=float, metavar="P", help=top_p)
    min_p = "draw only tokens with at least P times the probability of the most likely token"
    add("--min-p", type=float, metavar="P", help=min_p)
    penalty = "above 1: tokens already in the text become less likely"
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help=penalty)
    add("--seed", type=int, default=0, help="prompt i (from 0) uses seed + i (default 0)")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    """Add the options of batches and device."""
    add = parser.add_argument
    add("--batch-size", type=int, default=8, metavar="N", help="prompts decoded together (default 8)")
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, record a step as a CUDA graph and replay it per token (default); the tokens are the same",
    )
    chunk = "maximum number of prompt tokens per forward, which limits memory (default 16384); the text is the same"
    add("--prefill-chunk", type=int, default=16384, metavar="N", help=chunk)
    weights = (
        "store the layers' matrices in 8 bits, which decodes faster and changes the text a little (docs/deploy.md)"
    )
    add("--weights", default="dtype", choices=["dtype", "int8", "fp8"], help=weights)
    add_device_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 done, 1 the model's logits are not finite, 2 user error."""
    return run_program(build_parser, command, argv)


def command(args: argparse.Namespace) -> int:
    """Generate text; return the exit code of :func:`main`."""
    try:
        run(args)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Generate text.

    Raises:
        UserError: an option, a prompt or the checkpoint is wrong; found before the first token.
        CheckpointDamage: a file of the checkpoint differs from its recorded hash.
        FloatingPointError: the model's logits are not finite.
    """
    sampling = read_sampling(args)
    for name in ("batch_size", "prefill_chunk"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    prompts = [*args.prompt, *(text for file in args.prompt_file for text in read_prompts(file))]
    if args.interactive and prompts:
        raise UserError("--interactive reads its prompts from the terminal; leave out --prompt and --prompt-file")
    if not prompts and not args.interactive:
        raise UserError("there is nothing to continue; give --prompt TEXT, --prompt-file FILE or --interactive")
    model, tokenizer = load(args)
    if args.interactive:
        converse(args, model, tokenizer, sampling)
    else:
        continue_all(args, model, tokenizer, sampling, prompts)


def load(args: argparse.Namespace) -> tuple[FusionTreeModel, Tokenizer]:
    """Load the checkpoint, ready to decode; returns the model and its tokenizer."""
    from fusiontree.checkpoint.load import find_checkpoint, load_model
    from fusiontree.data.tokenizers import load_tokenizer
    from fusiontree.models.fused_step import prepare
    from fusiontree.models.weight_only import quantize_weights
    from fusiontree.utils.device import choose_device, choose_dtype

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    folder = find_checkpoint(args.checkpoint)
    model, _ = load_model(folder, device, dtype)  # also verifies the tokenizer's file
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    weights = "" if args.weights == "dtype" else f", weights {args.weights}"
    if weights:
        quantize_weights(model, args.weights)
    prepare(model)
    print(f"{folder}: {millions:.1f}M parameters, {device}, {dtype}{weights}", file=sys.stderr, flush=True)
    return model, load_tokenizer(folder)


def continue_all(
    args: argparse.Namespace,
    model: FusionTreeModel,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    prompts: Sequence[str],
) -> None:
    """Continue every prompt and print the results."""
    from fusiontree.generation.decoding import check_request, generate

    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    options = request_options(args, model, max(len(prompt) for prompt in encoded))
    limits = {name: options[name] for name in ("max_new_tokens", "allow_longer")}
    check_request(model.config, encoded, **limits)  # all prompts, before the first batch
    show = Printer(prompts, args.seed, json_lines=args.json, stream=args.stream)
    batch_size = 1 if args.stream else args.batch_size
    done: list[Generation] = []
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        if args.stream:
            show.heading(start)
        generation = generate(
            model,
            [encoded[row] for row in rows],
            **options,
            **text_options(args, model, tokenizer),
            sampling=sampling,
            seeds=[args.seed + row for row in rows],
            on_token=show.token if args.stream else None,
        )
        done.append(generation)
        for row, result in zip(rows, generation.rows, strict=True):
            show.row(row, len(encoded[row]), result)
    print(summary(done), file=sys.stderr, flush=True)


def converse(args: argparse.Namespace, model: FusionTreeModel, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
    """Continue prompts that the terminal gives, one per line, until an empty line or the end of the input."""
    from fusiontree.generation.decoding import generate

    for number in itertools.count():
        prompt = read_line()
        if not prompt:
            return
        encoded = tokenizer.encode(prompt)
        show = Printer([prompt], args.seed + number, json_lines=False, stream=True)
        show.heading(0)
        try:
            generation = generate(
                model,
                [encoded],
                **request_options(args, model, len(encoded)),
                **text_options(args, model, tokenizer),
                sampling=sampling,
                seeds=[args.seed + number],
                on_token=show.token,
            )
            print(f"\n{summary([generation])}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            pass
        except UserError as error:  # a prompt that is too long; the next one may fit
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        print(flush=True)


def request_options(args: argparse.Namespace, model: FusionTreeModel, longest: int) -> dict[str, Any]:
    """Return the limits of a request whose longest prompt has ``longest`` tokens, as options of ``generate``."""
    room = model.config.max_position_embeddings - longest
    return {
        "max_new_tokens": max(1, min(256, room)) if args.max_new_tokens is None else args.max_new_tokens,
        "allow_longer": args.allow_longer,
        "prefill_chunk": args.prefill_chunk,
    }


def text_options(args: argparse.Namespace, model: FusionTreeModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the options of ``generate`` that do not depend on the prompts."""
    return {
        "stop_tokens": [tokenizer.eos_id],
        "stop_strings": args.stop,
        "decode": tokenizer.decode,
        "graphs": args.graphs,
        "never": tokenizer.unknown_ids(model.config.vocab_size),
    }


def read_sampling(args: argparse.Namespace) -> SamplingConfig:
    """Return the sampling options.

    Raises:
        UserError: an option is out of range.
    """
    from dataclasses import fields

    from fusiontree.generation.sampling import SamplingConfig

    return SamplingConfig(**{field.name: getattr(args, field.name) for field in fields(SamplingConfig)})


if __name__ == "__main__":
    sys.exit(main())
